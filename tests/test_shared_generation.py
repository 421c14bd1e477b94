"""Decoders on GroupQueryAttention with one buffer for past and present: the same words as ever."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from onnxpress import errors
from onnxpress.runtime import load

from . import onnx_models
from .null_gpu import on_null_gpu
from .onnx_models import PAD, VOCAB, WORDS, normal

PROMPTS = ["the cat sat on", "a", "red house and blue", "who", "the dog ran to an old bridge near"]
LAYERS, HEADS, KV_HEADS, DIM, HIDDEN = 2, 4, 2, 16, 64
NAMES = [f"{i}.{part}" for i in range(LAYERS) for part in ("key", "value")]


def weights(context: int) -> dict[str, np.ndarray]:
    """Those of both layouts: scores near 1, so that every token of a row counts."""
    angles = np.arange(context)[:, None] / 100.0 ** (np.arange(DIM // 2) / (DIM // 2))
    found = {
        "tok": normal(3, len(VOCAB), HIDDEN),
        "pos": normal(4, context, HIDDEN),
        "out": normal(5, HIDDEN, len(VOCAB)) / np.float32(8),
        "cos": np.cos(angles).astype(np.float32),
        "sin": np.sin(angles).astype(np.float32),
    }
    for i in range(LAYERS):
        for j, (name, rows, columns) in enumerate(
            [("q", HIDDEN, HIDDEN), ("k", HIDDEN, 32), ("v", HIDDEN, 32), ("o", HIDDEN, HIDDEN)]
        ):
            size = np.float32(6 if name in "qk" else 4)
            found[f"w{name}{i}"] = normal(10 + 4 * i + j, rows, columns) / size
    return found


def decoder(layout: str, *, context: int, rotary: bool, token: bool = False) -> ir.Model:
    """A decoder of grouped heads: its positions learned, or rotary inside of the attention."""
    shared, values = layout == "shared", weights(context)
    values = {n: w for n, w in values.items() if n not in (("pos",) if rotary else ("cos", "sin"))}
    past = [f'float[b,{KV_HEADS},capacity,{DIM}] "past_key_values.{n}"' for n in NAMES]
    present = [f'float[b,{KV_HEADS},capacity,{DIM}] "present.{n}"' for n in NAMES]
    body = []
    for i in range(LAYERS):
        body.append(
            f"q{i} = MatMul(x{i}, wq{i})  k{i} = MatMul(x{i}, wk{i})  v{i} = MatMul(x{i}, wv{i})"
        )
        if shared:
            caches = f', "past_key_values.{i}.key", "past_key_values.{i}.value"'
            body.append(
                f'a{i}, "present.{i}.key", "present.{i}.value" = com.microsoft.GroupQueryAttention'
                f"<num_heads={HEADS}, kv_num_heads={KV_HEADS}, do_rotary={int(rotary)}>"
                f"(q{i}, k{i}, v{i}{caches}, seqlens_k, total_sequence_length"
                f"{', cos, sin' if rotary else ''})"
            )
        else:
            turned = "qk" if rotary else ""
            for n in turned:
                heads = HEADS if n == "q" else KV_HEADS
                body.append(
                    f"r{n}{i} = RotaryEmbedding<num_heads={heads}>({n}{i}, cos, sin, position_ids)"
                )
            q, k = (f"rq{i}", f"rk{i}") if rotary else (f"q{i}", f"k{i}")
            body.append(
                f'a{i}, "present.{i}.key", "present.{i}.value" ='
                f" Attention<q_num_heads={HEADS}, kv_num_heads={KV_HEADS}>({q}, {k}, v{i}, bias,"
                f' "past_key_values.{i}.key", "past_key_values.{i}.value")'
            )
        body.append(f"o{i} = MatMul(a{i}, wo{i})  x{i + 1} = Add(x{i}, o{i})")
    positions = ["int64[b,s] position_ids"] if not (shared and rotary) else []
    if shared:
        inputs = [*positions, "int32[b] seqlens_k", "int32[1] total_sequence_length"]
        mask = ""
    else:
        inputs = ["int64[b,t] attention_mask", *positions]
        mask = """
          zero = Constant<value_int=0>()  one = Constant<value_int=1>()
          axis1 = Constant<value_ints=[1]>()  axes12 = Constant<value_ints=[1, 2]>()
          st = Shape(attention_mask)  t = Gather(st, one)
          ss = Shape(input_ids)  s = Gather(ss, one)  before = Sub(t, s)
          keys = Range(zero, t, one)  queries = Range(before, t, one)
          column = Unsqueeze(queries, axis1)  causal = LessOrEqual(keys, column)
          real = Cast<to=9>(attention_mask)  real4 = Unsqueeze(real, axes12)
          seen = And(causal, real4)
          yes = Constant<value_float=0.0>()  no = Constant<value_float=-1e9>()
          bias = Where(seen, yes, no)"""
    chosen, tail = [], ""
    if token:  # the likeliest token of each row, chosen in the graph
        chosen = ["int64[b] next_token"]
        tail = """
          ends = Constant<value_ints=[1]>()
          held = Cast<to=7>(seqlens_k)  held2 = Unsqueeze(held, ends)
          here = Equal(position_ids, held2)  here1 = Cast<to=1>(here)
          last = ArgMax<axis=1>(here1)  row = GatherND<batch_dims=1>(logits, last)
          next_token = ArgMax<axis=-1, keepdims=0>(row)"""
    stem = "x0 = Gather(tok, input_ids)"
    if not rotary:
        stem = "tk = Gather(tok, input_ids)  ps = Gather(pos, position_ids)  x0 = Add(tk, ps)"
    inits = [f"float[{','.join(map(str, w.shape))}] {n}" for n, w in values.items()]
    text = f"""<ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]>
      g ({", ".join(["int64[b,s] input_ids", *inputs, *past, *inits])})
      => ({", ".join([f"float[b,s,{len(VOCAB)}] logits", *chosen, *present])}) {{
      {mask} {stem} {"  ".join(body)}  logits = MatMul(x{LAYERS}, out) {tail} }}"""
    model = ir.from_onnx_text(text)
    for value in [v for v in model.graph.inputs if v.name in values]:
        model.graph.inputs.remove(value)
        value.const_value = ir.tensor(values[str(value.name)], name=value.name)
        model.graph.register_initializer(value)
    for value in [*model.graph.inputs, *model.graph.outputs]:
        if str(value.name).startswith("present") and not shared:
            value.shape = ir.Shape(["b", KV_HEADS, "capacity + s", DIM])
        if value.name == "attention_mask":
            value.shape = ir.Shape(["b", "capacity + s"])
    return model


def half(model: ir.Model) -> ir.Model:
    """The same in float16: weights, cache and logits."""
    for value in model.graph.initializers.values():
        value.const_value = ir.tensor(value.const_value.numpy().astype(np.float16), name=value.name)
    values = [*model.graph.initializers.values(), *model.graph.inputs, *model.graph.outputs]
    for value in values:
        if value.dtype == ir.DataType.FLOAT:
            value.dtype = ir.DataType.FLOAT16
    return model


def artifact(
    path: Path,
    layout: str,
    *,
    context: int | None = 200,
    eos: tuple[int, ...] = (999,),
    rotary: bool = False,
    token: bool = False,
    window: int | None = None,
    dtype: str = "float32",
) -> Path:
    model = decoder(layout, context=context or 300, rotary=rotary, token=token)
    kv = {
        "layers": LAYERS,
        "kv_heads": KV_HEADS,
        "head_dim": DIM,
        "dtype": dtype,
        "past": "past_key_values.{layer}.{part}",
        "present": "present.{layer}.{part}",
    }
    if layout == "shared":
        kv |= {"layout": layout, "lengths": "seqlens_k", "total": "total_sequence_length"}
        kv |= {"window": window} if window else {}
    settings = {
        "eos_token_ids": list(eos),
        "pad_token_id": PAD,
        "bos_token_id": None,
        "context_length": context,
        "chat": None,
    }
    return onnx_models.publish(
        path,
        half(model) if dtype == "float16" else model,
        task="generate",
        settings=settings,
        kv=kv,
        tokenizer_json=onnx_models.tokenizer(template=False),
    )


@pytest.fixture(scope="module", params=[False, True], ids=["learned", "rotary"])
def pair(request, tmp_path_factory):
    """One decoder in both layouts, shared and concat."""
    path = tmp_path_factory.mktemp("pair")
    return [load(artifact(path / n, n, rotary=request.param)) for n in ("shared", "concat")]


@pytest.fixture(scope="module")
def shared_artifact(tmp_path_factory):
    return artifact(tmp_path_factory.mktemp("shared") / "a", "shared")


@pytest.fixture
def shared(shared_artifact):
    """A generator whose buffers nobody has used."""
    return load(shared_artifact)


@pytest.fixture
def allocated(shared, monkeypatch):
    """The buffers that `shared` makes, in order."""
    made, make = [], shared.session.buffer
    monkeypatch.setattr(
        shared.session, "buffer", lambda *a, **k: made.append(make(*a, **k)) or made[-1]
    )
    return made


def padded(prompts: list[str], width: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask of prompts, on the left of which there is padding."""
    rows = [[VOCAB.index(w) for w in p.split()] for p in prompts]
    width = max([width, *map(len, rows)])
    ids = [[PAD] * (width - len(r)) + r for r in rows]
    return np.array(ids), np.array([[0] * (width - len(r)) + [1] * len(r) for r in rows])


def ids_after(generator, prompts: list[str], steps: int) -> list[list[int]]:
    return generator.generate_ids(*padded(prompts), max_new_tokens=steps)


def cells(made: list) -> list:
    """Those of the buffers that hold the cache."""
    return [b for b in made if len(b.shape) == 4]


def test_both_layouts_say_the_same(pair):
    shared, concat = pair
    want = [ids_after(concat, [p], 40)[0] for p in PROMPTS]
    assert all(len(set(w)) > 5 for w in want)  # the test sees something
    assert [ids_after(shared, [p], 40)[0] for p in PROMPTS] == want
    assert ids_after(shared, PROMPTS, 40) == want
    texts = concat.generate(PROMPTS, max_new_tokens=40)
    assert len(set(texts)) == len(texts)
    for batch_size in (2, 8):
        assert shared.generate(PROMPTS, max_new_tokens=40, batch_size=batch_size) == texts
    assert shared.generate([]) == []


def test_every_column_of_padding_is_dropped(pair):
    shared, concat = pair
    arrays = padded(PROMPTS, width=90)  # wider than the buffers for these will be
    got = shared.generate_ids(*arrays, max_new_tokens=12)
    assert got == concat.generate_ids(*arrays, max_new_tokens=12)
    ids, mask = padded(["the cat sat on a mat"])
    mask[0, 2] = 0  # a token inside of the prompt that counts for nothing
    got = shared.generate_ids(ids, mask, max_new_tokens=8)
    assert got == concat.generate_ids(ids, mask, max_new_tokens=8)


def test_prompts_of_one_token(pair):
    shared, concat = pair
    for prompts in (["who"], ["who", "a", "the"]):
        want = ids_after(concat, prompts, 9)
        assert ids_after(shared, prompts, 9) == want
        assert ids_after(shared, prompts, 1) == [w[:1] for w in want]
        assert ids_after(shared, prompts, 0) == [[] for _ in prompts]


def test_rows_stop_at_different_steps(pair, tmp_path):
    ids, mask = padded(PROMPTS)
    free = pair[1].generate_ids(ids, mask, max_new_tokens=40)
    first = {t: [row.index(t) if t in row else 40 for row in free] for t in range(len(VOCAB))}
    stop = max(first, key=lambda t: len(set(first[t])))
    assert len(set(first[stop])) >= 4
    rotary = "position_ids" not in {i.name for i in pair[0].session.inputs}
    stopping = load(artifact(tmp_path / "a", "shared", eos=(998, stop), rotary=rotary))
    got = stopping.generate_ids(ids, mask, max_new_tokens=40)
    assert got == [row[:n] for row, n in zip(free, first[stop], strict=True)]


def test_the_context_stops_each_row_where_it_is_full(tmp_path):
    pair = [load(artifact(tmp_path / n, n, context=70)) for n in ("shared", "concat")]
    arrays = padded([PROMPTS[0], " ".join(WORDS * 2)[: len(" ".join(WORDS))], "a"])
    got, want = (g.generate_ids(*arrays, max_new_tokens=99) for g in pair)
    assert got == want
    assert [len(g) for g in got] == [70 - n for n in arrays[1].sum(1)]
    with pytest.raises(errors.InputError, match="leaves no room"):
        pair[0].generate(" ".join(WORDS * 3))


def test_next_word(pair):
    shared, concat = pair
    for prompt in PROMPTS:
        got, want = (g.next_word(prompt, k=4) for g in (shared, concat))
        assert [w["id"] for w in got] == [w["id"] for w in want]
        probabilities = [[w["probability"] for w in words] for words in (got, want)]
        np.testing.assert_allclose(*probabilities, rtol=1e-4)


def test_the_cache_is_one_buffer_a_layer_and_part(shared, allocated, monkeypatch):
    bound, bind = [], shared.session.bind
    monkeypatch.setattr(
        shared.session, "bind", lambda *a, **k: bound.append(bind(*a, **k)) or bound[-1]
    )
    shared.generate(PROMPTS, max_new_tokens=30)
    cache = cells(allocated)
    assert [b.shape for b in cache] == [(5, KV_HEADS, 64, DIM)] * 2 * LAYERS
    assert len({b.pointer for b in cache}) == 2 * LAYERS
    for binding in bound:
        for name in NAMES:
            past, present = (binding.bound(f"{n}.{name}") for n in ("past_key_values", "present"))
            assert past.pointer == present.pointer
    assert len(bound) == 2  # the prompts, and every step after them


def test_buffers_are_kept_from_call_to_call(shared, allocated):
    want = ids_after(shared, PROMPTS[:4], 30)
    first = len(allocated)
    assert ids_after(shared, PROMPTS[:4], 30) == want
    assert len(allocated) == first
    single = ids_after(shared, PROMPTS[:1], 30)  # a batch of another size
    assert single == want[:1]
    second = len(allocated)
    assert second > first
    assert ids_after(shared, PROMPTS[:4], 8) == [w[:8] for w in want]
    assert ids_after(shared, PROMPTS[:1], 30) == single
    assert len(allocated) == second
    ids_after(shared, PROMPTS[:1], 100)  # longer: the next power of two
    assert cells(allocated)[-1].shape == (1, KV_HEADS, 128, DIM)
    ids_after(shared, PROMPTS[:1], 150)  # and no more than the context
    assert cells(allocated)[-1].shape == (1, KV_HEADS, 200, DIM)
    third = len(allocated)
    assert ids_after(shared, PROMPTS[:1], 30) == single
    assert len(allocated) == third


def test_what_lies_idle_is_bounded(shared, allocated):
    for rows in range(1, 6):
        shared.generate(PROMPTS[:rows], max_new_tokens=4)
    before = len(allocated)
    for rows in (5, 4):  # 5 + 4 + 1 rows are no more than twice 5, with 3 they would be
        shared.generate(PROMPTS[:rows], max_new_tokens=4)
    assert len(allocated) == before
    shared.generate(PROMPTS[:3], max_new_tokens=4)
    assert len(allocated) > before


def test_a_call_that_fails_gives_its_buffers_back(shared, allocated):
    want = shared.generate_ids(np.array([[7, 8, 9]]), max_new_tokens=5)
    before = len(allocated)
    with pytest.raises(errors.InputError):
        shared.generate_ids(np.array([[7, 10**6, 9]]), max_new_tokens=5)
    with pytest.raises(errors.InputError, match="takes int64, and got int32"):
        shared.generate_ids(np.array([[7, 8, 9]], np.int32), max_new_tokens=5)
    assert shared.generate_ids(np.array([[7, 8, 9]]), max_new_tokens=5) == want
    assert len(allocated) == before


def test_two_threads_on_one_session(shared):
    want = shared.generate(PROMPTS, max_new_tokens=60)
    got: dict[int, list[str]] = {}
    start = threading.Barrier(2)

    def work(n: int) -> None:
        start.wait()
        for _ in range(3):
            got[n] = shared.generate(PROMPTS[n:] + PROMPTS[:n], max_new_tokens=60)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert got == {n: want[n:] + want[:n] for n in range(2)}


def test_no_memory_says_how_much_and_lets_go_of_the_rest(shared, monkeypatch):
    want = shared.generate("a", max_new_tokens=4)
    make, full = shared.session.buffer, [True]

    def buffer(shape, dtype, device=None):
        if len(shape) == 4 and full.pop():
            full.append(forever)
            raise errors.OnnxpressError("there is no memory for 0.1 MiB on cpu")
        full.append(forever)
        return make(shape, dtype, device)

    forever = False
    monkeypatch.setattr(shared.session, "buffer", buffer)
    assert shared.generate(["a", "a"], max_new_tokens=4) == want * 2  # at the second attempt
    full[:], forever = [True], True
    with pytest.raises(errors.OnnxpressError) as e:
        shared.generate(["a"] * 3, max_new_tokens=4)
    assert f"3 rows of 64 tokens takes {3 * 2 * 64 * 16 * 4 * 4:,} bytes" in e.value.what
    assert "batch_size" in str(e.value.hint)


def test_a_window_has_room(tmp_path):
    generator = load(artifact(tmp_path / "a", "shared", context=40, window=90))
    made, make = [], generator.session.buffer
    generator.session.buffer = lambda *a, **k: made.append(make(*a, **k)) or made[-1]
    generator.generate("a", max_new_tokens=3)
    assert {b.shape for b in cells(made)} == {(1, KV_HEADS, 90, DIM)}


def test_a_graph_that_chooses_the_token(shared, tmp_path, monkeypatch):
    chooser = load(artifact(tmp_path / "a", "shared", token=True))
    want, asked, bind = shared.generate(PROMPTS, max_new_tokens=30), [], chooser.session.bind
    monkeypatch.setattr(
        chooser.session, "bind", lambda names, **k: asked.append(names[0]) or bind(names, **k)
    )
    assert chooser.generate(PROMPTS, max_new_tokens=30) == want
    assert set(asked) == {"next_token"}  # no logits on the host
    assert chooser.next_word("the cat") == shared.next_word("the cat")


def test_half_precision(shared, tmp_path):
    generator = load(artifact(tmp_path / "a", "shared", dtype="float16"))
    assert {w["id"] for w in generator.next_word("the cat", 3)} == {
        w["id"] for w in shared.next_word("the cat", 3)
    }
    single = [ids_after(generator, [p], 12)[0] for p in PROMPTS]
    assert ids_after(generator, PROMPTS, 12) == single
    everything = generator.next_word("a", k=len(VOCAB))
    assert sum(w["probability"] for w in everything) == pytest.approx(1, abs=1e-12)


def test_on_a_device_the_last_token_runs_once_more(shared, monkeypatch):
    """There the logits of all of the prompts stay where they are: those of a step are read."""
    want, words = ids_after(shared, PROMPTS, 20), shared.next_word("the cat sat")
    take, asked, bind = shared._shared._take, [], shared.session.bind

    def far(*how):
        lane = take(*how)
        lane.on_host = False
        return lane

    monkeypatch.setattr(shared._shared, "_take", far)
    monkeypatch.setattr(
        shared.session, "bind", lambda names, **k: asked.append(names[0]) or bind(names, **k)
    )
    assert ids_after(shared, PROMPTS, 20) == want
    assert set(asked) == {"present.0.key"}
    got = shared.next_word("the cat sat")
    assert [w["id"] for w in got] == [w["id"] for w in words]
    assert ids_after(shared, ["a", "who"], 9) == [
        ids_after(shared, [p], 9)[0] for p in ("a", "who")
    ]


def test_a_captured_step_tells_the_largest_total(pair, monkeypatch):
    """What a CUDA graph has read at its capture does not change: the total must serve all steps."""
    generator, want = pair[0], ids_after(pair[1], PROMPTS, 20)
    lane = generator._shared._take(len(PROMPTS), 40)
    generator._shared._give_back(lane)
    monkeypatch.setattr(lane, "_captured", True)
    assert ids_after(generator, PROMPTS, 20) == want
    assert lane._feeds["total_sequence_length"].numpy() == [lane.capacity]


def test_on_the_null_gpu(tmp_path):
    """Every node on CUDA, no copy inside of the graph, and nothing that a capture refuses."""
    paths = [artifact(tmp_path / str(t), "shared", token=t, dtype="float16") for t in (False, True)]
    said = on_null_gpu(
        """
        import json, sys
        from onnxpress.runtime import Generator, Session
        said = []
        for path in sys.argv[1:]:
            for graph in (False, True):
                g = Generator(Session(path, provider="cuda", cuda_graph=graph))
                placement = g.session.placement()
                made, buffer = [], g.session.buffer
                g.session.buffer = lambda *a, **k: made.append(buffer(*a, **k)) or made[-1]
                texts = ["the cat sat", "a"]
                rows = [len(g.generate(texts[:n], max_new_tokens=6)) for n in (1, 2, 2, 1)]
                places = sorted({b.device for b in made if len(b.shape) == 4})
                names = {n.provider for n in placement.nodes}
                said.append([placement.memcpy, len(names), rows, places])
        print(json.dumps(said))
        """,
        *paths,
        # Its cuDNN has no attention; the CUDA provider's own kernels are there.
        env={"ORT_ENABLE_CUDNN_FLASH_ATTENTION": "0"},
    )
    assert said == [[0, 1, [1, 2, 2, 1], ["cpu", "cuda:0"]]] * 4


def test_captured_steps_serve_any_prompts_on_the_null_gpu(tmp_path):
    """Prompts of many lengths leave room for the steps' graphs, and each thread has its own."""
    said = on_null_gpu(
        """
        import json, sys, threading
        import numpy as np
        from onnxpress.runtime import Generator, Session
        said = []
        for path in sys.argv[1:]:
            g = Generator(Session(path, provider="cuda", cuda_graph=True))
            texts = [" ".join(["cat"] * n) for n in range(1, 21)]
            alone = [len(g.generate_ids(*g_ids, max_new_tokens=6)[0]) for g_ids in (
                (np.full((1, n), 5),) for n in range(1, 21))]
            rows = [len(g.generate([t], max_new_tokens=6)) for t in texts]
            got, errors, start = [], [], threading.Barrier(2)
            def work():
                start.wait()
                try:
                    for t in texts[:8]:
                        got.append(len(g.generate([t, "a"], max_new_tokens=6)))
                except Exception as e:
                    errors.append(str(e))
            threads = [threading.Thread(target=work) for _ in range(2)]
            for t in threads: t.start()
            for t in threads: t.join()
            said.append([g.session.cuda_graph, alone, rows, got, errors])
        print(json.dumps(said))
        """,
        *[artifact(tmp_path / str(t), "shared", token=t, dtype="float16") for t in (False, True)],
        env={"ORT_ENABLE_CUDNN_FLASH_ATTENTION": "0"},
    )
    assert said == [[True, [6] * 20, [1] * 20, [2] * 16, []]] * 2
