"""Progress of a build, and its end by Ctrl-C."""

from __future__ import annotations

import importlib.util
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Interruption:
    """Whether Ctrl-C was pressed while TensorRT was at work.

    An exception raised inside TensorRT's callbacks would be printed and dropped by its bindings, so the signal is only
    noted here; the monitor cancels the build, and the error follows once TensorRT has returned.

    Args:
        cancels: Whether the version can stop a build; otherwise the user is told to wait.
    """

    def __init__(self, *, cancels: bool) -> None:
        self.requested = False
        self._cancels = cancels

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Note Ctrl-C inside the block and raise ``KeyboardInterrupt`` at its end."""
        # Python delivers signals to its main thread alone, and only there may a handler be set.
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGINT, self._note)
        try:
            yield
        finally:
            # None: the handler was not set from Python and cannot be set back.
            if before is not None:
                signal.signal(signal.SIGINT, before)
        if self.requested:
            raise KeyboardInterrupt

    def _note(self, *_: object) -> None:
        if not self.requested and not self._cancels:
            print("Interrupted; this version of TensorRT finishes the step it is in first", file=sys.stderr)
        self.requested = True


def make_monitor(trt: Any, interruption: Interruption, display: Display | None) -> Any:
    """A progress monitor that cancels the build when asked to and passes progress on."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if display is not None:
                display.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            if display is not None:
                display.step(phase_name, step)
            return not interruption.requested

        def phase_finish(self, phase_name: str) -> None:
            if display is not None:
                display.finish(phase_name)

    return Monitor()


class Display:
    """Bars on the terminal by rich, one a phase; without rich, a line a phase.

    TensorRT may report from several threads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tasks: dict[str, Any] = {}
        self._depth: dict[str, int] = {}
        self._bars: Any = None
        if importlib.util.find_spec("rich") is not None:
            from rich.console import Console

            from ..support.progress import progress_bar

            self._bars = progress_bar(console=Console(stderr=True), transient=True)

    def __enter__(self) -> Display:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def start(self, phase: str, parent: str | None, steps: int) -> None:
        """A phase of ``steps`` steps begins."""
        with self._lock:
            depth = self._depth[phase] = self._depth.get(parent, -1) + 1 if parent else 0
            if self._bars is None:
                print(f"{'  ' * depth}{phase}", file=sys.stderr)
            else:
                self._tasks[phase] = self._bars.add_task("  " * depth + phase, total=steps)

    def step(self, phase: str, step: int) -> None:
        """A phase has done its step number ``step``, counted from 0."""
        with self._lock:
            if phase in self._tasks:
                self._bars.update(self._tasks[phase], completed=step + 1)

    def finish(self, phase: str) -> None:
        """A phase is over."""
        with self._lock:
            self._depth.pop(phase, None)
            if phase in self._tasks:
                self._bars.remove_task(self._tasks.pop(phase))
