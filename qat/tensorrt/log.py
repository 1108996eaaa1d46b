"""What TensorRT says while it builds and loads: kept as records, and quoted in errors."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

_SEVERE = ("INTERNAL_ERROR", "ERROR")


class Record(NamedTuple):
    """One message.

    Attributes:
        severity: ``"INTERNAL_ERROR"``, ``"ERROR"``, ``"WARNING"``, ``"INFO"`` or ``"VERBOSE"``.
        message: As TensorRT wrote it.
    """

    severity: str
    message: str


class BuildLog(list[Record]):
    """The records of one build, in order.

    Example:
        >>> log = BuildLog([Record("INFO", "started"), Record("ERROR", "out of memory")])
        >>> log.errors()
        ['out of memory']
    """

    def errors(self) -> list[str]:
        """Messages of the severities ERROR and INTERNAL_ERROR."""
        return [message for severity, message in self if severity in _SEVERE]

    def warnings(self) -> list[str]:
        """Messages of the severity WARNING."""
        return [message for severity, message in self if severity == "WARNING"]

    def quote(self, *, last: int = 4) -> str:
        """The last errors, each on a line of its own, as the tail of an error message; empty without errors."""
        seen = list(dict.fromkeys(self.errors()))
        return "".join(f"\n  TensorRT: {message}" for message in seen[-last:])


class _Sink:
    """A log, and what of the messages it wants. Weak: an engine that nobody uses any more takes its log along."""

    def __init__(self, log: BuildLog, verbose: bool, keep: int | None) -> None:
        self.log = weakref.ref(log)
        self.verbose = verbose
        self.keep = keep

    def add(self, severity: str, message: str) -> None:
        log = self.log()
        if log is not None and (self.verbose or severity != "VERBOSE"):
            log.append(Record(severity, message))
            if self.keep is not None:
                del log[: -self.keep]


class Messages:
    """The one logger that a process gives to a TensorRT, and who listens.

    TensorRT keeps the first logger of a process for good, beside those of its builders and runtimes, so a logger of each
    build or engine would be called after it is gone.

    Attributes:
        logger: The ``ILogger`` to pass to TensorRT.
    """

    def __init__(self, trt: Any) -> None:
        self._builds: list[_Sink] = []
        self._listeners: list[_Sink] = []
        severities = {getattr(trt.ILogger, name): name for name in (*_SEVERE, "WARNING", "INFO", "VERBOSE")}
        deliver = self._deliver

        # The base class exists only once a runtime is imported.
        class Logger(trt.ILogger):
            def __init__(self) -> None:
                # pybind11 crashes on an instance whose own base was not initialized.
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                deliver(severities[severity], message)

        self.logger = Logger()

    @contextlib.contextmanager
    def recorded(self, log: BuildLog, *, verbose: bool) -> Iterator[Any]:
        """While the block runs, messages go to ``log`` alone, VERBOSE ones if asked for; gives the logger."""
        sink = _Sink(log, verbose, None)
        self._builds.append(sink)
        try:
            yield self.logger
        finally:
            self._builds.remove(sink)

    def listen(self, log: BuildLog, keep: int) -> Any:
        """From now on ``log`` gets what is said outside of builds, the last ``keep`` messages; gives the logger."""
        self._listeners = [sink for sink in self._listeners if (known := sink.log()) is not None and known is not log]
        self._listeners.append(_Sink(log, False, keep))
        return self.logger

    def _deliver(self, severity: str, message: str) -> None:
        for sink in self._builds[-1:] or self._listeners:
            sink.add(severity, message)


@functools.cache
def messages_of(trt: Any) -> Messages:
    """The messages of the module ``tensorrt`` or ``tensorrt_rtx``: one for the process, as TensorRT's own logger is."""
    return Messages(trt)
