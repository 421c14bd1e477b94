"""What a graph promises to whoever calls it, and the check that a pass kept to it."""

from __future__ import annotations

import onnx_ir as ir

Signature = dict[str, list[tuple[object, ...]]]


def signature_of(model: ir.Model) -> Signature:
    """Inputs and outputs: name, dtype, rank and sizes of each."""
    # Before IR version 4 every initializer had to be an input too: a default, not what is asked.
    inputs = [v for v in model.graph.inputs if v.name not in model.graph.initializers]
    sides = {"inputs": inputs, "outputs": list(model.graph.outputs)}
    return {side: [_declared(v) for v in values] for side, values in sides.items()}


def _declared(value: ir.Value) -> tuple[object, ...]:
    """Name, dtype, rank and sizes, None for each that is not known or varies."""
    if value.shape is None:
        return value.name, value.dtype, None
    sizes = [d if isinstance(d, int) else None for d in value.shape]
    return value.name, value.dtype, len(sizes), *sizes


def check_signature(name: str, want: Signature, have: Signature) -> None:
    """Refuse what the pass of this name made of a signature.

    Raises:
        onnx_ir.passes.PostconditionError: It is another one: a defect of that pass.
    """
    # Inference may find a type or a rank that was not stated; it may not change a stated one.
    for side, values in want.items():
        same = len(values) == len(have[side]) and all(
            old is None or old == new
            for a, b in zip(values, have[side], strict=True)
            for old, new in zip(a, b, strict=False)  # where no rank was stated, b has more
        )
        if not same:
            raise ir.passes.PostconditionError(
                f"pass {name} changed the {side} of the model, (name, dtype, rank, sizes) each: "
                f"from {values} to {have[side]}"
            )
