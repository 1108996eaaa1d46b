"""TensorRT's own calibrators: ranges for a graph without Q/DQ, measured while the engine is built.

TensorRT up to version 10 has them (deprecated since 10.1); 11 and TensorRT-RTX take Q/DQ graphs only, which
``qat.prepare``, ``qat.calibrate`` and ``qat.export_onnx`` make. Their algorithms are described in TensorRT's developer guide,
"Post-Training Quantization Using Calibration".
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ..errors import QATError
from ..support.files import check_target, read_whole, write_whole
from .context import TensorInfo, is_torch
from .log import BuildLog
from .runtime import Runtime

# First line of a cache: release and algorithm. The legacy calibrator writes a bare 0 (TensorRT 8.6).
CACHE_HEADER = re.compile(rb"(TRT-\S+|0)\r?\n")


class Calibrator:
    """Base of the four calibrators.

    Args:
        data: Batches: dicts of arrays by input name, or bare arrays where the graph has one input; NumPy or PyTorch. All have
            the shape that the build tunes for (the ``opt`` of ``batch`` and ``shapes``). Read once a build; nothing is
            read if the cache holds ranges.
        cache: File of ranges, read if it is there and else written after the build. It fits one graph and one release.
    """

    _base: ClassVar[str]

    def __init__(self, data: Iterable[Any], cache: str | os.PathLike[str] | None = None) -> None:
        self.data = data
        self.cache = None if cache is None else Path(cache)

    def check(self, runtime: Runtime) -> None:
        """Whether the runtime has this calibrator.

        Raises:
            QATError: If it does not.
        """
        if not runtime.has(self._base):
            raise QATError(
                f"calibrator: {runtime.title} has no calibrators. Quantize before the export: qat.prepare, "
                "qat.calibrate(model, loader), qat.export_onnx"
            )

    def attach(self, runtime: Runtime, config: Any, profile: Any, inputs: tuple[TensorInfo, ...]) -> Calibration:
        """Make the builder calibrate.

        Args:
            runtime: TensorRT up to version 10.
            config: Its builder configuration.
            profile: Its optimization profile, None for a static graph.
            inputs: The graph's inputs.

        Returns:
            The calibration, to be finished after the build.

        Raises:
            QATError: If the runtime has no calibrators, polygraphy is missing, or the cache is not one.
        """
        self.check(runtime)
        try:
            from polygraphy.backend.trt import Calibrator as make  # type: ignore[import-untyped]
        except ImportError as error:
            raise QATError("calibrator: needs polygraphy. Install it with `pip install polygraphy`") from error
        ranges = None
        if self.cache is not None and self.cache.is_file():
            ranges = read_whole(self.cache)
            if not CACHE_HEADER.match(ranges):
                raise QATError(f"{self.cache}: not a calibration cache of TensorRT. Remove it, or name another file")
        elif self.cache is not None:
            check_target(self.cache)
        batches = _Batches(self.data, inputs)
        handle = make(batches, BaseClass=getattr(runtime.module, self._base), **self._settings())
        # Not polygraphy's own file handling: it would write in place, and go on when it cannot.
        handle.cache_contents = ranges
        config.int8_calibrator = handle
        if profile is not None:
            config.set_calibration_profile(profile)
        return Calibration(handle, batches, self.cache if ranges is None else None)

    def _settings(self) -> dict[str, float]:
        return {}


class MinMaxCalibrator(Calibrator):
    """Full range of each tensor; TensorRT's advice for language models."""

    _base = "IInt8MinMaxCalibrator"


class EntropyCalibrator(Calibrator):
    """Range of least information loss, the older form: after layers are fused."""

    _base = "IInt8EntropyCalibrator"


class EntropyCalibrator2(Calibrator):
    """Range of least information loss, before layers are fused; TensorRT's advice for convolutional networks."""

    _base = "IInt8EntropyCalibrator2"


class LegacyCalibrator(Calibrator):
    """Range from a quantile of the histogram; kept by TensorRT for networks tuned with it.

    Args:
        data: As in :class:`Calibrator`.
        cache: As in :class:`Calibrator`.
        quantile: Share of the values inside the range, in [0, 1].
        regression_cutoff: TensorRT's cut-off for its regression, in [0, 1].
    """

    _base = "IInt8LegacyCalibrator"

    def __init__(
        self,
        data: Iterable[Any],
        cache: str | os.PathLike[str] | None = None,
        *,
        quantile: float = 0.5,
        regression_cutoff: float = 0.5,
    ) -> None:
        super().__init__(data, cache)
        for name, value in (("quantile", quantile), ("regression_cutoff", regression_cutoff)):
            if not 0 <= value <= 1:
                raise QATError(f"{name}={value}: choose a number in [0, 1]")
        self.quantile = quantile
        self.regression_cutoff = regression_cutoff

    def _settings(self) -> dict[str, float]:
        return {"quantile": self.quantile, "regression_cutoff": self.regression_cutoff}


class Calibration:
    """A calibration under way: polygraphy's calibrator, its data and where the ranges go."""

    def __init__(self, handle: Any, batches: _Batches, cache: Path | None) -> None:
        self._handle = handle
        self._batches = batches
        self._cache = cache

    def close(self) -> None:
        """Give its GPU memory back."""
        self._handle.free()

    def finish(self, log: BuildLog, *, built: bool) -> None:
        """Check that all data was used and write the cache.

        Args:
            log: The build's log, for messages.
            built: Whether the build succeeded.

        Raises:
            QATError: If a batch did not fit, the data ran out before the first, or the GPU's memory did.
        """
        if self._batches.error is not None:
            raise self._batches.error
        if self._batches.is_interrupted:
            raise QATError(
                f"calibrator: batch {self._batches.count} could not be copied to the GPU. Use smaller batches, or free "
                f"memory{log.quote()}"
            )
        if built and self._cache is not None and self._handle.cache_contents:
            write_whole(self._cache, self._handle.cache_contents)


class _Batches:
    """The data as polygraphy reads it: dicts of contiguous arrays, each checked.

    TensorRT calls from native code, which an exception must not cross: the first error is kept and the data ends there.
    """

    def __init__(self, data: Iterable[Any], inputs: tuple[TensorInfo, ...]) -> None:
        self._data = data
        self._inputs = inputs
        self.count = 0
        self.is_interrupted = False
        self.error: QATError | None = None

    def __iter__(self) -> Iterator[dict[str, Any]]:
        try:
            for batch in self._data:
                named = self._checked(batch)
                self.count += 1
                # Set while TensorRT has the batch: if it never comes back for the next, the copy failed.
                self.is_interrupted = True
                yield named
                self.is_interrupted = False
            if not self.count:
                raise QATError("calibrator: the data holds no batch. A generator can be read only once: make a new one")
        except QATError as error:
            self.error = error

    def _checked(self, batch: Any) -> dict[str, Any]:
        names = [info.name for info in self._inputs]
        if not isinstance(batch, Mapping):
            if len(names) != 1:
                raise QATError(f"calibrator: batch {self.count} is no dict, and the graph has the inputs {', '.join(names)}")
            batch = {names[0]: batch}
        if set(batch) != set(names):
            raise QATError(f"calibrator: batch {self.count} holds {', '.join(map(str, batch))}, not {', '.join(names)}")
        return {info.name: self._array(info, batch[info.name]) for info in self._inputs}

    def _array(self, info: TensorInfo, value: Any) -> Any:
        if not (isinstance(value, np.ndarray) or is_torch(value)):
            raise QATError(f"calibrator: batch {self.count}: input {info.name!r} is a {type(value).__name__}, not an array")
        # Calibration runs in float32, whatever float type the graph's input has.
        wanted = "float32" if info.dtype_name in ("float16", "bfloat16") else info.dtype_name
        dtype = str(value.dtype).removeprefix("torch.")
        if dtype != wanted:
            raise QATError(f"calibrator: batch {self.count}: input {info.name!r} is {dtype}. Calibration takes {wanted}")
        if tuple(value.shape) != info.opt:
            raise QATError(
                f"calibrator: batch {self.count}: input {info.name!r} has shape {list(value.shape)}, the build calibrates at "
                f"{list(info.opt or ())}, the opt of batch= and shapes=. Leave out an incomplete last batch"
            )
        return value.contiguous() if is_torch(value) else np.ascontiguousarray(value)
