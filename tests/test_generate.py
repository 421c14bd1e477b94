"""Generation: the cache, the padding and the stops must not change what is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from onnxpress import errors
from onnxpress.runtime import Generator, Session, load

from . import onnx_models
from .onnx_models import EOS, PAD, VOCAB, WORDS

PROMPTS = ["the cat sat on", "a", "red house and blue", "who", "the dog ran to an old bridge near"]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    return onnx_models.generator(tmp_path_factory.mktemp("generator") / "a", eos=(999,))


@pytest.fixture(scope="module")
def generator(artifact):
    return load(artifact)


def ids_of(text: str) -> list[int]:
    return [VOCAB.index(w) for w in text.split()]


def logits_of(generator, ids: list[int]) -> np.ndarray:
    """The last logits of one run over all the ids, with an empty cache."""
    n = len(ids)
    empty = np.zeros((1, 2, 0, 8), np.float32)
    feeds = {
        "input_ids": np.array([ids]),
        "attention_mask": np.ones((1, n), np.int64),
        "position_ids": np.arange(n)[None],
        **{f"past_key_values.{i}.{p}": empty for i in range(2) for p in ("key", "value")},
    }
    return generator.session.run(feeds, ["logits"])["logits"][0, -1]


def greedy(generator, ids: list[int], steps: int) -> list[int]:
    """Greedy decoding without a cache: everything again for every token."""
    start = len(ids)
    for _ in range(steps):
        ids = [*ids, int(logits_of(generator, ids).argmax())]
    return ids[start:]


def test_with_the_cache_equals_without(generator):
    for prompt in PROMPTS:
        got = generator.generate_ids(np.array([ids_of(prompt)]), max_new_tokens=20)
        assert got == [greedy(generator, ids_of(prompt), 20)]
        assert len(set(got[0])) > 2  # the test sees something


def test_batched_and_padded_equals_single(generator):
    single = [generator.generate(p, max_new_tokens=16)[0] for p in PROMPTS]
    assert len(set(single)) == len(single)
    for batch_size in (2, 8):
        assert generator.generate(PROMPTS, max_new_tokens=16, batch_size=batch_size) == single
    assert generator.generate([]) == []


def test_text_is_the_continuation_only(generator):
    want = " ".join(VOCAB[i] for i in greedy(generator, ids_of("a"), 6) if i > EOS)
    assert generator.generate("a", max_new_tokens=6)[0].split() == want.split()
    assert generator.generate("a", max_new_tokens=0) == [""]
    with pytest.raises(errors.InputError, match="max_new_tokens"):
        generator.generate("a", max_new_tokens=-1)


def test_rows_stop_at_the_end_of_text_by_themselves(artifact, tmp_path):
    free = load(artifact)
    want = {p: greedy(free, ids_of(p), 16) for p in PROMPTS}
    # A token that ends some rows early, and others late or never.
    stop = max(
        range(len(VOCAB)), key=lambda i: len({w.index(i) if i in w else 99 for w in want.values()})
    )
    generator = load(onnx_models.generator(tmp_path / "a", eos=(998, stop)))
    left = [ids_of(p) for p in PROMPTS]
    width = max(map(len, left))
    ids = np.array([[PAD] * (width - len(i)) + i for i in left])
    mask = np.array([[0] * (width - len(i)) + [1] * len(i) for i in left])
    got = generator.generate_ids(ids, mask, max_new_tokens=16)
    cut = [w[: w.index(stop)] if stop in w else w for w in want.values()]
    assert got == cut
    assert len({len(c) for c in cut}) > 1


def test_the_context_stops_each_row_where_it_is_full(tmp_path):
    generator = load(onnx_models.generator(tmp_path / "a", context=12, eos=(999,)))
    short, long = ids_of("the cat"), ids_of("the cat sat on the mat and a dog")
    ids = np.array([[PAD] * (len(long) - 2) + short, long])
    mask = np.array([[0] * (len(long) - 2) + [1, 1], [1] * len(long)])
    got = generator.generate_ids(ids, mask, max_new_tokens=50)
    assert [len(g) for g in got] == [10, 3]
    assert got == [greedy(generator, short, 10), greedy(generator, long, 3)]
    with pytest.raises(errors.InputError, match="has 12 tokens; the context of 12"):
        generator.generate(" ".join(WORDS[:12]))
    with pytest.raises(errors.InputError, match="context"):
        generator.next_word(" ".join(WORDS[:13]))


def test_next_word(generator):
    got = generator.next_word("the cat sat on", k=3)
    logits = logits_of(generator, ids_of("the cat sat on")).astype(np.float64)
    p = np.exp(logits) / np.exp(logits).sum()
    best = np.argsort(-p)[:3]
    assert [w["id"] for w in got] == best.tolist()
    assert [w["word"] for w in got] == [VOCAB[i] for i in best]
    np.testing.assert_allclose([w["probability"] for w in got], p[best], rtol=1e-9)
    everything = generator.next_word("a", k=10**6)
    assert len(everything) == len(VOCAB)
    assert sum(w["probability"] for w in everything) == pytest.approx(1, abs=1e-12)
    for prompt, k in ((["a"], 1), ("a", 0)):
        with pytest.raises(errors.InputError):
            generator.next_word(prompt, k)


def test_chat_puts_the_prompt_into_the_turn(generator, artifact, tmp_path):
    assert generator.generate("the cat", chat=True) == generator.generate("who the cat is")
    # A turn spells its special tokens out: the tokenizer's are not added on top.
    path = Path(shutil.copytree(artifact, tmp_path / "a"))
    (path / "tokenizer.json").write_text(onnx_models.tokenizer(template=True))
    special = Generator(Session(path))
    assert special.generate("the cat", chat=True) == generator.generate("the cat", chat=True)
    assert special.generate("the cat") != generator.generate("the cat")


def change(path, **settings) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["settings"] |= settings
    onnx_models.write_manifest(path, manifest)


def test_empty_prompts_and_no_chat(tmp_path):
    path = onnx_models.generator(tmp_path / "a", eos=(999,))
    with pytest.raises(errors.InputError, match="prompt 1 is empty"):
        load(path).generate(["a", ""])
    change(path, bos_token_id=VOCAB.index("the"), chat=None)
    generator = load(path)
    assert generator.generate("", max_new_tokens=4) == generator.generate("the", max_new_tokens=4)
    with pytest.raises(errors.UsageError, match="no chat turn"):
        generator.generate("a", chat=True)


@pytest.mark.parametrize(
    ("ids", "mask", "said"),
    [
        (np.zeros(3, np.int64), None, "must both be"),
        (np.zeros((1, 3), np.int64), np.ones((1, 2), np.int64), "must both be"),
        (np.zeros((1, 3), np.int64), np.array([[1, 1, 0]]), "padded on the left"),
        (np.zeros((2, 2), np.int64), np.array([[1, 1], [0, 0]]), "prompt 1 of the batch has no"),
        (np.zeros((1, 3), np.int32), None, "takes int64, and got int32"),
    ],
)
def test_generate_ids_refuses(generator, ids, mask, said):
    with pytest.raises(errors.InputError, match=said):
        generator.generate_ids(ids, mask)


def test_no_kv_in_the_manifest(artifact, tmp_path):
    path = onnx_models.generator(tmp_path / "a")
    onnx_models.edit_manifest(path, kv=None)
    with pytest.raises(errors.ArtifactError, match="`kv`"):
        load(path)
