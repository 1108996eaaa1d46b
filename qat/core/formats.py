"""Number formats and their grids, without PyTorch: ranges to scales, values to codes, for arrays of NumPy.

:mod:`qat.core.numerics` holds the same formulas for tensors, with gradients. Both give the same bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import QATError

# 2 ** -24 is the smallest positive float16: a scale below it would become zero in an FP16 engine, and TensorRT
# refuses scales that are not positive.
SCALE_MIN = 2.0**-24


@dataclass(frozen=True)
class Format:
    """An integer number format.

    Attributes:
        name: Unique; what configurations and reports show.
        qmin: Smallest code.
        qmax: Largest code; ``amax`` maps onto it.
    """

    name: str
    qmin: int
    qmax: int

    def __str__(self) -> str:
        return self.name


INT8 = Format("int8", -128, 127)
INT4 = Format("int4", -8, 7)
FORMATS = {fmt.name: fmt for fmt in (INT8, INT4)}


def amax_to_scale(amax: ArrayLike, fmt: Format = INT8) -> NDArray[np.float32]:
    """``abs(amax) / qmax`` in float32, at least ``SCALE_MIN``.

    Args:
        amax: Any shape. Zero (a dead tensor or channel) gives ``SCALE_MIN``, NaN stays NaN.
        fmt: Number format.

    Returns:
        Same shape, float32, positive.

    Example:
        >>> amax_to_scale([127.0, 254.0, 0.0]).tolist()
        [1.0, 2.0, 5.960464477539063e-08]
    """
    wide = np.asarray(amax, np.float32)
    return np.asarray(np.maximum(np.abs(wide) / np.float32(fmt.qmax), np.float32(SCALE_MIN)))


def quantize(x: ArrayLike, scale: ArrayLike, *, axis: int | None = None, fmt: Format = INT8) -> NDArray[np.float32]:
    """The codes of ``x``, held in float32 so that a NaN stays a NaN.

    ONNX QuantizeLinear, opset 13, ``zero_point = 0``.

    Args:
        x: Any shape, float32 or float16.
        scale: Positive, float32. Scalar, or shape ``(x.shape[axis],)``.
        axis: Channel dimension of a per-channel ``scale``.
        fmt: Number format; codes lie in ``[fmt.qmin, fmt.qmax]``.

    Returns:
        Same shape, float32. Ties go to even, infinities to the ends of the range.

    Raises:
        QATError: If ``scale`` does not fit ``axis``.

    Example:
        >>> quantize([0.25, 0.75, -99.0], 0.5).tolist()
        [0.0, 2.0, -128.0]
    """
    wide, step = np.asarray(x, np.float32), np.asarray(scale, np.float32)
    check_scale(wide.shape, step.shape, axis)
    step = step.reshape(() if axis is None else [-1 if d == axis % wide.ndim else 1 for d in range(wide.ndim)])
    # Divide, do not multiply by 1 / scale: ONNX divides, and the two differ at ties. A quotient may be beyond float32.
    with np.errstate(over="ignore"):
        return np.asarray(np.rint(wide / step).clip(fmt.qmin, fmt.qmax))


def check_scale(shape: tuple[int, ...], scale_shape: tuple[int, ...], axis: int | None) -> None:
    """Raise :class:`QATError` unless a scale fits ``x`` of a shape along ``axis``."""
    if axis is None:
        if any(size != 1 for size in scale_shape):
            raise QATError(f"scale has {math.prod(scale_shape)} elements; pass axis for per-channel scales")
    elif not -len(shape) <= axis < len(shape):
        raise QATError(f"axis {axis} is out of range for x of shape {tuple(shape)}")
    elif tuple(scale_shape) != (shape[axis],):
        raise QATError(f"scale has shape {tuple(scale_shape)}, but axis {axis} of x has size {shape[axis]}")
