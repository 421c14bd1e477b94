"""Divide outlier channels of an activation, and multiply the weights that read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ..clean.weight_views import is_weight
from ..dims import Dim, dim
from ..edit import constant
from ..outcome import Outcome
from ..read import other, producer, rank, reader, readers
from .layers import Layer, layers
from .observe import Seen
from .quantize_static import Scheme, array_of, drop_unread
from .simulate import rounded_activation, rounded_weight

Array = npt.NDArray[np.float32]

# Above 0.8 the factors follow the highest value that each channel had on the calibration data: the
# error there falls on, and that on texts of another kind rises (MiniLM).
ALPHAS = (0.4, 0.5, 0.6, 0.7, 0.75, 0.8)
TRIED_ROWS = 512  # of the sample; more moved no choice of alpha on MiniLM
WORTH = 0.8  # a Mul in the graph has to bring the error below this share; folding costs nothing


@dataclass(frozen=True)
class Smoothing:
    """The factors of one activation.

    Attributes:
        value: Name of the activation, (..., K).
        alpha: How much of the difficulty goes to the weights, 0 to 1 (SmoothQuant's alpha).
        factors: What each channel is divided by, (K,), all above 0.
        error: Squared error of the layers that read it, over that without smoothing.
    """

    value: str
    alpha: float
    factors: Array
    error: float


def choose_smoothing(
    model: ir.Model,
    seen: Mapping[str, Seen],
    *,
    scheme: Scheme = Scheme(),  # noqa: B008  # frozen
) -> list[Smoothing]:
    """Find for each activation the alpha that makes the least error in the layers that read it.

    The error is measured on the sample of `seen`, layer by layer: ||Q(x/s) Q(s W) - x W||^2 over
    ||x W||^2. An activation is left alone where no alpha helps, or not enough for the Mul that it
    would cost; and where another activation meets one of its weights, which would be stored twice.

    Args:
        model: The base graph, in float.
        seen: What `observe` saw of activations; those that it lacks are left alone.
        scheme: The kinds of integers.
    """
    found = []
    for value, group in _groups(model, seen).items():
        stats = seen[str(value.name)]
        met = {
            n.inputs[0] for layer in group for n in readers(layer.weight) if n.op_type == "MatMul"
        }
        if not stats.count or met != {value}:
            continue
        # Over all of the sample, which is in the order of the data.
        rows = stats.rows[:: -(-len(stats.rows) // TRIED_ROWS) or 1]
        weights = [array_of(layer.weight) for layer in group]
        right = [rows @ w for w in weights]
        channels = stats.low, stats.high
        ones = np.ones(rows.shape[1], np.float32)
        plain = _error(rows, weights, right, channels, ones, scheme)
        if not plain:  # nothing to gain
            continue
        place = _place(value, group)
        heads = _heads(value) if place is not None else None
        strength = _tied(np.max([np.abs(w).max(1) for w in weights], axis=0), heads)
        error, alpha = min(
            (_error(rows, weights, right, channels, factors, scheme) / plain, alpha)
            for alpha in ALPHAS
            for factors in [_factors(channels, strength, alpha, heads)]
        )
        if error < (WORTH if place is None else 1.0):
            factors = _factors(channels, strength, alpha, heads)
            found.append(Smoothing(str(value.name), alpha, factors, error))
    return found


class SmoothActivations(ir.passes.InPlacePass):
    """Move the outliers of activations into the weights that read them; the result is the same.

    y = MatMul(x, W)
    -> y = MatMul(x / s, s * W)                            # s: one factor a channel of x

    SmoothQuant (Xiao et al. 2023, arXiv:2211.10438). The division costs nothing where it can be
    folded, exactly, into what makes x and is read by no one else: the scale and bias of a
    LayerNormalization or RMSNormalization, the projection of the values of an Attention, the
    linear factor of a gated feed-forward, a layer before a Relu. Elsewhere it is a Mul by 1/s.

    Args:
        smoothings: What `choose_smoothing` found on this graph.
    """

    def __init__(self, smoothings: Sequence[Smoothing]) -> None:
        super().__init__()
        self.smoothings = {s.value: s for s in smoothings}

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Smooth the activations that are named, each once."""
        groups, notes = _groups(model, self.smoothings), []
        for value, group in groups.items():
            chosen = self.smoothings[str(value.name)]
            place, heads = _place(value, group), _heads(value)
            tied = np.allclose(_tied(chosen.factors, heads), chosen.factors, rtol=1e-6, atol=0)
            if place is not None and not tied:
                place = None  # chosen for another graph, where the heads of values were apart
            for layer in group:
                _scale_weight(model.graph, layer, chosen.factors[:, None])
            if place is None:
                _divide(model.graph, value, group, chosen.factors)
            else:
                shared = chosen.factors.reshape(heads)[:, 0] if heads else chosen.factors
                _fold(model.graph, place, shared.reshape(-1))
            where = "divided by a Mul" if place is None else f"folded into {_describe(place)}"
            notes.append(f"{value.name}: alpha {chosen.alpha}, {where}")
            # The activation is another one now: a second run must not smooth it again.
            value.name = f"{value.name}_smooth" if place is not None else value.name
        return Outcome(model, bool(groups), hits=len(groups), notes=tuple(notes))


Place = tuple[ir.Node, Layer | None]
"""What makes the activation: a norm (and None), or a node and the layer that takes the factors."""


def _groups(model: ir.Model, named: Mapping[str, object]) -> dict[ir.Value, list[Layer]]:
    """The layers that read each of the activations that are named."""
    groups: dict[ir.Value, list[Layer]] = {}
    for layer in layers(model)[0]:
        if str(layer.input.name) in named:
            groups.setdefault(layer.input, []).append(layer)
    return groups


def _describe(place: Place) -> str:
    node, layer = place
    return f"{node.op_type} {node.name!r}" if layer is None else f"the weight of {layer.name}"


def _place(value: ir.Value, group: Sequence[Layer]) -> Place | None:
    """Where the division can be folded exactly; None where it needs a node."""
    if value.is_graph_output() or set(readers(value)) - {layer.node for layer in group}:
        return None
    node = producer(value)
    if node is None or any(o.uses() or o.is_graph_output() for o in node.outputs if o is not value):
        return None
    channels = dim(group[0].weight, 0)
    if node.op_type in ("LayerNormalization", "RMSNormalization"):
        fits = [
            is_weight(v) and v.dtype == ir.DataType.FLOAT and rank(v) == 1 and dim(v, 0) == channels
            for v in node.inputs[1:]
            if v is not None
        ]
        return (node, None) if fits and all(fits) else None
    layer = None
    if node.op_type == "Attention" and (heads := _heads(value)) is not None:
        if any(v is not None for v in node.inputs[4:]):  # a cache holds values without factors
            return None
        layer = _only_layer(node.inputs[2], node, heads[0] * heads[2])
    elif node.op_type == "Relu":
        layer = _only_layer(node.inputs[0], node, channels)
    elif node.op_type == "Mul":
        both = [_only_layer(source, node, channels) for source in node.inputs]
        layer = next((found for found in both if found is not None), None)
    return None if layer is None else (node, layer)


def _only_layer(source: ir.Value | None, reads: ir.Node, columns: Dim) -> Layer | None:
    """The layer of so many columns whose output is `source`, where `reads` reads it, and once."""
    if source is None or source.is_graph_output() or [n for n, _ in source.uses()] != [reads]:
        return None
    product, bias, add = source, None, producer(source, "Add")
    if add is not None:
        product = next((v for v in add.inputs if v is not None and producer(v, "MatMul")), source)
        bias = other(add, product)
        if reader(product) is not add or not _fits(bias, [columns]):
            return None
    made = producer(product, "MatMul")
    if made is None or (x := made.inputs[0]) is None or (weight := made.inputs[1]) is None:
        return None
    if rank(weight) != 2 or not _fits(weight, [dim(weight, 0), columns]):
        return None
    return Layer(str(made.name), "", made, x, weight, add, bias)


def _fits(value: ir.Value | None, shape: Sequence[Dim]) -> bool:
    """Whether `value` is a weight of float32 and of this shape."""
    if value is None or not is_weight(value) or value.dtype != ir.DataType.FLOAT:
        return False
    return value.shape is not None and list(value.shape) == list(shape)


Heads = tuple[int, int, int]


def _heads(value: ir.Value) -> Heads | None:
    """Of an Attention's output of rank 3: heads of the values, readers of each, size; else None.

    With grouped heads a channel of the values becomes one of several heads: they share a factor.
    """
    node, width = producer(value, "Attention"), dim(value, -1)
    if node is None or rank(value) != 3 or not isinstance(width, int):
        return None
    q, kv = (node.attributes.get_int(f"{of}_num_heads", 0) for of in ("q", "kv"))
    if not q or not kv or q % kv or width % q:
        return None
    return kv, q // kv, width // q


def _tied(channels: Array, heads: Heads | None) -> Array:
    """The greatest of the channels that share a factor, for each of them."""
    if heads is None:
        return channels
    each = channels.reshape(heads)
    return np.broadcast_to(each.max(1, keepdims=True), heads).reshape(-1)


def _factors(
    channels: tuple[Array, Array], strength: Array, alpha: float, heads: Heads | None
) -> Array:
    """SmoothQuant's factors, from the lowest and highest value of each channel."""
    peak = _tied(np.maximum(np.abs(channels[0]), np.abs(channels[1])), heads)
    least = 1e-5  # SmoothQuant's own
    s = np.maximum(peak, least) ** alpha / np.maximum(strength, least) ** (1 - alpha)
    # A channel that was always 0 says nothing of its range: another text may wake it, and what is
    # divided by next to nothing would be clipped away.
    live = peak > 0
    return np.where(live, s / np.exp(np.log(s[live]).mean()), 1).astype(np.float32)


def _error(
    rows: Array,
    weights: Sequence[Array],
    right: Sequence[Array],
    channels: tuple[Array, Array],
    factors: Array,
    scheme: Scheme,
) -> float:
    low, high = float((channels[0] / factors).min()), float((channels[1] / factors).max())
    rounded = rounded_activation(rows / factors, low, high, scheme)
    total = 0.0
    for w, y in zip(weights, right, strict=True):
        wrong = rounded @ rounded_weight(w * factors[:, None], scheme) - y
        total += float((wrong**2).sum() / max(float((y**2).sum()), 1e-30))
    return total


def _scale_weight(graph: ir.Graph, layer: Layer, factors: Array) -> None:
    old = layer.node.inputs[1]  # not layer.weight: factors may have gone into it since
    assert old is not None
    new = constant(graph, f"{old.name}_smooth", array_of(old) * factors)
    layer.node.replace_input_with(1, new)
    drop_unread(graph, old)


def _fold(graph: ir.Graph, place: Place, factors: Array) -> None:
    node, layer = place
    if layer is None:
        for i, value in enumerate(node.inputs):
            if i and value is not None:
                _divide_constant(graph, node, i, factors)
        return
    _scale_weight(graph, layer, np.float32(1) / factors)
    if layer.add is not None and layer.bias is not None:
        _divide_constant(graph, layer.add, list(layer.add.inputs).index(layer.bias), factors)


def _divide_constant(graph: ir.Graph, node: ir.Node, index: int, factors: Array) -> None:
    old = node.inputs[index]
    assert old is not None
    new = constant(graph, f"{old.name}_smooth", array_of(old) / factors)
    node.replace_input_with(index, new)
    if old is not new:
        drop_unread(graph, old)


def _divide(graph: ir.Graph, value: ir.Value, group: Sequence[Layer], factors: Array) -> None:
    by = constant(graph, f"{value.name}_factors", 1 / factors)
    node = ir.node("Mul", [value, by], name=f"{value.name}_smooth")
    out = node.outputs[0]
    out.name, out.type, out.shape = f"{value.name}_smooth", value.type, value.shape
    at = value.producer()
    if at is None:  # an input of the graph
        graph.insert_before(graph[0], node)
    else:
        graph.insert_after(at, node)
    for layer in group:
        layer.node.replace_input_with(0, out)
