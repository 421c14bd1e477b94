"""What a task needs beside the graph, read from the files that a Hugging Face model comes with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import SourceError

_TASK_OF = (
    ("ForSequenceClassification", "classify"),
    ("ForQuestionAnswering", "answer"),
    ("ForCausalLM", "generate"),
    ("LMHeadModel", "generate"),
    ("ForConditionalGeneration", "translate"),
    ("MTModel", "translate"),
)


def find_task(path: Path, config: dict[str, Any]) -> str:
    """The task that a model was made for, from its files and the class it was saved as."""
    folder = path if path.is_dir() else path.parent
    if (folder / "modules.json").is_file() and path.is_dir():
        return "embed"
    architecture = next(iter(config.get("architectures") or []), "")
    for ending, task in _TASK_OF:
        if architecture.endswith(ending):
            return task
    tokenizer = any((folder / n).is_file() for n in ("tokenizer.json", "vocab.txt", "vocab.json"))
    return "embed" if tokenizer else "tensors"


def position_limit(config: dict[str, Any]) -> int | None:
    """The most tokens that the model has positions for, or None where it has no limit."""
    text = {**config, **(config.get("text_config") or {})}
    for key in ("max_position_embeddings", "n_positions"):
        if text.get(key):
            limit = int(text[key])
            # RoBERTa's positions start behind the padding id.
            offset = int(text.get("pad_token_id") or 0) + 1
            return limit - offset if config.get("model_type") in _OFFSET_POSITIONS else limit
    return None


_OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert", "mpnet", "longformer")


def settings(task: str, path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The settings of `task`, for the manifest.

    Raises:
        SourceError: The model asks for something that the runtime would do otherwise.
    """
    if task == "tensors":
        return {}
    folder = path if path.is_dir() else path.parent
    found: dict[str, Any] = {
        "max_length": _max_length(folder, config),
        "pad_token_id": _first(config.get("pad_token_id"), _tokenizer_pad(folder), 0),
    }
    if task == "embed":
        found |= _pooling(folder)
    elif task == "classify":
        found |= _labels(config)
    elif task in ("generate", "translate"):
        found |= _generation(folder, config, task)
    return found


def _labels(config: dict[str, Any]) -> dict[str, Any]:
    labels = config.get("id2label") or {}
    names = [labels[k] for k in sorted(labels, key=int)]
    if not names:  # transformers leaves its default of two labels out of config.json
        names = [f"LABEL_{i}" for i in range(int(config.get("num_labels") or 2))]
    # As transformers' own pipeline does; to it one label is a yes or no, too.
    kind = config.get("problem_type")
    if kind == "regression":
        problem = "regression"
    else:
        multi = kind == "multi_label_classification" or len(names) == 1
        problem = "multi" if multi else "single"
    return {"labels": names, "problem": problem}


def _pooling(folder: Path) -> dict[str, Any]:
    modules = _read(folder / "modules.json") or []
    kinds = [str(m["type"]).rsplit(".", 1)[-1] for m in modules]
    unknown = sorted(set(kinds) - {"Transformer", "Pooling", "Normalize"})
    if unknown:
        raise SourceError(
            f"the embedding passes through {', '.join(unknown)}, which is not supported",
            where=str(folder / "modules.json"),
            hint="export it as a factory with --task tensors, with all of it inside the module",
        )
    if (_read(folder / "sentence_bert_config.json") or {}).get("do_lower_case"):
        raise SourceError(
            "the model wants its text lowered beforehand (do_lower_case), which is not supported",
            where=str(folder / "sentence_bert_config.json"),
        )
    at = next((m["path"] for m in modules if str(m["type"]).endswith("Pooling")), "1_Pooling")
    pooling = _read(folder / at / "config.json") or {"pooling_mode_mean_tokens": True}
    modes = {k.removeprefix("pooling_mode_") for k, v in pooling.items() if v is True}
    names = {"mean_tokens": "mean", "cls_token": "cls", "max_tokens": "max"}
    if isinstance(pooling.get("pooling_mode"), str):
        chosen = [pooling["pooling_mode"]]
    else:
        chosen = [names.get(m, m) for m in sorted(modes) if m.endswith(("tokens", "token"))]
    if len(chosen) != 1 or chosen[0] not in names.values():
        raise SourceError(
            f"pooling by {' and '.join(chosen) or 'nothing'} is not supported",
            where=str(folder / at / "config.json"),
            hint="mean, cls or max, one of them",
        )
    prompt = _prompt(folder)
    if prompt and pooling.get("include_prompt") is False:
        raise SourceError(
            "the pooling leaves the tokens of the prompt out, which is not supported",
            where=str(folder / at / "config.json"),
            hint="include_prompt must be true, or default_prompt_name null",
        )
    found = {"pooling": chosen[0], "normalize": "Normalize" in kinds}
    return {**found, "prompt": prompt} if prompt else found


def _prompt(folder: Path) -> str:
    """What sentence-transformers puts before every text where it is not told otherwise."""
    config = _read(folder / "config_sentence_transformers.json") or {}
    name = config.get("default_prompt_name")
    if name is None:
        return ""
    prompts = config.get("prompts") or {}
    if name not in prompts:
        raise SourceError(
            f"the default prompt {name!r} is none of the model's: {', '.join(prompts) or 'none'}",
            where=str(folder / "config_sentence_transformers.json"),
        )
    return str(prompts[name] or "")


def _generation(folder: Path, config: dict[str, Any], task: str) -> dict[str, Any]:
    generation = {**config, **(_read(folder / "generation_config.json") or {})}
    text = {**generation, **(config.get("text_config") or {})}
    eos = text.get("eos_token_id")
    found: dict[str, Any] = {
        "eos_token_ids": eos if isinstance(eos, list) else [eos] if eos is not None else [],
    }
    if generation.get("pad_token_id") is None and found["eos_token_ids"]:
        found["pad_token_id"] = found["eos_token_ids"][0]
    if task == "generate":
        found["bos_token_id"] = text.get("bos_token_id")
        found["context_length"] = position_limit(config)
        return found
    start = generation.get("decoder_start_token_id")
    if start is None:
        raise SourceError("the model names no decoder_start_token_id", where=str(folder))
    found["decoder_start_token_id"] = start
    if generation.get("forced_bos_token_id") is not None:
        found["forced_bos_token_id"] = generation["forced_bos_token_id"]
    banned = [w[0] for w in generation.get("bad_words_ids") or [] if len(w) == 1]
    if banned:
        found["suppress_token_ids"] = banned
    return found


def _max_length(folder: Path, config: dict[str, Any]) -> int:
    sentence = (_read(folder / "sentence_bert_config.json") or {}).get("max_seq_length")
    tokenizer = (_read(folder / "tokenizer_config.json") or {}).get("model_max_length")
    limits = [n for n in (sentence, tokenizer, position_limit(config)) if n and n < 1 << 30]
    return int(min(limits)) if limits else 512


def _tokenizer_pad(folder: Path) -> int | None:
    """The id of the padding token that tokenizer.json adds, where it names one."""
    tokenizer = _read(folder / "tokenizer.json") or {}
    name = (_read(folder / "tokenizer_config.json") or {}).get("pad_token")
    name = name.get("content") if isinstance(name, dict) else name
    for token in tokenizer.get("added_tokens") or []:
        if name and token.get("content") == name:
            return int(token["id"])
    return None


def _first(*values: Any) -> Any:
    return next(v for v in values if v is not None)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as e:
        raise SourceError(f"the file cannot be read: {e}", where=str(path)) from None
