"""Start Triton kernels without the time that Triton takes to find out what it has compiled already."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

# What is to be one operation, rounded once, says so in the kernels. Versions of Triton differ in what they fuse themselves.
_OPTIONS = {"enable_fp_fusion": False}


def launch(
    kernel: Any, programs: int, tensors: tuple[Tensor, ...], sizes: tuple[int, ...], constants: tuple[Any, ...], **options: Any
) -> None:
    """Start ``programs`` of a kernel on the device of its first tensor.

    Args:
        kernel: Its parameters are the following, in their order.
        programs: How many, at least one.
        tensors: Pointers.
        sizes: Integers.
        constants: What the kernel is compiled for.
        options: Of Triton.
    """
    x = tensors[0]
    if not x.is_cuda:
        kernel[(programs,)](*tensors, *sizes, *constants, **options, **_OPTIONS)
        return
    device = x.get_device()
    if device != torch.cuda.current_device():
        with torch.cuda.device_of(x):
            launch(kernel, programs, tensors, sizes, constants, **options)
        return
    # What Triton compiles a kernel for, besides the constants. It finds all of that out itself, but takes as long as the GPU
    # takes for a small layer.
    kind = (
        device,
        constants,
        *options.items(),
        *[(t.dtype, t.data_ptr() & 15) for t in tensors],
        *[(n == 1, n & 15 == 0, n >> 31) for n in sizes],
    )
    compiled = _compiled(kernel)
    known = compiled.get(kind)
    if known is None:
        compiled[kind] = kernel[(programs,)](*tensors, *sizes, *constants, **options, **_OPTIONS)
    else:
        known[(programs, 1, 1)](*tensors, *sizes, *constants)


@functools.cache
def _compiled(kernel: Any) -> dict[tuple[Any, ...], Any]:
    """Compiled forms of a kernel, by the kinds of its arguments."""
    return {}
