"""DLPack tensors read from their capsules: where they lie, of what type, in which order.

ONNX Runtime imports and exports capsules itself, but says little of what it refuses, and its
1.31 spells booleans as bytes; so the fields are read, and that one is mended, through ctypes.
The layout is that of dlpack.h, unchanged since its first version:
https://dmlc.github.io/dlpack/latest/c_api.html
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import InputError
from .signature import Array

CPU, CUDA, CUDA_HOST = 1, 2, 3  # DLDeviceType; the third is pinned memory of the host
UINT, BFLOAT, BOOL = 1, 4, 6  # DLDataTypeCode

# DLPack's (code, bits), our name, ONNX's number. bfloat16 has no numpy type: its bits are uint16.
_TYPES = [
    ((2, 32), "float32", 1),
    ((1, 8), "uint8", 2),
    ((0, 8), "int8", 3),
    ((1, 16), "uint16", 4),
    ((0, 16), "int16", 5),
    ((0, 32), "int32", 6),
    ((0, 64), "int64", 7),
    ((6, 8), "bool", 9),
    ((2, 16), "float16", 10),
    ((2, 64), "float64", 11),
    ((1, 32), "uint32", 12),
    ((1, 64), "uint64", 13),
    ((4, 16), "bfloat16", 16),
]
_NAMES = {pair: name for pair, name, _ in _TYPES}
ELEMENT_TYPES = {name: number for _, name, number in _TYPES}
DTYPES = {number: name for _, name, number in _TYPES}


class _Device(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int32), ("index", ctypes.c_int32)]


class _DataType(ctypes.Structure):
    _fields_ = [
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
    ]


class _Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _DataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


@dataclass(frozen=True)
class Layout:
    """What a capsule says of its tensor.

    Attributes:
        pointer: The address of the first element; 0 where there is none.
        device: DLPack's (device type, index).
        dtype: Our name of the element type.
        shape: The sizes.
        strides: Steps in elements, or None for rows one after the other.
    """

    pointer: int
    device: tuple[int, int]
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None

    @property
    def contiguous(self) -> bool:
        """Whether the elements lie one after the other, the last axis fastest."""
        if self.strides is None or 0 in self.shape:
            return True
        step = 1
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size != 1 and stride != step:
                return False
            step *= size
        return True


def capsule_of(value: Any, what: str, stream: int | None = None) -> Any:
    """The capsule of a tensor; `stream` as the protocol has it, for tensors on a device.

    Raises:
        InputError: The tensor's own library does not give it; its words are in the message.
    """
    try:
        return value.__dlpack__() if stream is None else value.__dlpack__(stream=stream)
    except Exception as e:  # each library has its own: a gradient, a byte order, a sparse layout
        raise InputError(
            f"{what} was given a {type(value).__module__}.{type(value).__name__} "
            f"that DLPack cannot hand over: {e}",
            hint="a dense tensor without a gradient: tensor.detach().contiguous()",
        ) from e


def layout(capsule: Any, what: str) -> Layout:
    """What the capsule says, which stays unused.

    Raises:
        InputError: Its element type is none that can be bound (complex, quantized, vectors).
    """
    t = _tensor(capsule)
    pair = (t.dtype.code, t.dtype.bits)
    if t.dtype.lanes != 1 or pair not in _NAMES:
        raise InputError(
            f"{what} was given a tensor of DLPack's type code {pair[0]} in {pair[1]} bits, "
            "which cannot be bound",
            hint=f"one of {', '.join(ELEMENT_TYPES)}",
        )
    n = t.ndim
    return Layout(
        (t.data or 0) + t.byte_offset,
        (t.device.type, t.device.index),
        _NAMES[pair],
        tuple(t.shape[:n]) if n else (),
        tuple(t.strides[:n]) if n and t.strides else None,
    )


def retype(capsule: Any, old: int, new: int) -> None:
    """Change the type code in an unused capsule from `old` to `new`, of the same width."""
    t = _tensor(capsule)
    if t.dtype.code == old:
        t.dtype.code = new


def host_array(place: Layout) -> Array:
    """The tensor on the host as a numpy view, which does not keep its memory alive.

    bfloat16 comes as its bits in uint16.
    """
    dtype = storage(place.dtype)
    if 0 in place.shape:
        return np.empty(place.shape, dtype)
    steps = place.strides or row_major(place.shape)
    span = 1 + sum((n - 1) * s for n, s in zip(place.shape, steps, strict=True))
    memory: Any = (ctypes.c_char * (span * dtype.itemsize)).from_address(place.pointer)
    return np.ndarray(place.shape, dtype, memory, strides=[s * dtype.itemsize for s in steps])


def storage(dtype: str) -> np.dtype[Any]:
    """The numpy type that holds the bits of a dtype."""
    return np.dtype("uint16" if dtype == "bfloat16" else dtype)


def row_major(shape: Sequence[int]) -> list[int]:
    """Steps in elements of a contiguous tensor."""
    return [math.prod(shape[i + 1 :]) for i in range(len(shape))]


def _tensor(capsule: Any) -> _Tensor:
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    address = get(capsule, b"dltensor")
    assert address is not None  # it raises ValueError itself where the name is another
    return _Tensor.from_address(address)
