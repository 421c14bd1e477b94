"""Sources in Hugging Face's form: a directory (safetensors, GGUF) or a hub id.

The architectures of models/ are captured from models/: their graphs are smaller, and neither
loading nor exporting them needs transformers. Every other one is built by transformers and
captured from a thin wrapper that takes and returns what the task needs.
"""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import nn

from .. import models
from ..artifact import sha256
from ..errors import MissingPackage, SourceError
from ..models import checkpoint
from . import settings as task_settings
from .capture import OPSET, quiet
from .source import Source, clone
from .wrappers import Text, wrap

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

_TOKEN_DIMS = ("batch", "sequence")
_DIMS: dict[str, tuple[str | None, ...]] = {
    "input_ids": _TOKEN_DIMS,
    "attention_mask": _TOKEN_DIMS,
    "token_type_ids": _TOKEN_DIMS,
    "position_ids": _TOKEN_DIMS,
    "decoder_input_ids": ("batch", "decoder_sequence"),
    "pixel_values": ("batch",),
}


def looks_like_hub_id(spec: str) -> bool:
    """Whether `spec` has the form owner/name."""
    return bool(_HUB_ID.fullmatch(spec))


def download(spec: str) -> Path:
    """The local copy of a hub's model, fetched if need be.

    Raises:
        SourceError: It cannot be fetched.
        MissingPackage: huggingface_hub is not installed.
    """
    if importlib.util.find_spec("huggingface_hub") is None:
        raise MissingPackage(
            f"{spec} is no directory here, and fetching it from the hub needs huggingface_hub",
            hint="pip install 'onnxpress[hf]'",
        )
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.txt", "*.model", "*.gguf"]
    try:
        return Path(snapshot_download(spec, allow_patterns=wanted))
    except Exception as e:  # the hub's client raises its own, requests' and OS errors alike
        raise SourceError(
            f"there is no directory {spec!r}, and the hub did not give it: {type(e).__name__}",
            hint="name a local directory, or check the id and the network",
        ) from e


def build(spec: str, path: Path, task: str | None, *, trust_pickle: bool = False) -> Source:
    """Read a model's directory (or one .gguf file) and build the module for its task.

    Raises:
        SourceError: No config or weights, or an architecture that cannot do the task.
        MissingPackage: The architecture needs transformers.
    """
    config = checkpoint.read_config(path)
    task = task or task_settings.find_task(path, config)
    weights = checkpoint.weight_files(path)
    module, example, note = _module(path, config, task, trust_pickle=trust_pickle)
    source = Source(
        spec=spec,
        kind="huggingface",
        task=task,
        module=module.eval(),
        kwargs=clone(example),
        weights_sha256=sha256(*weights),
        notes=[note],
    )
    if isinstance(module, Text):
        source.fallback = lambda: _by_transformers(module, source.kwargs)
    _name_dims(source)
    source.highs = _highs(config, example)
    limit = task_settings.position_limit(config)
    if limit:
        source.limits = dict.fromkeys(("sequence", "past_sequence", "decoder_sequence"), limit)
    source.files["config.json"] = _json(config)
    if task != "tensors":
        source.files["tokenizer.json"] = _tokenizer(path, source)
    source.settings = task_settings.settings(task, path, config)
    if task == "generate":
        source.kv = _kv(example)
        source.settings |= _chat(path)
    return source


def _module(
    path: Path, config: dict[str, Any], task: str, *, trust_pickle: bool
) -> tuple[nn.Module, dict[str, Any], str]:
    """The module, inputs to trace it with, and a note on where it came from."""
    kind = str(config.get("model_type"))
    _, tasks = models.MODEL_TYPES.get(kind, ("", ()))
    refusal = None
    if task in tasks:
        try:
            module, example, _ = models.from_checkpoint(path, task=task, trust_pickle=trust_pickle)
            return module, example, f"captured from models/ ({kind})"
        except SourceError as e:  # a setting that models/ does not have; transformers may
            if importlib.util.find_spec("transformers") is None:
                raise
            refusal = e
    try:
        module, example = _from_transformers(path, config, task, trust_pickle=trust_pickle)
    except SourceError as e:
        raise refusal or e from None
    note = f"captured from transformers ({type(module).__name__})"
    return module, example, f"{note}: {refusal.what}" if refusal else note


def _from_transformers(
    path: Path, config: dict[str, Any], task: str, *, trust_pickle: bool
) -> tuple[nn.Module, dict[str, Any]]:
    if importlib.util.find_spec("transformers") is None:
        raise MissingPackage(
            f"a {config.get('model_type')} model for {task} is built by transformers",
            hint="pip install 'onnxpress[hf]'",
        )
    import transformers

    names = [p.name for p in checkpoint.weight_files(path)]
    if not trust_pickle and any(n.endswith((".bin", ".pt", ".pth")) for n in names):
        raise SourceError(
            "the weights are pickled, and a pickle can run code of whoever wrote it",
            where=str(path),
            hint="convert them to safetensors, or add --trust-pickle if you trust their author",
        )
    architecture = next(iter(config.get("architectures") or []), "")
    auto = {
        "embed": "AutoModelForTextEncoding" if config.get("is_encoder_decoder") else "AutoModel",
        "classify": "AutoModelForSequenceClassification",
        "answer": "AutoModelForQuestionAnswering",
        "generate": "AutoModelForCausalLM",
        "translate": "AutoModelForSeq2SeqLM",
        "tensors": architecture if hasattr(transformers, architecture) else "AutoModel",
    }[task]
    options: dict[str, Any] = {"dtype": torch.float32}
    where = str(path)
    if path.suffix == ".gguf":
        where, options["gguf_file"] = str(path.parent), path.name
    with quiet():
        try:
            loaded, info = getattr(transformers, auto).from_pretrained(
                where, output_loading_info=True, **options
            )
        except Exception as e:  # transformers raises every kind for what it cannot read
            raise SourceError(
                f"transformers cannot load it as {auto}: {str(e).splitlines()[0]}", where=where
            ) from e
    missing = sorted(info["missing_keys"])
    if missing:  # transformers would fill them with random numbers, and both sides would agree
        raise SourceError(
            f"the checkpoint has no weights for {', '.join(missing[:4])}"
            + (f" and {len(missing) - 4} more" if len(missing) > 4 else ""),
            where=where,
            hint=f"it was not trained for {task}: leave --task out",
        )
    if hasattr(loaded, "set_experts_implementation"):
        loaded.set_experts_implementation("batched_mm")  # the default is no op of ONNX's
    return wrap(loaded.eval(), task)


def _by_transformers(module: Text, example: dict[str, Any]) -> ir.Model:
    """The graph by transformers.exporters, which patches models that torch.export cannot take.

    The second choice: where both work, its graphs were larger (bert 98 nodes against 67, vit 74
    against 63, t5 102 against 91, roberta 106 against 92), and it computes every output.
    """
    import transformers.exporters

    theirs: Any = transformers.exporters
    config = theirs.OnnxConfig(dynamic=True, opset_version=OPSET)
    graph: ir.Model = theirs.OnnxExporter().export_program(module.model, dict(example), config)[0]
    outputs = {v.name: v for v in graph.graph.outputs}
    inputs = {v.name: v for v in graph.graph.inputs}
    graph.graph.outputs[:] = [outputs[name] for name in module.names]
    graph.graph.inputs[:] = [inputs[name] for name in example]
    return graph


def _name_dims(source: Source) -> None:
    from .names import flatten_inputs

    for name, _ in flatten_inputs(source):
        if name.startswith("past_key_values."):
            source.dims[name] = ("batch", None, "past_sequence", None)
        elif name == "attention_mask" and "past_key_values" in source.kwargs:
            source.dims[name] = ("batch", "past_sequence + sequence")
        elif name in _DIMS:
            source.dims[name] = _DIMS[name]


def _highs(config: dict[str, Any], example: dict[str, Any]) -> dict[str, int]:
    text = {**config, **(config.get("text_config") or {})}
    vocab = int(text.get("vocab_size") or 0)
    highs: dict[str, int] = {
        n: vocab for n in ("input_ids", "decoder_input_ids") if n in example and vocab
    }
    if "token_type_ids" in example:
        highs["token_type_ids"] = int(config.get("type_vocab_size") or 1)
    return highs


def _kv(example: dict[str, Any]) -> dict[str, Any]:
    past = example["past_key_values"]
    _, heads, _, head_dim = past[0]["key"].shape
    return {
        "layers": len(past),
        "kv_heads": heads,
        "head_dim": head_dim,
        "dtype": "float32",
        "past": "past_key_values.{layer}.{part}",
        "present": "present.{layer}.{part}",
    }


def _tokenizer(path: Path, source: Source) -> bytes:
    """The text of tokenizer.json: the model's own, or converted by transformers."""
    own = path / "tokenizer.json"
    if own.is_file():
        return own.read_bytes()
    if importlib.util.find_spec("transformers") is None:
        raise MissingPackage(
            "the model has no tokenizer.json; transformers can make one of what it has",
            where=str(path),
            hint="pip install 'onnxpress[hf]'",
        )
    return str(_load_tokenizer(path).backend_tokenizer.to_str()).encode()


def _load_tokenizer(path: Path) -> Any:
    from transformers import AutoTokenizer

    gguf = [p for p in checkpoint.weight_files(path) if p.suffix == ".gguf"]
    options = {"gguf_file": gguf[0].name} if gguf else {}
    where = gguf[0].parent if gguf else path
    with quiet():
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(where), **options)
        except Exception as e:  # transformers raises every kind for what it cannot read
            raise SourceError(
                f"the model's tokenizer cannot be read: {str(e).splitlines()[0]}",
                where=str(path),
                hint="add its tokenizer files, or export with --task tensors",
            ) from e
    # Of a directory without a vocabulary it makes one that knows no word.
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise SourceError(
            "the model has no tokenizer",
            where=str(path),
            hint="add its tokenizer.json, or export with --task tensors",
        )
    return tokenizer


def _chat(path: Path) -> dict[str, str]:
    """One turn of a user as text, by the model's own chat template, where it has one."""
    if importlib.util.find_spec("transformers") is None:
        return {}
    tokenizer = _load_tokenizer(path)
    if not getattr(tokenizer, "chat_template", None):
        return {}
    turn = [{"role": "user", "content": "{prompt}"}]
    text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    return {"chat": text} if "{prompt}" in text else {}


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
