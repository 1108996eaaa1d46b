"""Settings of ``torch.compile`` for training a prepared model."""

from __future__ import annotations

from typing import Any

import torch._inductor

# Inductor writes a tensor to memory where several kernels need it, instead of computing it in each, once it is made of this
# many reads or operations. Its own limits (4, 30 and 8) fit float models: a normalization makes 5 reads, and what is compared
# with the ends of the range in the backward pass would be written in float32. The kernels between the convolutions of a ResNet
# then move 1.9 times the bytes of the float ones (2.6 with learned scales), and 1.1 (1.2) by these. Without any limit it is the
# same, but a transformer would compute its long sums again and again.
_LIMITS = {"realize_reads_threshold": 20, "realize_opcount_threshold": 200, "realize_acc_reads_threshold": 32}


def compile_options(mode: str | None = None) -> dict[str, Any]:
    """Options of ``torch.compile`` under which fake quantization is computed in the kernels around it.

    Without them a prepared model trains, too, with the same results, only slower. For GPUs; benchmarks/RESULTS.md has figures.
    The best are those of the mode ``reduce-overhead``, whose CUDA graphs spare the host all launches; they reuse the memory of
    what a step returns, so clone what is to outlive the next one.

    Args:
        mode: A mode of ``torch.compile``, whose options are added, since it takes either a mode or options.

    Returns:
        For ``torch.compile(model, options=...)``.

    Raises:
        RuntimeError: By torch, for a mode that it does not have.

    Example:
        >>> import torch
        >>> model = torch.compile(torch.nn.Linear(2, 2), options=compile_options("max-autotune"))
    """
    known = set(torch._inductor.list_options())
    limits = {name: value for name, value in _LIMITS.items() if name in known}
    return {**torch._inductor.list_mode_options(mode or "default"), **limits}
