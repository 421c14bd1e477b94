"""What torch.export is given of a transformers model: what the task needs, as plain tensors."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import torch
from torch import nn

from ..errors import SourceError
from .capture import quiet


def wrap(model: Any, task: str) -> tuple[nn.Module, dict[str, Any]]:
    """The module for a task, and inputs to trace it with: batch 2, a ragged mask, a past of 3."""
    config = model.config
    if task == "tensors" and "pixel_values" in _parameters(model):
        size = config.image_size
        shape = (size, size) if isinstance(size, int) else tuple(size)
        return Pixels(model), {"pixel_values": torch.randn(2, config.num_channels, *shape)}
    vocab = config.get_text_config().vocab_size
    ids = torch.randint(0, vocab, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    example: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if task == "generate":
        module = CausalLM(model)
        past = module.example_past(batch=2, length=3)
        example["attention_mask"] = torch.cat([torch.ones(2, 3, dtype=torch.int64), mask], dim=1)
        example["position_ids"] = torch.arange(3, 10).repeat(2, 1)
        return module, {**example, "past_key_values": past}
    if task == "translate":
        return SeqToSeq(model), {**example, "decoder_input_ids": ids[:, :4].clone()}
    if "token_type_ids" in _parameters(model) and getattr(config, "type_vocab_size", 0) > 1:
        example["token_type_ids"] = torch.zeros_like(ids)
    return Text(model, task), example


def _parameters(model: nn.Module) -> set[str]:
    return set(inspect.signature(model.forward).parameters)


class Text(nn.Module):
    """An encoder: token ids in; hidden states, class logits or answer spans out."""

    outputs: ClassVar[dict[str, tuple[str, ...]]] = {
        "embed": ("last_hidden_state",),
        "tensors": ("last_hidden_state",),
        "classify": ("logits",),
        "answer": ("start_logits", "end_logits"),
    }

    def __init__(self, model: nn.Module, task: str) -> None:
        super().__init__()
        self.model, self.names = model, self.outputs[task]

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        token_type_ids: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """(B, S) ids to the task's outputs."""
        extra = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        output = self.model(input_ids=input_ids, attention_mask=attention_mask, **extra)
        return {name: output[name] for name in self.names}


class Pixels(nn.Module):
    """A vision model: pixels in; hidden states or class logits out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """(B, C, H, W) pixels to the first output of the model."""
        output = self.model(pixel_values=pixel_values)
        name = "logits" if "logits" in output else "last_hidden_state"
        return {name: output[name]}


class SeqToSeq(nn.Module):
    """An encoder-decoder: logits of every decoder position, without a cache."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        decoder_input_ids: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """(B, S) and (B, T) ids to (B, T, vocabulary) logits."""
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            use_cache=False,
        )
        return {"logits": output.logits}


class CausalLM(nn.Module):
    """A decoder with its cache as plain tensors: torch.onnx.export cannot take a DynamicCache."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def example_past(self, *, batch: int, length: int) -> list[dict[str, torch.Tensor]]:
        """A random cache of the model's own layout, found by running it."""
        with torch.no_grad(), quiet():
            output = self.model(input_ids=torch.zeros(1, 2, dtype=torch.int64))
            cache = output.get("past_key_values")
        rng = torch.Generator().manual_seed(1)

        def like(t: torch.Tensor) -> torch.Tensor:
            return torch.randn(batch, t.shape[1], length, t.shape[3], generator=rng)

        layers = getattr(cache, "layers", [])
        if not layers or not all(getattr(x, "keys", None) is not None for x in layers):
            raise SourceError(
                f"{type(self.model).__name__} keeps no key-value cache for each layer",
                hint="export it as a factory, with its state as inputs and outputs",
            )
        return [{"key": like(x.keys), "value": like(x.values)} for x in layers]

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past_key_values: list[dict[str, torch.Tensor]],
    ) -> dict[str, Any]:
        """(B, S) ids after P cached tokens to (B, S, vocabulary) logits and the longer cache."""
        from transformers import DynamicCache

        cache = DynamicCache()
        for i, layer in enumerate(past_key_values):
            cache.update(layer["key"], layer["value"], i)
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        layers: list[Any] = cache.layers
        present = [{"key": x.keys, "value": x.values} for x in layers]
        return {"logits": output.logits, "present": present}
