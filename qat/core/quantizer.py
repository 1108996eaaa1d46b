"""One Q/DQ site: its range, its number format and its state."""

from __future__ import annotations

import enum
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import QATError
from ..support.modes import assigned, hooked
from .kernels import fake_quantize_range, fake_quantize_weight
from .numerics import INT8, SCALE_MIN, Format, amax_to_scale, fake_quantize_node, largest_magnitude, traced_fake_quantize_weight


class State(str, enum.Enum):
    """What a :class:`Quantizer` does to the tensor that passes through it."""

    OFF = "off"  # nothing: the float model
    COLLECTING = "collecting"  # show it to the observer, pass it on unchanged
    QUANTIZING = "quantizing"  # fake-quantize
    EXPORTING = "exporting"  # fake-quantize by the operator that the ONNX exporter knows


class Observer(Protocol):
    """What calibration attaches to a collecting :class:`Quantizer`."""

    def observe(self, x: Tensor) -> None: ...


class _Memory:
    """What a :class:`Quantizer` last returned. An object of its own, since setting attributes of a module is slow.

    Attributes:
        last: The tensor, the result, and what tells whether they still belong together.
        kept: The result, while there are readers that have not had it.
        unread: How many these are.
    """

    __slots__ = ("__weakref__", "kept", "last", "unread")

    def __init__(self) -> None:
        self.last: tuple[weakref.ref[Tensor], weakref.ref[Tensor], tuple[Any, ...]] | None = None
        self.kept: Tensor | None = None
        self.unread = 0


class Quantizer(nn.Module):
    """Fake-quantizes activations with one scale a tensor.

    The range is the persistent buffer ``amax`` (float32, shape ``()``), a parameter if it is learned. Its shape never
    changes, and zero means "no range yet": the site then passes tensors through unchanged. Loading a state dict that
    holds ranges switches the site on.

    Args:
        fmt: Number format.
        learned: Make ``amax`` a parameter that is trained by the LSQ gradient.
        device: Where ``amax`` lives.

    Example:
        >>> site = Quantizer()
        >>> site.set_range(torch.tensor(127.0))
        >>> site(torch.tensor([0.4, 1.6, 500.0]))
        tensor([  0.,   2., 127.])
    """

    amax: Tensor
    export_scale: Tensor
    axis: int | None = None
    # Modules that read the tensor, each with one call.
    readers: int = 1
    _memory: _Memory

    def __init__(self, fmt: Format = INT8, *, learned: bool = False, device: torch.device | None = None) -> None:
        super().__init__()
        self.fmt = fmt
        # Flags are Python attributes: averaging callbacks would turn an integer buffer into nonsense.
        self.state = State.OFF
        self.observer: Observer | None = None
        self._register_amax((), learned, device)

    def _register_amax(self, shape: tuple[int, ...], learned: bool, device: torch.device | None) -> None:
        self._memory = _Memory()
        zeros = torch.zeros(shape, dtype=torch.float32, device=device)
        if learned:
            self.amax = nn.Parameter(zeros)
        else:
            self.register_buffer("amax", zeros)

    @property
    def learned(self) -> bool:
        """Whether ``amax`` is trained."""
        return "amax" in self._parameters

    @property
    def has_range(self) -> bool:
        """Whether ``amax`` has been set. Reads the tensor: synchronises on CUDA."""
        return bool((self.amax.abs() > 0).all())

    @property
    def scale(self) -> Tensor:
        """``abs(amax) / qmax``, float32, shape of ``amax``, at least ``SCALE_MIN``."""
        return amax_to_scale(self.amax, self.fmt)

    def set_range(self, amax: Tensor) -> None:
        """Store ``amax`` and start quantizing.

        Args:
            amax: Shape of ``self.amax``, finite, ``>= 0``. Zeros are raised to ``qmax * SCALE_MIN``.

        Raises:
            QATError: For another shape, or a negative or non-finite value.
        """
        set_ranges({self: amax})

    def set_state(self, state: State) -> None:
        """Switch the site.

        Raises:
            QATError: When it should quantize but has no range.
        """
        if state in (State.QUANTIZING, State.EXPORTING) and not self.has_range:
            raise QATError("no data seen, amax is unset. Run qat.calibrate(model, loader) first")
        self.state = state

    def forward(self, x: Tensor) -> Tensor:
        if self.state is State.QUANTIZING:
            # First, since compilers guard what they see.
            if torch.compiler.is_compiling():
                return self._traced(x)
            if (known := self._result_for(x)) is not None:
                return known
            result = self._fake_quantize(x)
            self._remember(x, result)
            return result
        if self.state is State.COLLECTING and self.observer is not None:
            self.observer.observe(x)
        elif self.state is State.EXPORTING:
            return fake_quantize_node(x, self.export_scale, self.axis, self.fmt.name)
        return x

    def _traced(self, x: Tensor) -> Tensor:
        if self.readers > 1 and torch.is_grad_enabled():
            # Where branches meet, compilers would keep the result and what tells whether it was clipped, for the backward
            # pass: more than the tensor itself, from which both follow.
            return checkpoint(self._fake_quantize, x, use_reentrant=False, preserve_rng_state=False)
        return self._fake_quantize(x)

    def quantizes_alone(self) -> bool:
        """Whether the site only quantizes, by a range that is not learned, for one reader, and nobody watches."""
        watched = self._forward_hooks or self._forward_pre_hooks or self._backward_hooks or self._backward_pre_hooks
        return self.state is State.QUANTIZING and self.readers == 1 and "amax" in self._buffers and not watched

    def _result_for(self, x: Tensor) -> Tensor | None:
        """What the last call gave, if it was for this very tensor: sites that read one tensor share their quantizer.

        The result is kept until all readers have had it, or its tensor is gone; afterwards only if a layer saved it.
        """
        memory = self._memory
        if memory.last is None:
            return None
        seen, last, state = memory.last
        result = last()
        # Somebody may have changed either in place.
        if seen() is not x or result is None or state != self._call_state(x, result):
            return None
        memory.unread -= 1
        if memory.unread <= 0:
            memory.kept = None
        return result

    def _remember(self, x: Tensor, result: Tensor) -> None:
        if type(x) is not Tensor:
            return
        if result.requires_grad and x.is_leaf:
            # The same leaf may come again after a backward pass, which frees what the result's gradient needs.
            return
        if x.is_inference() or result.is_inference() or self.amax.is_inference():
            return
        memory = self._memory
        # What was kept of another tensor goes first, with its callback.
        memory.kept = memory.last = None
        memory.unread = self.readers - 1
        forget = None
        if memory.unread > 0:
            memory.kept, forget = result, _forgetting(weakref.ref(memory))
        memory.last = weakref.ref(x, forget), weakref.ref(result), self._call_state(x, result)

    def _call_state(self, x: Tensor, result: Tensor) -> tuple[Any, ...]:
        """What tells whether ``result`` still is what ``x`` gives."""
        amax = self.amax
        return x._version, result._version, amax._version, x.requires_grad, amax.requires_grad, torch.is_grad_enabled()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_memory": _Memory()}

    def _fake_quantize(self, x: Tensor) -> Tensor:
        return fake_quantize_range(x, self.amax, axis=self.axis, fmt=self.fmt)

    def range_scale(self, x: Tensor) -> Tensor:
        """The scale to quantize ``x`` with."""
        return self.scale

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Quantizer:
        # model.half() and model.bfloat16() would round the range, or lose a small one: only the device may change.
        def keep_dtype(t: Tensor) -> Tensor:
            moved = fn(t)
            return moved if moved.dtype == t.dtype else t.to(moved.device)

        super()._apply(keep_dtype, recurse)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if prefix + "amax" in state_dict:
            self.state = State.QUANTIZING if self.has_range else State.OFF

    def extra_repr(self) -> str:
        where = "per-tensor" if self.axis is None else f"per-channel axis={self.axis}"
        learned = ", learned" if self.learned else ""
        if self.amax.is_meta:
            amax = "meta"
        elif self.amax.numel() == 1:
            amax = f"{self.amax.abs().item():.4g}"
        else:
            amax = f"[{self.amax.abs().min().item():.4g}, {self.amax.abs().max().item():.4g}]"
        return f"{self.fmt}, {where}, amax={amax}{learned}, {self.state.value}"


def _forgetting(memory: weakref.ref[_Memory]) -> Callable[[Any], None]:
    """Called when a tensor is gone whose result not all readers have had."""

    def forget(_: Any) -> None:
        if (alive := memory()) is not None:
            alive.kept = None

    return forget


class WeightQuantizer(Quantizer):
    """Fake-quantizes a weight, per output channel or with one scale.

    While ``follow`` is true the range is the maximum of the weight that passes through, taken anew each time, and
    ``amax`` only records it; otherwise ``amax`` is used as it is stored.

    Args:
        fmt: Number format.
        axis: Channel dimension; ``None`` for one scale a tensor.
        channels: Size of that dimension.
        follow: Let the range follow the weight.
        learned: Make ``amax`` a parameter; excludes ``follow``.
        device: Where ``amax`` lives.
    """

    def __init__(
        self,
        fmt: Format = INT8,
        *,
        axis: int | None = None,
        channels: int = 1,
        follow: bool = True,
        learned: bool = False,
        device: torch.device | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.fmt = fmt
        self.axis = axis
        self.follow = follow and not learned
        self.state = State.OFF
        self.observer = None
        self._register_amax(() if axis is None else (channels,), learned, device)

    def weight_amax(self, weight: Tensor) -> Tensor:
        """Largest magnitude of ``weight``, float32, shape of ``self.amax``."""
        return largest_magnitude(weight.detach(), self.axis)

    def _fake_quantize(self, x: Tensor) -> Tensor:
        if not self.follow:
            return super()._fake_quantize(x)
        if torch.compiler.is_compiling():
            return traced_fake_quantize_weight(x, self.axis, self.fmt)
        return fake_quantize_weight(x, lambda: self.range_scale(x), axis=self.axis, fmt=self.fmt)

    def range_scale(self, x: Tensor) -> Tensor:
        return amax_to_scale(self.weight_amax(x), self.fmt) if self.follow else self.scale

    def refresh(self, weight: Tensor) -> None:
        """Record the range of ``weight`` in ``amax`` if the range follows it; otherwise do nothing."""
        if self.follow:
            with torch.no_grad():
                self.amax.copy_(self.weight_amax(weight).clamp(min=self.fmt.qmax * SCALE_MIN))


def set_ranges(ranges: Mapping[Quantizer, Tensor]) -> None:
    """:meth:`Quantizer.set_range` for several sites, with one look at the values on each device.

    Args:
        ranges: ``amax`` by site.

    Raises:
        QATError: As there. Nothing has changed then.
    """
    groups: dict[tuple[torch.device, int], list[Quantizer]] = {}
    for site, amax in ranges.items():
        if amax.shape != site.amax.shape:
            raise QATError(f"amax has shape {tuple(amax.shape)}, this site needs {tuple(site.amax.shape)}")
        groups.setdefault((amax.device, site.fmt.qmax), []).append(site)
    # A few calls for all: on a GPU each one for a site by itself would cost as much as copying the range.
    found: dict[Quantizer, Tensor] = {}
    for (_, qmax), sites in groups.items():
        values = torch.cat([ranges[site].detach().reshape(-1).to(torch.float32) for site in sites])
        if not bool((values.isfinite() & (values >= 0)).all()):
            raise QATError("amax must be finite and not negative")
        parts = values.clamp(min=qmax * SCALE_MIN).split([site.amax.numel() for site in sites])
        found.update(zip(sites, parts, strict=True))
    with torch.no_grad():
        for site, amax in found.items():
            site.amax.copy_(amax.view_as(site.amax))
            site.state = State.QUANTIZING


def quantizers(model: nn.Module) -> Iterator[tuple[str, Quantizer]]:
    """Every distinct quantizer of ``model`` with the first path it is found under."""
    for name, module in model.named_modules():
        if isinstance(module, Quantizer):
            yield name, module


@contextmanager
def watching(model: nn.Module, look: Callable[[str, Quantizer, Tensor], None]) -> Iterator[None]:
    """While this lasts, ``look(path, site, x)`` is called for every tensor that reaches a site, before the site acts."""

    def hook(path: str, site: Quantizer, args: tuple[Any, ...]) -> None:
        look(path, site, args[0].detach())

    with hooked(site.register_forward_pre_hook(partial(hook, path)) for path, site in list(quantizers(model))):
        yield


def switched_off(model: nn.Module) -> AbstractContextManager[None]:
    """While this lasts every site passes tensors through unchanged: the float model, to the bit."""
    return assigned([site for _, site in quantizers(model)], "state", State.OFF)


def passing(model: nn.Module) -> AbstractContextManager[None]:
    """As :func:`switched_off`, but every site is called: attention whose sites are off may take PyTorch's fused path."""
    return assigned([site for _, site in quantizers(model)], "state", State.COLLECTING)


def is_prepared(model: nn.Module) -> bool:
    """Whether ``model`` holds any quantizer."""
    return next(quantizers(model), None) is not None
