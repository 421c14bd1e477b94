"""Random weights for the graphs of gpu_graphs.py, drawn where they are used; PyTorch gets the same.

    parameters = draw(recipe, "cuda")       # name -> float16 tensor
    fill(folder, recipe, parameters)        # writes model.onnx.data beside model.onnx

Parameters are rounded to float16 once, so that float32 graphs compute with the same numbers.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

DATA = "model.onnx.data"
DTYPES = {"float": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
Recipe = dict[str, Any]
Parameters = dict[str, Tensor]


def read(folder: Path) -> Recipe:
    recipe: Recipe = json.loads((folder / "recipe.json").read_text())
    return recipe


def draw(recipe: Recipe, device: str, seed: int = 0) -> Parameters:
    """Parameters by name, float16: projections keep the size of what goes through them."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(shape: list[int], std: float, mean: float = 0.0) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).mul_(std).add_(mean).half()

    made = {}
    for name, shape in recipe["parameters"].items():
        if len(shape) == 1:
            is_norm = "norm" in name.lower() and name.endswith("weight")
            made[name] = normal(shape, 0.05, float(is_norm))
        elif "token" in name or "position" in name or "types" in name or "shared" in name:
            made[name] = normal(shape, shape[-1] ** -0.5)  # looked up, not multiplied with
        else:
            made[name] = normal(shape, (3 * math.prod(shape[1:])) ** -0.5)
    return made


def fill(folder: Path, recipe: Recipe, parameters: Parameters) -> None:
    """Write the file of weights, one weight at a time."""
    with (folder / DATA).open("wb") as file:
        for weight in recipe["weights"]:
            file.seek(weight["offset"])
            value = torch.cat([_part(p, parameters) for p in weight["parts"] if "of" in p], -1)
            if "zeros" in weight["parts"][-1]:
                value = F.pad(value, (0, weight["shape"][-1] - value.shape[-1]))
            value = value.to(DTYPES[weight["dtype"]]).contiguous().cpu()
            # numpy has no bfloat16, and its bytes are all that is wanted
            file.write(value.reshape(-1).view(torch.uint8).numpy().data)
        file.truncate(recipe["bytes"])


def _part(part: dict[str, Any], parameters: Parameters) -> Tensor:
    value = parameters[part["of"]]
    if "plus" in part:
        through = parameters[part["through"]].float() @ parameters[part["plus"]].float()
        return value.float() + through
    if part["row"] is not None:
        value = value[part["row"]]
    return value.T if part["transposed"] else value


class Store:
    """The weights of one folder of graphs, drawn once a model and written once a graph."""

    def __init__(self, folder: Path, device: str) -> None:
        self.folder, self.device = folder, device
        self._parameters: tuple[str, Parameters] | None = None

    def has(self, model: str, variant: str) -> bool:
        return (self.folder / model / variant / "recipe.json").is_file()

    def recipe(self, model: str, variant: str) -> Recipe:
        return read(self.folder / model / variant)

    def parameters(self, model: str, variant: str) -> Parameters:
        """Those of a model; all of its graphs have the same."""
        if self._parameters is None or self._parameters[0] != model:
            self._parameters = None  # the old ones go before the new ones come
            self._parameters = (model, draw(self.recipe(model, variant), self.device))
        return self._parameters[1]

    def path(self, model: str, variant: str) -> Path:
        """The graph's file, its weights beside it."""
        folder, recipe = self.folder / model / variant, self.recipe(model, variant)
        data = folder / DATA
        if not data.is_file() or data.stat().st_size != recipe["bytes"]:
            fill(folder, recipe, self.parameters(model, variant))
        return folder / "model.onnx"

    def drop(self, model: str, variant: str) -> None:
        """Remove the weights from the disk."""
        (self.folder / model / variant / DATA).unlink(missing_ok=True)


def load_into(module: torch.nn.Module, parameters: Parameters, dtype: torch.dtype) -> Any:
    """The module with these parameters, on their device, in eval mode."""
    first = {p: n for n, p in reversed(list(module.named_parameters()))}
    tied = {n: first[p] for n, p in module.named_parameters(remove_duplicate=False)}
    if missing := set(first.values()) - set(parameters):
        raise KeyError(f"no values for {sorted(missing)[:5]}")
    values = {n: parameters[of].to(dtype) for n, of in tied.items()}
    module.load_state_dict(values, strict=False, assign=True)  # of the meta device, too
    device = next(iter(parameters.values())).device
    return module.to(device).eval().requires_grad_(False)
