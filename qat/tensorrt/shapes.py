"""Optimization profiles: the shapes that an engine is built for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import QATError
from .log import BuildLog

Shape = Sequence[int]


def profiles_of(
    network: Any, shapes: Mapping[str, tuple[Shape, Shape, Shape]], batch: int | tuple[int, int, int]
) -> dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
    """Smallest, tuned and largest shape of every input."""
    sizes = (batch,) * 3 if isinstance(batch, int) else tuple(batch)
    if len(sizes) != 3 or not 1 <= sizes[0] <= sizes[1] <= sizes[2]:
        raise QATError(f"batch={batch}: give (min, opt, max) with 1 <= min <= opt <= max")
    tensors = [network.get_input(i) for i in range(network.num_inputs)]
    if unknown := [name for name in shapes if name not in [tensor.name for tensor in tensors]]:
        names = ", ".join(tensor.name for tensor in tensors)
        raise QATError(f"shapes: the graph has no input {unknown[0]!r}. Its inputs are {names}")
    profiles = {}
    for tensor in tensors:
        declared = tuple(tensor.shape)
        if tensor.is_shape_tensor:
            raise QATError(f"input {tensor.name!r} decides about shapes in the graph. Export with that value as a constant")
        if tensor.name in shapes:
            profiles[tensor.name] = _checked(tensor.name, declared, shapes[tensor.name])
            continue
        if still := [i for i, size in enumerate(declared) if size == -1 and i > 0]:
            raise QATError(
                f"input {tensor.name!r} of shape {list(declared)} is open in dimension {still[0]}. Give its sizes: "
                f"shapes={{{tensor.name!r}: (min, opt, max)}}, three shapes"
            )
        low, opt, high = (tuple(n if size == -1 else size for size in declared) for n in sizes)
        profiles[tensor.name] = low, opt, high
    return profiles


def _checked(name: str, declared: tuple[int, ...], given: Any) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    try:
        low, opt, high = (tuple(int(size) for size in shape) for shape in given)
    except (TypeError, ValueError) as error:
        raise QATError(f"shapes[{name!r}] = {given}: give three shapes (min, opt, max)") from error
    if not len(low) == len(opt) == len(high) == len(declared):
        raise QATError(f"shapes[{name!r}] = {given}: the input has {len(declared)} dimensions, {list(declared)}")
    for i, size in enumerate(declared):
        if not 0 <= low[i] <= opt[i] <= high[i]:
            raise QATError(f"shapes[{name!r}]: dimension {i} needs 0 <= min <= opt <= max, not {low[i]}, {opt[i]}, {high[i]}")
        if size != -1 and (low[i], high[i]) != (size, size):
            raise QATError(f"shapes[{name!r}]: dimension {i} is fixed to {size} in the graph. Export it as a dynamic dimension")
    return low, opt, high


def add_profile(trt: Any, builder: Any, config: Any, network: Any, profiles: Mapping[str, Any], log: BuildLog) -> Any:
    """An optimization profile for the inputs with open dimensions; None if there are none."""
    open_inputs = [
        name for i in range(network.num_inputs) if -1 in (tensor := network.get_input(i)).shape for name in [tensor.name]
    ]
    if not open_inputs:
        return None
    profile = builder.create_optimization_profile()
    for name in open_inputs:
        profile.set_shape(name, *profiles[name])
    if config.add_optimization_profile(profile) < 0:
        raise QATError(f"TensorRT refuses the shapes of {', '.join(open_inputs)}{log.quote()}")
    return profile
