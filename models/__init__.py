"""Transformers in PyTorch, one architecture a file, each read from top to bottom.

    encoder.py           BERT: embeddings, classification, answers       -> last_hidden_state, ...
    decoder.py           Llama: generation with a key/value cache        -> logits, present
    encoder_decoder.py   Attention Is All You Need, Marian: translation  -> logits
    recurrent.py         LSTM: sentiment classification                  -> logits
    checkpoint.py        safetensors, GGUF and pickles; config.json; strict loading

They are written to export cleanly: one Attention node an attention, one norm node a norm, one mask
a forward, no control flow on data.

    build("encoder-tiny")                        random weights, always the same ones
    example("encoder-tiny")                      the same, with inputs to trace it
    from_checkpoint(path, task="embed")          weights from disk

Importing this package does not import torch; calling any function but `names` and `handles` does.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import SourceError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["build", "example", "from_checkpoint", "handles", "names"]

# name -> (file, key in its SIZES); written out, so that `names` costs no import of torch.
NAMES = {
    f"{file.replace('_', '-')}-{size}": (file, size)
    for file, sizes in {
        "encoder": ("tiny", "minilm", "base"),
        "decoder": ("tiny", "smollm2-135m", "7b"),
        "encoder_decoder": ("tiny", "base", "big"),
        "recurrent": ("tiny", "base"),
    }.items()
    for size in sizes
}

# model_type in config.json -> (file, tasks)
MODEL_TYPES = {
    "bert": ("encoder", ("embed", "classify", "answer", "tensors")),
    "llama": ("decoder", ("generate", "tensors")),
    "marian": ("encoder_decoder", ("translate", "tensors")),
    "recurrent": ("recurrent", ("classify", "tensors")),
}


def names() -> list[str]:
    """The names that `build` and `example` know."""
    return list(NAMES)


def build(name: str) -> nn.Module:
    """A model of a named size in eval mode, with random weights that are the same every time.

    Raises:
        SourceError: there is no such name.
    """
    import torch

    file, size = _find(name)
    with torch.random.fork_rng(devices=[]):  # the caller's random state is left alone
        torch.manual_seed(0)
        module: nn.Module = file.build(size)
        for weight in module.parameters():
            if weight.dim() == 1:  # norms that are all one and biases of zero would hide mistakes
                weight.data += 0.1 * torch.randn_like(weight)
    return module


def example(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """(module, keyword inputs to trace it with): batch 2, ragged masks, a past of 2.

    Raises:
        SourceError: there is no such name.
    """
    file, _ = _find(name)
    module = build(name)
    return module, file.example(module.config)


def handles(config: dict[str, Any]) -> bool:
    """Whether `from_checkpoint` knows the model_type of a config.json."""
    return config.get("model_type") in MODEL_TYPES


def from_checkpoint(
    path: Path, *, task: str, trust_pickle: bool = False
) -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
    """Read a checkpoint into the model file of its `model_type`.

    Args:
        path: A directory or a file, see checkpoint.weight_files.
        task: embed, classify, answer, generate, translate, or tensors (whatever it is).
        trust_pickle: Allow pytorch_model.bin, which can run any code.

    Returns:
        (module in eval mode, keyword inputs to trace it with, contents of config.json).

    Raises:
        SourceError: an architecture, task or setting that is not here, or damaged weights.
        MissingPackage: GGUF without the package `gguf`.
    """
    from .checkpoint import read_config

    path = Path(path)
    config = read_config(path)
    model_type = config.get("model_type")
    if model_type not in MODEL_TYPES:
        raise SourceError(
            f"{model_type} is not a model of models/",
            where=str(path),
            hint="models/ has: " + ", ".join(MODEL_TYPES),
        )
    name, tasks = MODEL_TYPES[model_type]
    if task not in tasks:
        raise SourceError(
            f"a {model_type} checkpoint cannot {task}",
            where=str(path),
            hint="its tasks: " + ", ".join(tasks),
        )
    file = import_module(f".{name}", __name__)
    options = {"task": task} if name == "encoder" else {}
    module = file.load(path, trust_pickle=trust_pickle, **options)
    return module, file.example(module.config), config


def _find(name: str) -> tuple[Any, str]:
    if name not in NAMES:
        raise SourceError(f"there is no model {name!r}", hint="names: " + ", ".join(NAMES))
    file, size = NAMES[name]
    return import_module(f".{file}", __name__), size
