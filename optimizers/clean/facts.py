"""What a graph says about its own sizes: shapes, and the contents of small integer tensors.

onnx's shape inference gives a new name to each size that it cannot compute, and it computes none
from a Reshape whose target is itself computed. This reads sizes through both, as polynomials of
dimension names. A size is trusted as far as dims.py trusts it: one name, one size, in all of a
graph.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from .. import read
from .contents import INTEGERS, LIMIT, ONE, Content, Sizes, compute
from .sizes import FRESH, OPAQUE, Size, product

END = (1 << 31) - 1  # the least of the numbers that exporters write for "to the end"

CLAMPED = f"{FRESH}min"  # how the names of sizes begin that are the lesser of two

SAME = {  # ops whose first output has the shape of their first input
    *("Abs", "Cast", "Ceil", "Clip", "Cos", "CumSum", "Dropout", "Elu", "Erf", "Exp", "Floor"),
    *("Gelu", "HardSigmoid", "HardSwish", "Identity", "IsInf", "IsNaN", "LayerNormalization"),
    *("LeakyRelu", "Log", "LogSoftmax", "Mish", "Neg", "Not", "RMSNormalization", "Reciprocal"),
    *("Relu", "RotaryEmbedding", "Round", "Selu", "Sigmoid", "Sign", "Sin", "Softmax"),
    *("Softplus", "Sqrt", "Swish", "Tanh", "Trilu"),
}

BROADCAST = {
    *("Add", "And", "Div", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max"),
    *("Mean", "Min", "Mod", "Mul", "Or", "Pow", "Sub", "Sum", "Where", "Xor"),
}


class Facts:
    """Shapes and contents, read node by node in the order of the graph.

    Attributes:
        source: Where a named size can be read: the first value that has it, inputs before all
            others, and the axis.
    """

    def __init__(self, model: ir.Model) -> None:
        self.source: dict[str, tuple[ir.Value, int]] = {}
        self._shapes: dict[ir.Value, Sizes | None] = {}
        self._contents: dict[ir.Value, Content | None] = {}
        self._clamped: dict[Size, Size] = {}  # min(n, size) -> size
        self._made = 0
        for value in model.graph.inputs:  # a size is best read from an input
            self.shape(value)

    def shape(self, value: ir.Value | None) -> Sizes | None:
        """The sizes of a value; None where the rank is not known."""
        if value is None:
            return None
        if value not in self._shapes:
            self._shapes[value] = self._declared(value)
            self._note_sources(value)
        return self._shapes[value]

    def content(self, value: ir.Value | None) -> Content | None:
        """The entries of a small integer tensor of rank 0 or 1, however it was made."""
        if value is None:
            return None
        if value not in self._contents:
            self._contents[value] = self._constant(value) or self._opaque(value)
        return self._contents[value]

    def visit(self, node: ir.Node) -> None:
        """Learn what `node` makes. Call it once for each node, in the order of the graph."""
        if node.domain not in ("", "ai.onnx") or not node.outputs:
            return
        output = node.outputs[0]
        found = self._infer(node)
        if found is not None:
            declared = self._declared(output)
            if declared is None:
                self._shapes[output] = found
            elif len(declared) == len(found):
                self._shapes[output] = tuple(map(_better, found, declared))
        self.shape(output)
        content = compute(node, self.content, self.shape)
        if content is not None and _fits(content, output.dtype):
            self._contents[output] = content

    def _declared(self, value: ir.Value) -> Sizes | None:
        if value.shape is None:
            return None
        found = []
        for d in value.shape:
            if isinstance(d, int):
                found.append(Size.of(d))
            elif d.value is None:
                found.append(self._fresh())
            else:  # what a user calls an input's size is a name, whatever it looks like
                found.append((Size.of if value.is_graph_input() else Size.parse)(d.value))
        return tuple(found)

    def _note_sources(self, value: ir.Value) -> None:
        if value.const_value is None:
            for axis, size in enumerate(self._shapes[value] or ()):
                if size.name is not None:
                    self.source.setdefault(size.name, (value, axis))

    def _fresh(self, kind: str = FRESH) -> Size:
        self._made += 1
        return Size.of(f"{kind}{self._made}")

    # ---- shapes ------------------------------------------------------------------------------

    def _infer(self, node: ir.Node) -> Sizes | None:
        """The shape of the first output, where this knows the op and what it needs."""
        op = node.op_type
        x = self.shape(node.inputs[0]) if node.inputs else None
        if op in BROADCAST:
            return self._broadcast([self.shape(v) for v in node.inputs])
        if op == "Range":
            return self._range(node)
        if op == "ConstantOfShape":
            return self._as_shape(self.content(node.inputs[0]))
        if x is None:
            return None
        if op in SAME:
            return x
        method = getattr(self, f"_shape_of_{op.lower()}", None)
        return None if method is None else method(node, x)

    def _broadcast(self, shapes: Sequence[Sizes | None]) -> Sizes | None:
        found: Sizes = ()
        for shape in shapes:
            if shape is None:
                return None
            n = max(len(found), len(shape))
            pad = [(ONE,) * (n - len(s)) + s for s in (found, shape)]
            found = tuple(self._wider(a, b) for a, b in zip(*pad, strict=True))
        return found

    def _wider(self, a: Size, b: Size) -> Size:
        if a == b or b == ONE:
            return a
        if a == ONE or self._clamped.get(a) == b:
            return b  # min(n, s) beside s is s in every case in which the two broadcast
        if self._clamped.get(b) == a:
            return a
        for size in (a, b):
            if size.number is not None:
                return size  # above 1, so the other is that or 1
        return self._fresh()

    def _as_shape(self, content: Content | None) -> Sizes | None:
        if content is None or not all(e.is_size for e in content.entries):
            return None
        return content.entries

    def _range(self, node: ir.Node) -> Sizes | None:
        parts = [self.content(v) for v in node.inputs]
        if any(p is None or len(p.entries) != 1 for p in parts):
            return None
        start, limit, step = (p.entries[0] for p in parts if p is not None)
        length = limit + -start
        return (length,) if step == ONE and length.is_size else None

    def _shape_of_transpose(self, node: ir.Node, x: Sizes) -> Sizes | None:
        perm = node.attributes.get_ints("perm", None) or tuple(reversed(range(len(x))))
        return tuple(x[p] for p in perm)

    def _shape_of_unsqueeze(self, node: ir.Node, x: Sizes) -> Sizes | None:
        axes = read.ints(node, "axes", 1)
        if axes is None:
            return None
        rank, rest = len(x) + len(axes), iter(x)
        at = {a % rank for a in axes}
        return tuple(ONE if axis in at else next(rest) for axis in range(rank))

    def _shape_of_squeeze(self, node: ir.Node, x: Sizes) -> Sizes | None:
        axes = read.ints(node, "axes", 1) if "axes" in node.attributes or _has(node, 1) else None
        if axes is None:
            return None
        at = {a % len(x) for a in axes}
        return tuple(size for axis, size in enumerate(x) if axis not in at)

    def _shape_of_concat(self, node: ir.Node, x: Sizes) -> Sizes | None:
        shapes = [self.shape(v) for v in node.inputs]
        axis = node.attributes.get_int("axis", 0) % len(x)
        if any(s is None or len(s) != len(x) for s in shapes):
            return None
        total = list(x)
        for s in shapes[1:]:
            assert s is not None
            total[axis] += s[axis]
        return tuple(total)

    def _shape_of_gather(self, node: ir.Node, x: Sizes) -> Sizes | None:
        at, axis = self.shape(node.inputs[1]), node.attributes.get_int("axis", 0) % len(x)
        return None if at is None else (*x[:axis], *at, *x[axis + 1 :])

    def _shape_of_slice(self, node: ir.Node, x: Sizes) -> Sizes | None:
        found = list(x)
        parts = _slices(self, node, len(x))
        if parts is None:
            return None
        for axis, start, end, step in parts:
            size, zero = x[axis], Size.of(0)
            if step != 1 or not start.is_size:
                found[axis] = self._fresh()
            elif size.number is not None and start.number is not None and end.number is not None:
                found[axis] = Size.of(len(range(size.number)[start.number : end.number]))
            elif start == zero and (end == size or (end.number or 0) >= END):
                pass
            elif start == zero and (size.number or 0) > 0 and end.is_size:
                found[axis] = Size.of(f"{CLAMPED}({size.number}, {end})")
                self._clamped[found[axis]] = end
            else:
                found[axis] = self._fresh()
        return tuple(found)

    def _shape_of_expand(self, node: ir.Node, x: Sizes) -> Sizes | None:
        return self._broadcast([x, self._as_shape(self.content(node.inputs[1]))])

    def _shape_of_reshape(self, node: ir.Node, x: Sizes) -> Sizes | None:
        return self.reshaped(x, node)

    def reshaped(self, x: Sizes, node: ir.Node, *, meant: bool = False) -> Sizes | None:
        """The shape that a Reshape gives to a tensor of shape `x`.

        Without allowzero a size that is computed as 0 copies another one, and a -1 beside it
        makes up for that: of an empty tensor comes one of another shape than was `meant`. With
        `meant` the answer leaves this out; without, such sizes are unknown.
        """
        content = self.content(node.inputs[1]) if _has(node, 1) else None
        if content is None:
            return None
        keep = not node.attributes.get_int("allowzero", 0)
        wary = keep and not meant and any(e.number == -1 for e in content.entries)
        found, hole = [], None
        for axis, entry in enumerate(content.entries):
            if entry.number == -1:
                hole = axis
                found.append(ONE)
            elif entry.number == 0 and keep:
                found.append(x[axis] if axis < len(x) else self._fresh())
            elif not entry.is_size or (wary and not _vanishes_with(x[axis : axis + 1], entry)):
                found.append(self._fresh())
            else:
                found.append(entry)
        if hole is not None:
            found[hole] = product(x).over(product(found)) or self._fresh()
        return tuple(found)

    def _shape_of_matmul(self, node: ir.Node, x: Sizes) -> Sizes | None:
        y = self.shape(node.inputs[1])
        if y is None or len(x) < 2 or len(y) < 2:
            return None
        batch = self._broadcast([x[:-2], y[:-2]])
        return None if batch is None else (*batch, x[-2], y[-1])

    def _shape_of_gemm(self, node: ir.Node, x: Sizes) -> Sizes | None:
        y = self.shape(node.inputs[1])
        if y is None or len(x) != 2 or len(y) != 2:
            return None
        a, b = (node.attributes.get_int(k, 0) for k in ("transA", "transB"))
        return (x[1] if a else x[0], y[0] if b else y[1])

    def _reduced(self, node: ir.Node, x: Sizes) -> Sizes | None:
        axes = read.ints(node, "axes", 1) if "axes" in node.attributes or _has(node, 1) else None
        if not axes:
            return None
        at, keep = {a % len(x) for a in axes}, node.attributes.get_int("keepdims", 1)
        found = [ONE if i in at else s for i, s in enumerate(x)]
        return tuple(s for i, s in enumerate(found) if keep or i not in at)

    _shape_of_reducemean = _shape_of_reducesum = _shape_of_reducemax = _reduced
    _shape_of_reducemin = _shape_of_reducel2 = _reduced

    def _shape_of_split(self, node: ir.Node, x: Sizes) -> Sizes | None:
        axis = node.attributes.get_int("axis", 0) % len(x)
        for output in node.outputs:  # onnx computes the axis that is split; the others stay
            have = self._declared(output)
            own = self._fresh() if have is None or len(have) != len(x) else have[axis]
            self._shapes[output] = (*x[:axis], own, *x[axis + 1 :])
        return self._shapes[node.outputs[0]]

    def _shape_of_attention(self, node: ir.Node, x: Sizes) -> Sizes | None:
        v, heads = self.shape(node.inputs[2]), node.attributes.get_int("q_num_heads", 0)
        if v is None or len(v) != len(x):
            return None
        if len(x) == 4:
            return (*x[:3], v[3])
        size = v[2].over(Size.of(node.attributes.get_int("kv_num_heads", 1)))
        return None if size is None else (*x[:2], size * Size.of(heads))

    # ---- contents ----------------------------------------------------------------------------

    def _constant(self, value: ir.Value) -> Content | None:
        tensor = None if value.is_graph_input() else ir.convenience.get_const_tensor(value)
        if tensor is None or tensor.size > LIMIT or len(tensor.shape) > 1:
            return None
        array = read.constant(value)
        if array is None or array.dtype.kind not in "iub":
            return None
        return Content(tuple(Size.of(int(n)) for n in array.reshape(-1)), array.ndim)

    def _opaque(self, value: ir.Value) -> Content | None:
        """A name for each entry of an integer tensor of which only the length is known."""
        shape = self.shape(value)
        if shape is None or len(shape) > 1 or value.dtype not in INTEGERS:
            return None
        length = shape[0].number if shape else 1
        if length is None or length > LIMIT:
            return None
        return Content(tuple(self._fresh(OPAQUE) for _ in range(length)), len(shape))


def _fits(content: Content, dtype: ir.DataType | None) -> bool:
    """Whether a tensor of this type holds these numbers; sizes fit any."""
    numbers = [n for e in content.entries if (n := e.number) is not None]
    if dtype == ir.DataType.BOOL:
        return all(n in (0, 1) for n in numbers)
    if dtype not in INTEGERS or len(content.entries) > LIMIT:
        return False
    bits = 63 if dtype == ir.DataType.INT64 else 31
    return all(-(1 << bits) <= n < 1 << bits for n in numbers)


def _vanishes_with(have: Sizes, size: Size) -> bool:
    """Whether `size` is 0 only where the one of `have` is, or never."""
    if any(not names and factor > 0 for names, factor in size.terms) or have == (size,):
        return True
    if not have or len(size.terms) != 1:
        return False
    wanted = set(size.terms[0][0])
    return all(wanted <= set(names) for names, _ in have[0].terms)


def _better(own: Size, declared: Size) -> Size:
    """What was derived, unless only the graph has a name for it."""
    if declared.number is not None:
        return declared
    if declared.is_public and not own.is_public:
        return own if (own.name or "").startswith(CLAMPED) else declared
    return own


def _has(node: ir.Node, index: int) -> bool:
    return len(node.inputs) > index and node.inputs[index] is not None


def _slices(facts: Facts, node: ir.Node, rank: int) -> list[tuple[int, Size, Size, int]] | None:
    """(axis, start, end, step) of a Slice, where axes and steps are constants."""
    if len(node.inputs) < 3:
        return None
    starts, ends = (facts.content(v) for v in node.inputs[1:3])
    if starts is None or ends is None:
        return None
    n = len(starts.entries)
    axes = read.ints(node, "axes", 3) if _has(node, 3) else list(range(n))
    steps = read.ints(node, "steps", 4) if _has(node, 4) else [1] * n
    if axes is None or steps is None or not len(axes) == len(steps) == n == len(ends.entries):
        return None
    axes = [a % rank for a in axes]
    return list(zip(axes, starts.entries, ends.entries, steps, strict=True))
