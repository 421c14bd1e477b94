"""Checkpoints on disk: which files, which configuration, which weights, and a strict fill.

    weight_files(path)   the files that hold the weights, in reading order
    read_config(path)    config.json, or the same dictionary made from GGUF metadata
    read_weights(path)   name -> float32 tensor, under the names of the transformers library
    fill(module, ...)    put them into a module; every missing or left-over name is an error
    need / expect        read a configuration without guessing

Safetensors and GGUF hold data only. A pickle runs code while it is read, so it is opened only when
the caller says `trust_pickle=True`. Half precision is widened to float32: precision is chosen
later, by optimizers/, where its drift is measured.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from ..errors import MissingPackage, SourceError

PICKLES = (".bin", ".pt", ".pth", ".ckpt")
FORMATS = "*.safetensors, *.gguf, or pytorch_model.bin with --trust-pickle"
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# llama.cpp's name for a layer's part -> the one of transformers; "blk.7." becomes "model.layers.7."
GGUF_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


# Files ------------------------------------------------------------------------------------------


def weight_files(path: Path) -> list[Path]:
    """The files that `read_weights` opens, without reading a weight (callers hash them).

    A directory is searched for model.safetensors, model.safetensors.index.json with its shards,
    one *.gguf and pytorch_model.bin, in this order; the first one found is used.

    Raises:
        SourceError: nothing there, no weights, several GGUF files, a bad index, a missing shard.
    """
    path = Path(path)
    if path.is_file():
        if path.suffix not in (".safetensors", ".gguf", *PICKLES):
            raise SourceError("not a file of weights", where=str(path), hint=f"expected {FORMATS}")
        return [path]
    if not path.is_dir():
        raise SourceError("no such checkpoint", where=str(path))
    if (path / "model.safetensors").is_file():
        return [path / "model.safetensors"]
    if (index := path / "model.safetensors.index.json").is_file():
        return [index, *_shards(index)]
    if len(ggufs := sorted(path.glob("*.gguf"))) > 1:
        names = ", ".join(file.name for file in ggufs)
        raise SourceError(
            f"the directory holds several GGUF files: {names}", where=str(path), hint="name one"
        )
    if ggufs:
        return ggufs
    if (path / "pytorch_model.bin").is_file():
        return [path / "pytorch_model.bin"]
    raise SourceError("the directory holds no weights", where=str(path), hint=f"expected {FORMATS}")


def _shards(index: Path) -> list[Path]:
    weight_map = _json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError("the index has no weight_map", where=str(index))
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name:  # "../x" would read outside of the checkpoint
            raise SourceError(f"the index names a file elsewhere: {name}", where=str(index))
        if not (index.parent / name).is_file():
            raise SourceError(
                f"a shard of the weights is missing: {name}",
                where=str(index.parent),
                hint="the download is incomplete; fetch it again",
            )
    return [index.parent / name for name in names]


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SourceError(f"cannot be read as JSON: {error}", where=str(file)) from error
    if not isinstance(content, dict):
        raise SourceError("not a JSON object", where=str(file))
    return content


# Configuration ----------------------------------------------------------------------------------


def read_config(path: Path) -> dict[str, Any]:
    """The model's configuration, in the keys of a transformers config.json.

    From config.json in the directory (or beside the file), and for GGUF without one, or for a
    *.gguf file that is named itself, from the metadata of the file (architecture `llama`).

    Raises:
        SourceError: no configuration, a damaged one, or a GGUF file of another architecture.
        MissingPackage: GGUF without the package `gguf`.
    """
    path = Path(path)
    if path.suffix != ".gguf":
        folder = path if path.is_dir() else path.parent
        if (file := folder / "config.json").is_file():
            return _json(file)
        if not path.is_dir() or not list(path.glob("*.gguf")):
            raise SourceError("there is no config.json", where=str(folder))
    (file,) = weight_files(path)
    return _gguf_config(_open_gguf(file), file)


def need(config: dict[str, Any], key: str) -> int:
    """The size `config[key]`; SourceError where it is missing or no size (none is guessed)."""
    size = config.get(key)
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise SourceError(f"the configuration has {key} = {size!r}", where="config.json",
                          hint="it must be a positive whole number")  # fmt: skip
    return size


def expect(config: dict[str, Any], key: str, *accepted: Any) -> None:
    """Refuse a value that our code would silently compute in another way.

    `accepted[0]` is what a missing key means.
    """
    if (value := config.get(key, accepted[0])) not in accepted:
        refuse(key, value, accepted)


def refuse(key: str, value: object, accepted: Iterable[object]) -> NoReturn:
    """Raise the SourceError that names a key, its value, and what would be accepted."""
    raise SourceError(
        f"{key} = {value!r} is not supported by this architecture in models/",
        where="config.json",
        hint="supported: " + ", ".join(repr(choice) for choice in accepted),
    )


# Weights ----------------------------------------------------------------------------------------


def read_weights(path: Path, *, trust_pickle: bool = False) -> dict[str, Tensor]:
    """All weights of a checkpoint: name -> tensor, floating point ones as float32.

    Args:
        path: A directory or one file, see `weight_files`.
        trust_pickle: Allow pytorch_model.bin, which can run any code.

    Raises:
        SourceError: no weights, a damaged file, a missing shard, or a pickle that is not trusted.
        MissingPackage: GGUF without the package `gguf`.
    """
    weights: dict[str, Tensor] = {}
    for file in weight_files(Path(path)):
        if file.suffix == ".safetensors":
            weights.update(_read_safetensors(file))
        elif file.suffix == ".gguf":
            weights.update(_read_gguf(file))
        elif file.suffix in PICKLES:
            weights.update(_read_pickle(file, trusted=trust_pickle))
    for name, value in weights.items():
        if value.is_floating_point() and value.dtype not in FLOATS:
            raise SourceError(  # float8 is meaningless without its scales
                f"weights of type {value.dtype} are not supported: {name}",
                where=str(path),
                hint="use the checkpoint that was not quantized",
            )
    return {n: v.float() if v.is_floating_point() else v for n, v in weights.items()}


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(file)
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise SourceError(
            f"the safetensors file is damaged: {error}", where=str(file), hint="fetch it again"
        ) from error


def _read_pickle(file: Path, *, trusted: bool) -> dict[str, Tensor]:
    if not trusted:
        raise SourceError(
            "the weights are a pickle, and opening a pickle can run any code",
            where=str(file),
            hint="convert it to safetensors, or pass --trust-pickle if you trust its author",
        )
    try:
        weights = torch.load(file, map_location="cpu", weights_only=False)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise SourceError(f"the pickle is damaged: {error}", where=str(file)) from error
    if not isinstance(weights, dict) or not all(isinstance(v, Tensor) for v in weights.values()):
        raise SourceError("the pickle is not a dictionary of tensors", where=str(file))
    return weights


def fill(
    module: nn.Module,
    weights: dict[str, Tensor],
    *,
    where: Path,
    renames: Iterable[tuple[str, str]] = (),
    unused: str = r"(?!)",
) -> None:
    """Put weights into a module: every parameter gets one, and no weight is left over.

    The module may live on the meta device: tensors are assigned, not copied.

    Args:
        module: Gets the weights, in place.
        weights: name -> tensor, as the checkpoint names them.
        where: The checkpoint, for the messages.
        renames: Patterns in our names and what the checkpoint has instead, for re.sub in order.
        unused: A pattern of names that the module has no use for (re.search).

    Raises:
        SourceError: names that are missing or left over, or shapes that differ; it lists them.
    """
    state = module.state_dict()
    theirs = {name: name for name in state}
    for pattern, part in renames:
        theirs = {name: re.sub(pattern, part, other) for name, other in theirs.items()}
    known = set(theirs.values())
    missing = sorted(known - weights.keys())
    extra = sorted(name for name in weights.keys() - known if not re.search(unused, name))
    if missing or extra:
        lists = [f"{kind}: {_list(names)}" for kind, names in
                 (("missing", missing), ("unexpected", extra)) if names]  # fmt: skip
        raise SourceError(
            f"the weights do not fit {type(module).__name__}; " + "; ".join(lists),
            where=str(where),
            hint="is this the right task or model_type for the checkpoint?",
        )
    for name, other in theirs.items():
        if (found := weights[other].shape) != state[name].shape:
            raise SourceError(
                f"{other} has shape {tuple(found)}, the configuration asks for "
                f"{tuple(state[name].shape)}",
                where=str(where),
            )
    module.load_state_dict({ours: weights[other] for ours, other in theirs.items()}, assign=True)


def _list(names: list[str], limit: int = 8) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def drop_copies(weights: dict[str, Tensor], original: str, *copies: str, where: Path) -> None:
    """Remove tied weights that the checkpoint stores again; SourceError where a copy differs."""
    for name in copies:
        copy = weights.pop(name, None)
        if copy is not None and original in weights and not torch.equal(copy, weights[original]):
            raise SourceError(
                f"{name} differs from {original}, but the configuration says that they are tied",
                where=str(where),
            )


# GGUF -------------------------------------------------------------------------------------------


def _open_gguf(file: Path) -> Any:
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise MissingPackage(
            "GGUF needs the package gguf", where=str(file), hint="pip install 'onnxpress[hf]'"
        ) from error
    try:
        reader = _gguf_reader(file, file.stat().st_mtime_ns)
    except (OSError, ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        raise SourceError(
            f"the GGUF file is damaged: {error}", where=str(file), hint="fetch it again"
        ) from error
    architecture = _metadata(reader, "general.architecture")
    if architecture != "llama":
        raise SourceError(
            f"general.architecture = {architecture!r} is not supported in GGUF",
            where=str(file),
            hint="supported: 'llama'; use the safetensors checkpoint",
        )
    return reader


@lru_cache(maxsize=1)
def _gguf_reader(file: Path, modified: int) -> Any:
    """Opening takes seconds (it parses the vocabulary): once for configuration and weights."""
    import gguf

    return gguf.GGUFReader(file)


def _metadata(reader: Any, key: str, default: Any = None) -> Any:
    field = reader.get_field(key)
    return default if field is None else field.contents()


def _gguf_config(reader: Any, file: Path) -> dict[str, Any]:
    def required(key: str) -> Any:
        if (value := _metadata(reader, key)) is None:
            raise SourceError(f"the GGUF metadata has no {key}", where=str(file))
        return value

    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if "token_embd.weight" not in tensors:
        raise SourceError("the GGUF file has no token_embd.weight", where=str(file))
    dim, n_head = required("llama.embedding_length"), required("llama.attention.head_count")
    head_dim = _metadata(reader, "llama.attention.key_length", dim // n_head)
    rope_dim = _metadata(reader, "llama.rope.dimension_count", head_dim)
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        # GGUF lists dimensions innermost first.
        "vocab_size": int(tensors["token_embd.weight"].shape[1]),
        "hidden_size": dim,
        "intermediate_size": required("llama.feed_forward_length"),
        "num_hidden_layers": required("llama.block_count"),
        "num_attention_heads": n_head,
        "num_key_value_heads": _metadata(reader, "llama.attention.head_count_kv", n_head),
        "head_dim": head_dim,
        "max_position_embeddings": required("llama.context_length"),
        "rms_norm_eps": required("llama.attention.layer_norm_rms_epsilon"),
        "rope_parameters": {
            "rope_type": _metadata(reader, "llama.rope.scaling.type", "default"),
            "rope_theta": _metadata(reader, "llama.rope.freq_base", 10000.0),
            "partial_rotary_factor": rope_dim / head_dim,
        },
        "num_local_experts": _metadata(reader, "llama.expert_count", 0),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
        "bos_token_id": _metadata(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": _metadata(reader, "tokenizer.ggml.eos_token_id"),
        "pad_token_id": _metadata(reader, "tokenizer.ggml.padding_token_id"),
    }


def _read_gguf(file: Path) -> dict[str, Tensor]:
    reader = _open_gguf(file)
    from gguf import quants

    config = _gguf_config(reader, file)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    weights = {}
    for tensor in reader.tensors:
        match = re.fullmatch(r"(blk\.(?P<layer>\d+)\.)?(?P<part>\w+)\.(?P<kind>weight|bias)",
                             tensor.name)  # fmt: skip
        if match is None or match["part"] not in GGUF_NAMES:
            # rope_freqs.weight of Llama 3 among them: a rope scaling that the metadata leaves out.
            raise SourceError(f"unexpected tensor in the GGUF file: {tensor.name}", where=str(file))
        try:
            value = np.array(quants.dequantize(tensor.data, tensor.tensor_type), np.float32)
        except (NotImplementedError, ValueError) as error:
            raise SourceError(f"cannot read {tensor.name}: {error}", where=str(file)) from error
        if match["part"] in heads:
            value = _to_half_split(value, heads[match["part"]])
        layer = f"model.layers.{match['layer']}." if match["layer"] else ""
        name = f"{layer}{GGUF_NAMES[match['part']]}.{match['kind']}"
        weights[name] = torch.from_numpy(np.ascontiguousarray(value))
    _gguf_reader.cache_clear()
    return weights


def _to_half_split(value: np.ndarray[Any, Any], n_head: int) -> np.ndarray[Any, Any]:
    """Undo llama.cpp's row order: it rotates neighbours (0,1), (2,3)...; transformers rotates
    (0, d/2), (1, d/2 + 1)... Rows of a head go from pairs to two halves."""
    rows = value.reshape(n_head, -1, 2, *value.shape[1:])  # (head, pair, member, ...)
    return rows.swapaxes(1, 2).reshape(value.shape)
