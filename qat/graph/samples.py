"""Random inputs for a graph that comes without any."""

from __future__ import annotations

import numpy as np
from onnx import ModelProto, TensorProto, helper

from ..errors import QATError


def random_inputs(model: ModelProto, *, batch: int = 2, seed: int = 0) -> dict[str, np.ndarray]:
    """Normal noise for float inputs, 0 and 1 for the others.

    Args:
        model: Its inputs give names, types and shapes.
        batch: Size of an open first dimension.
        seed: Of the random numbers.

    Returns:
        Arrays by input name.

    Raises:
        QATError: For an input with another open dimension, or none that NumPy can hold.
    """
    generator = np.random.default_rng(seed)
    stored = {tensor.name for tensor in model.graph.initializer}
    inputs = {}
    for value in model.graph.input:
        if value.name in stored:
            continue
        kind = value.type.tensor_type
        if kind.elem_type in (TensorProto.UNDEFINED, TensorProto.STRING) or not kind.HasField("shape"):
            raise QATError(f"input {value.name!r} is no tensor of known shape: pass inputs")
        shape = []
        for i, dim in enumerate(kind.shape.dim):
            if not dim.HasField("dim_value") and i:
                raise QATError(f"input {value.name!r}: dimension {i} is open, so its size is unknown: pass inputs")
            shape.append(dim.dim_value if dim.HasField("dim_value") else batch)
        dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type)
        floating = kind.elem_type in (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16)
        noise = generator.standard_normal(shape) if floating else generator.integers(0, 2, shape)
        inputs[value.name] = np.asarray(noise).astype(dtype)
    return inputs
