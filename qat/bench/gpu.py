"""Load, clocks, temperature and power of a GPU while something runs, from NVML."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType, TracebackType
from typing import Any

from ..errors import QATError

# NVML API reference, nvmlClocksEventReasons: why clocks are below their maximum. Idle (bit 0) is no throttling.
THROTTLE_REASONS = {
    0x2: "application clocks setting",
    0x4: "software power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
    0x100: "display clock setting",
}
_SLOWDOWNS = frozenset(THROTTLE_REASONS.values()) - {"application clocks setting", "display clock setting"}


@dataclass(frozen=True)
class Spread:
    """Smallest, mean and largest sample."""

    minimum: float
    mean: float
    maximum: float

    @classmethod
    def of(cls, samples: list[float]) -> Spread | None:
        """The spread of the samples, ``None`` if there are none."""
        return cls(min(samples), sum(samples) / len(samples), max(samples)) if samples else None


@dataclass(frozen=True)
class GpuLoad:
    """What NVML said during a run; a quantity that the GPU does not report is ``None``.

    Attributes:
        name: Of the GPU.
        driver: Version.
        samples: How often NVML was asked.
        utilization: Share of time in which a kernel ran, percent; NVML averages over up to a second.
        memory_utilization: Share of time in which memory was read or written, percent.
        sm_clock: MHz.
        memory_clock: MHz.
        temperature: °C.
        power: W.
        throttle_reasons: Why clocks were below their maximum in any sample.
    """

    name: str
    driver: str
    samples: int
    utilization: Spread | None
    memory_utilization: Spread | None
    sm_clock: Spread | None
    memory_clock: Spread | None
    temperature: Spread | None
    power: Spread | None
    throttle_reasons: tuple[str, ...]

    @property
    def slowdowns(self) -> tuple[str, ...]:
        """The reasons that nobody asked for: power and heat."""
        return tuple(reason for reason in self.throttle_reasons if reason in _SLOWDOWNS)


def load_nvml() -> ModuleType:
    """The module ``pynvml``.

    Raises:
        QATError: If it is not installed.
    """
    try:
        import pynvml  # type: ignore[import-untyped]
    except ImportError as error:
        raise QATError("no GPU load: install NVML's Python module with `pip install nvidia-ml-py`") from error
    return pynvml


class GpuMonitor:
    """Samples a GPU in a background thread while the ``with`` block runs.

    Args:
        device: PCI bus id (``00000000:65:00.0``) or UUID (``GPU-…``) of the GPU.
        interval: Seconds between samples.
        nvml: The module ``pynvml``; by default imported.

    Raises:
        QATError: If NVML is not installed, does not start, or does not know the device.
    """

    def __init__(self, device: str, *, interval: float = 0.1, nvml: Any = None) -> None:
        self._nvml = nvml if nvml is not None else load_nvml()
        self._interval = interval
        self._samples: dict[str, list[float]] = {}
        self._reasons = 0
        self._count = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        try:
            self._nvml.nvmlInit()
        except self._nvml.NVMLError as error:
            raise QATError(f"no GPU load: NVML does not start ({error})") from error
        try:
            by_uuid = device.startswith(("GPU-", "MIG-"))
            find = self._nvml.nvmlDeviceGetHandleByUUID if by_uuid else self._nvml.nvmlDeviceGetHandleByPciBusId
            self._handle = find(device)
            self._name = _text(self._nvml.nvmlDeviceGetName(self._handle))
            self._driver = _text(self._nvml.nvmlSystemGetDriverVersion())
        except self._nvml.NVMLError as error:
            self._nvml.nvmlShutdown()
            raise QATError(f"no GPU load: NVML does not know the GPU {device} ({error})") from error
        self._readings = self._supported()

    def _supported(self) -> dict[str, Callable[[], float]]:
        """The quantities that this GPU reports, found by asking once."""
        nvml, handle = self._nvml, self._handle
        candidates: dict[str, Callable[[], float]] = {
            "utilization": lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu,
            "memory_utilization": lambda: nvml.nvmlDeviceGetUtilizationRates(handle).memory,
            "sm_clock": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
            "memory_clock": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
            "temperature": lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
            "power": lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000,
        }
        # Renamed in 2023; older drivers know only the former name, and both give the same bits.
        for function in ("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons"):
            if hasattr(nvml, function):
                candidates[function] = lambda function=function: getattr(nvml, function)(handle)  # type: ignore[misc]
        return {name: read for name, read in candidates.items() if self._read(read) is not None}

    def _read(self, read: Callable[[], float]) -> float | None:
        try:
            return read()
        except self._nvml.NVMLError:  # not supported by this GPU, driver or in this partition
            return None

    def sample(self) -> None:
        """Ask NVML once."""
        for name, read in self._readings.items():
            value = self._read(read)
            if value is None:
                continue
            if name.startswith("nvml"):
                self._reasons |= int(value)
            else:
                self._samples.setdefault(name, []).append(float(value))
        self._count += 1

    def _run(self) -> None:
        while not self._stop.wait(self._interval):
            self.sample()

    def __enter__(self) -> GpuMonitor:
        self._thread = threading.Thread(target=self._run, name="gpu-monitor", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        try:
            if not self._count:  # the run was shorter than one interval
                self.sample()
        finally:
            self._nvml.nvmlShutdown()

    def load(self) -> GpuLoad:
        """What was sampled."""
        spreads = {
            name: Spread.of(self._samples.get(name, []))
            for name in ("utilization", "memory_utilization", "sm_clock", "memory_clock", "temperature", "power")
        }
        reasons = tuple(text for bit, text in THROTTLE_REASONS.items() if self._reasons & bit)
        return GpuLoad(self._name, self._driver, self._count, **spreads, throttle_reasons=reasons)


def _text(value: str | bytes) -> str:
    # bytes in releases before 2023
    return value.decode() if isinstance(value, bytes) else value
