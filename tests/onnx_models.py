"""Tiny artifacts made by hand for the runtime's tests: ONNX text, random weights, no torch.

Each function publishes one artifact directory and gives back its path. The graphs are the
smallest that still depend on what a test wants to see break: on the attention mask, on the
cache, on the positions.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import tokenizers
from onnxpress import artifact
from onnxpress.artifact import Manifest, TensorSpec
from tokenizers import models, pre_tokenizers, processors

TEXT = (
    "the cat sat on mat dog ran to house red blue fast slow who what where is in a an of and"
    " garden bird sings loud soft river runs under old bridge near town"
)
WORDS = TEXT.split()
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "<eos>"]
VOCAB = SPECIAL + WORDS
PAD, CLS, SEP, EOS = 0, 2, 3, 4


def tokenizer(*, template: bool = True) -> str:
    """tokenizer.json of a word tokenizer; with `template`, texts get [CLS] and [SEP]."""
    t = tokenizers.Tokenizer(
        models.WordLevel({w: i for i, w in enumerate(VOCAB)}, unk_token="[UNK]")
    )
    t.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    t.add_special_tokens(SPECIAL)
    if template:
        t.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)],
        )
    return t.to_str()


def graph(
    text: str,
    weights: dict[str, np.ndarray] | None = None,
    shapes: dict[str, list[int | str]] | None = None,
    *,
    opset: int = 23,
) -> ir.Model:
    """A model from ONNX text; inputs named in `weights` become initializers.

    `shapes` replaces shapes of inputs and outputs, for dimensions that ONNX text cannot spell.
    """
    model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : {opset}]> {text}')
    for value in [v for v in model.graph.inputs if v.name in (weights or {})]:
        model.graph.inputs.remove(value)
        value.const_value = ir.tensor((weights or {})[str(value.name)], name=value.name)
        model.graph.register_initializer(value)
    for value in [*model.graph.inputs, *model.graph.outputs]:
        if value.name in (shapes or {}):
            value.shape = ir.Shape((shapes or {})[str(value.name)])
    return model


def specs(values: Any) -> tuple[TensorSpec, ...]:
    """Signature entries of graph inputs or outputs."""
    return tuple(
        TensorSpec(
            v.name,
            v.dtype.numpy().name,
            tuple(d if isinstance(d, int) else str(d.value) for d in v.shape),
        )
        for v in values
    )


def publish(
    path: Path,
    model: ir.Model,
    *,
    task: str = "tensors",
    settings: dict[str, Any] | None = None,
    kv: dict[str, Any] | None = None,
    tokenizer_json: str | None = None,
    runtime: dict[str, Any] | None = None,
) -> Path:
    """Write `model` as an artifact directory."""
    with artifact.stage(path) as staging:
        artifact.save_model(model, staging.path)
        if tokenizer_json:
            staging.write("tokenizer.json", tokenizer_json)
        extra = {"runtime": runtime} if runtime else {}
        staging.publish(
            Manifest(
                task=task,
                source={"spec": "tests", "kind": "hand", "weights_sha256": ""},
                target={"provider": "cpu", "precision": "fp32", "opset": 23},
                inputs=specs(model.graph.inputs),
                outputs=specs(model.graph.outputs),
                settings=settings or {},
                kv=kv,
                **extra,
            )
        )
    return path


def edit_manifest(path: Path, **fields: Any) -> None:
    """Change fields of manifest.json and hash it again, as docs/artifact.md says others may."""
    raw = {**json.loads((path / "manifest.json").read_text()), **fields}
    write_manifest(path, raw)


def write_manifest(path: Path, raw: dict[str, Any]) -> None:
    """Write manifest.json with the sha256 that it should have."""
    rest = {name: value for name, value in raw.items() if name != "sha256"}
    text = json.dumps(rest, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    digest = hashlib.sha256(text.encode()).hexdigest()
    (path / "manifest.json").write_text(json.dumps({**rest, "sha256": digest}))


def normal(seed: int, *shape: int) -> np.ndarray:
    """Random float32 weights."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def add_model() -> ir.Model:
    """Two inputs, two outputs: y = x + x; z = m + m."""
    return graph(
        """g (float[batch,4] x, int64[batch,seq] m) => (float[batch,4] y, int64[batch,seq] z)
        { y = Add(x, x)  z = Add(m, m) }"""
    )


def cache_model() -> ir.Model:
    """An input whose dimension is an expression over those of the others."""
    return graph(
        """g (int64[batch,s] ids, int64[batch,t] mask, float[batch,p] past)
        => (int64[batch,s] a, int64[batch,t] b, float[batch,p] c)
        { a = Identity(ids)  b = Identity(mask)  c = Identity(past) }""",
        shapes={"mask": ["batch", "p + s"]},
    )


HIDDEN = """
  emb = Gather(table, input_ids)
  mask = Cast<to=1>(attention_mask)
  two = Constant<value_ints=[2]>()
  one = Constant<value_ints=[1]>()
  mask3 = Unsqueeze(mask, two)
  masked = Mul(emb, mask3)
  total = ReduceSum<keepdims=1>(masked, one)
  count = ReduceSum<keepdims=1>(mask3, one)
  mean = Div(total, count)
"""


def embedder(path: Path, **settings: Any) -> Path:
    """last_hidden_state = embedding + the masked mean of the text's embeddings."""
    settings = {
        "pooling": "mean",
        "normalize": True,
        "max_length": 12,
        "pad_token_id": PAD,
        **settings,
    }
    model = graph(
        f"""g (int64[batch,sequence] input_ids, int64[batch,sequence] attention_mask,
        float[{len(VOCAB)},8] table) => (float[batch,sequence,8] last_hidden_state)
        {{ {HIDDEN} last_hidden_state = Add(emb, mean) }}""",
        {"table": normal(1, len(VOCAB), 8)},
    )
    return publish(path, model, task="embed", settings=settings, tokenizer_json=tokenizer())


def sentence_embedder(path: Path) -> Path:
    """A graph that pools by itself: sentence_embedding = the masked mean."""
    model = graph(
        f"""g (int64[batch,sequence] input_ids, int64[batch,sequence] attention_mask,
        float[{len(VOCAB)},8] table) => (float[batch,8] sentence_embedding)
        {{ {HIDDEN} sentence_embedding = Squeeze(mean, one) }}""",
        {"table": normal(1, len(VOCAB), 8)},
    )
    settings = {"pooling": None, "normalize": False, "max_length": 12, "pad_token_id": PAD}
    return publish(path, model, task="embed", settings=settings, tokenizer_json=tokenizer())


def classifier(path: Path, **settings: Any) -> Path:
    """logits = masked mean @ head."""
    settings = {
        "labels": ["good", "bad", "ugly"],
        "problem": "single",
        "max_length": 12,
        "pad_token_id": PAD,
        **settings,
    }
    model = graph(
        f"""g (int64[batch,sequence] input_ids, int64[batch,sequence] attention_mask,
        float[{len(VOCAB)},8] table, float[8,3] head) => (float[batch,3] logits)
        {{ {HIDDEN} flat = Squeeze(mean, one)  logits = MatMul(flat, head) }}""",
        {"table": normal(1, len(VOCAB), 8), "head": normal(2, 8, 3)},
    )
    return publish(path, model, task="classify", settings=settings, tokenizer_json=tokenizer())


def answerer(path: Path, *, start: str, end: str, max_length: int = 16) -> Path:
    """An answer starts at the word `start` and ends at the word `end`, wherever they stand."""
    tables = {name: np.zeros(len(VOCAB), np.float32) for name in ("first", "last")}
    tables["first"][VOCAB.index(start)] = 6
    tables["last"][VOCAB.index(end)] = 6
    for table in tables.values():
        table[CLS] = 3  # windows without the answer point to [CLS]
    model = graph(
        f"""g (int64[batch,sequence] input_ids, int64[batch,sequence] attention_mask,
        int64[batch,sequence] token_type_ids, float[{len(VOCAB)}] first, float[{len(VOCAB)}] last)
        => (float[batch,sequence] start_logits, float[batch,sequence] end_logits)
        {{ start_logits = Gather(first, input_ids)  end_logits = Gather(last, input_ids) }}""",
        tables,
    )
    settings = {"max_length": max_length, "pad_token_id": PAD, "stride": 4}
    return publish(path, model, task="answer", settings=settings, tokenizer_json=tokenizer())


def decoder(
    *, layers: int = 2, heads: int = 2, head_dim: int = 8, context: int = 64, vocab: int = 0
) -> ir.Model:
    """A causal decoder with learned positions: attention only, by the kv contract of generate."""
    vocab, d = vocab or len(VOCAB), heads * head_dim
    weights = {"tok": normal(3, vocab, d), "pos": normal(4, context, d), "out": normal(5, d, vocab)}
    kv_in, kv_out, body = [], [], []
    shapes: dict[str, list[int | str]] = {
        "attention_mask": ["batch", "past_sequence + sequence"],
    }
    for i in range(layers):
        for j, n in enumerate("qkvo"):
            weights[f"w{n}{i}"] = normal(10 + 4 * i + j, d, d) / np.sqrt(d).astype(np.float32)
        for part in ("key", "value"):
            kv_in.append(f'float[b,{heads},p,{head_dim}] "past_key_values.{i}.{part}"')
            kv_out.append(f'float[b,{heads},t,{head_dim}] "present.{i}.{part}"')
            shapes[f"past_key_values.{i}.{part}"] = ["batch", heads, "past_sequence", head_dim]
            shapes[f"present.{i}.{part}"] = [
                "batch",
                heads,
                "past_sequence + sequence",
                head_dim,
            ]
        body.append(f"""
          q{i} = MatMul(x{i}, wq{i})  k{i} = MatMul(x{i}, wk{i})  v{i} = MatMul(x{i}, wv{i})
          a{i}, "present.{i}.key", "present.{i}.value" =
            Attention<q_num_heads={heads}, kv_num_heads={heads}>(q{i}, k{i}, v{i}, bias,
              "past_key_values.{i}.key", "past_key_values.{i}.value")
          o{i} = MatMul(a{i}, wo{i})  x{i + 1} = Add(x{i}, o{i})""")
    inits = ", ".join(f"float[{','.join(map(str, w.shape))}] {n}" for n, w in weights.items())
    text = f"""g (int64[batch,sequence] input_ids, int64[b,t] attention_mask,
      int64[batch,sequence] position_ids, {", ".join(kv_in)}, {inits})
      => (float[batch,sequence,{vocab}] logits, {", ".join(kv_out)}) {{
      zero = Constant<value_int=0>()  one = Constant<value_int=1>()
      axis1 = Constant<value_ints=[1]>()  axes12 = Constant<value_ints=[1, 2]>()
      tk = Gather(tok, input_ids)  ps = Gather(pos, position_ids)  x0 = Add(tk, ps)
      st = Shape(attention_mask)  t = Gather(st, one)
      ss = Shape(input_ids)  s = Gather(ss, one)  past = Sub(t, s)
      keys = Range(zero, t, one)  queries = Range(past, t, one)  column = Unsqueeze(queries, axis1)
      causal = LessOrEqual(keys, column)
      real = Cast<to=9>(attention_mask)  real4 = Unsqueeze(real, axes12)
      seen = And(causal, real4)
      yes = Constant<value_float=0.0>()  no = Constant<value_float=-1e9>()
      bias = Where(seen, yes, no)
      {"".join(body)}
      logits = MatMul(x{layers}, out) }}"""
    return graph(text, weights, shapes)


def generator(path: Path, *, context: int = 64, eos: tuple[int, ...] = (EOS,), **size: int) -> Path:
    """A generate artifact around `decoder`."""
    layers, heads, head_dim = (
        size.get(n, d) for n, d in (("layers", 2), ("heads", 2), ("head_dim", 8))
    )
    kv = {
        "layers": layers,
        "kv_heads": heads,
        "head_dim": head_dim,
        "dtype": "float32",
        "past": "past_key_values.{layer}.{part}",
        "present": "present.{layer}.{part}",
    }
    settings = {
        "eos_token_ids": list(eos),
        "pad_token_id": PAD,
        "bos_token_id": None,
        "context_length": context,
        "max_length": context,
        "chat": "who {prompt} is",
    }
    return publish(
        path,
        decoder(context=context, **size),
        task="generate",
        settings=settings,
        kv=kv,
        tokenizer_json=tokenizer(template=False),
    )


def translator(path: Path, **settings: Any) -> Path:
    """logits = a table by the last target word + what the whole source says."""
    n = len(VOCAB)
    settings = {
        "decoder_start_token_id": PAD,
        "eos_token_ids": [EOS],
        "pad_token_id": PAD,
        "max_length": 12,
        "suppress_token_ids": [PAD],
        **settings,
    }
    model = graph(
        f"""g (int64[batch,sequence] input_ids, int64[batch,sequence] attention_mask,
        int64[batch,target] decoder_input_ids, float[{n},8] table, float[8,{n}] head,
        float[{n},{n}] words) => (float[batch,target,{n}] logits)
        {{ {HIDDEN} source = MatMul(mean, head)  word = Gather(words, decoder_input_ids)
           logits = Add(word, source) }}""",
        {
            "table": normal(1, n, 8),
            "head": normal(6, 8, n),
            # A pull to the padding word: a translator that does not suppress it says nothing else.
            "words": normal(7, n, n) + 20 * np.eye(n, dtype=np.float32)[PAD],
        },
    )
    return publish(path, model, task="translate", settings=settings, tokenizer_json=tokenizer())
