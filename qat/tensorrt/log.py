"""What TensorRT says while it builds and loads: kept as records, and quoted in errors."""

from __future__ import annotations

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


def make_logger(trt: Any, log: BuildLog, *, verbose: bool = True, keep: int | None = None) -> Any:
    """A TensorRT logger that writes into ``log``.

    Args:
        trt: The module ``tensorrt`` or ``tensorrt_rtx``.
        log: Where to.
        verbose: Whether to keep VERBOSE records, which list what every layer became.
        keep: How many records to keep, the last ones; None for all.
    """
    # The base class exists only once a runtime is imported.
    severities = {getattr(trt.ILogger, name): name for name in (*_SEVERE, "WARNING", "INFO", "VERBOSE")}

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            # pybind11 crashes on an instance whose own base was not initialized.
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            name = severities[severity]
            if verbose or name != "VERBOSE":
                log.append(Record(name, message))
            if keep is not None:
                del log[:-keep]

    return Logger()
