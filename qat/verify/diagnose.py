"""Why does an engine differ, and from which layer on?"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..errors import QATError
from ..graph.graph import DQ
from .bisect import Vanished, first_departure
from .compare import SLACK, Judge, budget, difference, non_finite, within
from .feeds import check_engine, run_engine
from .outcome import Departure, OutputCheck, TensorCheck
from .reference import Reference
from .variants import is_rounded

# So many layers at most are named to be kept in FP32: with more, FP16 is the wrong choice.
_MAX_LAYERS = 8
_LOWER_PRECISION_OFF = {"fp16": False, "bf16": False, "tf32": False}

_IN_FP16 = (
    "keep the named layers in FP32: qat.tensorrt.build(..., fp32_layers=[...]), or export them as float32",
    "move the opt shape of a dynamic profile to its min or max, which chooses other kernels",
    "fine-tune in FP16 (precision='16-mixed'; bf16-mixed has another range and other rounding)",
)
_DETAIL = {
    "fp16": "An engine built in FP32 agrees, the one in lower precision does not: the loss is FP16's.",
    "runtime": "An engine built in FP32 differs as well: the export or the runtime is at fault, not FP16.",
    "unknown": "The file itself computes in 16 bits, so no FP32 engine can be built of it to compare with.",
}
_REMEDIES: dict[str, tuple[str, ...]] = {
    "fp16": _IN_FP16,
    "runtime": (
        "run qat.export.check_onnx on the file",
        "build with a lower optimization_level, or with another version of the runtime",
        "report the layer to the makers of the runtime, with the part of the graph around it",
    ),
    "unknown": ("pass the same model exported with precision='fp32' as fp32_onnx=", *_IN_FP16),
}


@dataclass
class Diagnosis:
    """Builds engines to find out why one differs.

    Args:
        reference: What ONNX Runtime ran: ``graph``, or the same model in float32.
        graph: What the engine was built from.
        feeds: The inputs.
        checks: What was found about the outputs.
        build: Builds an engine of a path with the settings of the first one. It takes ``outputs=`` (tensors to mark) and
            ``fp16=``, ``bf16=``, ``tf32=`` (False switches them off).
        tolerance: The ``max_rel`` that is accepted.
        progress: Told what is being done.
    """

    reference: Reference
    graph: Reference
    feeds: Mapping[str, np.ndarray]
    checks: Sequence[OutputCheck]
    build: Callable[..., Any]
    tolerance: float
    progress: Callable[[str], None]
    builds: int = 0
    _expected: dict[str, np.ndarray] = field(default_factory=dict)

    def __call__(self) -> Departure:
        """The cause and the layer; what hinders the search is told, too."""
        try:
            found = self._find()
        except QATError as error:
            found = Departure("unknown", None, f"The search for the layer ended early: {error}")
        return replace(found, builds=self.builds)

    def _find(self) -> Departure:
        self._expected = self.reference.run(self.feeds)
        if not self._departs(self._outputs(full=False), full=False):
            detail = "An engine built anew from the file agrees, so the given one is of another file or other settings."
            return Departure("engine", None, detail, ("build the engine anew",))
        if self.reference.is_half:
            return self._locate("unknown", full=False, judge=self._judge(half=True, only_loss=False))
        if self._departs(self._outputs(full=True), full=True):
            return self._locate("runtime", full=True, judge=self._judge(half=False, only_loss=False))
        found = self._locate("fp16", full=False, judge=self._judge(half=True, only_loss=True))
        self.progress("rounding the graph to FP16, layer by layer")
        return replace(found, fp32_layers=tuple(losing_layers(self.reference, self.feeds, self.tolerance)))

    def _outputs(self, extra: Sequence[str] = (), *, full: bool) -> dict[str, np.ndarray]:
        """What a new engine computes, in full FP32 or with the first one's settings; the tensors ``extra`` included."""
        marked = f", {len(extra)} tensor(s) marked: {', '.join(extra[:3])}" if extra else ""
        self.progress(f"building an engine{' in FP32' if full else ''}{marked}")
        self.builds += 1
        graph = self.reference if full else self.graph
        added = [name for name in extra if name not in graph.outputs]
        options = {**(_LOWER_PRECISION_OFF if full else {}), **({"outputs": added} if added else {})}
        engine = self.build(graph.path, **options)
        with contextlib.ExitStack() as stack:
            # GPU memory goes back before the next one is built.
            if hasattr(engine, "close"):
                stack.callback(engine.close)
            if not added:
                check_engine(engine, graph)
            return run_engine(engine, graph, self.feeds, added)

    def _departs(self, found: Mapping[str, np.ndarray], *, full: bool) -> bool:
        return not all(self._accepted(check, found[check.name], full) for check in self.checks)

    def _accepted(self, check: OutputCheck, found: np.ndarray, full: bool) -> bool:
        expected = self._expected[check.name]
        limit = check.limit_fp32 if full else check.limit
        assert limit is not None
        error = difference(check.name, expected, found, "the engine")
        return not non_finite(expected, found) and within(error, limit, self.tolerance)

    def _judge(self, *, half: bool, only_loss: bool) -> Judge:
        return Judge(self.reference, self.feeds, half, only_loss, self.tolerance)

    def _locate(self, cause: str, *, full: bool, judge: Judge) -> Departure:
        """Bisect with marked outputs."""
        detail, remedies = _DETAIL[cause], _REMEDIES[cause]
        # In the file that is built there may be casts in between.
        built = self.reference if full else self.graph
        cuts = self.reference.cuts_among(set(self.reference.cuts) & set(built.cuts))
        bad = next((check.name for check in self.checks if not check.engine_ok and check.name in cuts), None)
        if bad is None:
            return Departure(cause, None, f"{detail} The outputs that differ do not depend on the inputs.", remedies)

        def probe(tensors: list[str]) -> tuple[dict[str, TensorCheck], bool]:
            found = self._outputs(tensors, full=full)
            return judge(found, tensors), self._departs(found, full=full)

        try:
            try:
                check, before = first_departure(cuts, bad, probe)
            except QATError as error:
                # TensorRT 8.6 cannot return the results of some Q/DQ pairs.
                others = {name for name, cut in cuts.items() if cut.op != DQ or name == bad}
                if len(others) == len(cuts):
                    raise
                self.progress("without the results of Q/DQ pairs")
                check, before = first_departure(self.reference.cuts_among(others), bad, probe)
                detail = f"{detail} The results of Q/DQ pairs were left out of the search, since with them: {error}"
        except Vanished as vanished:
            name = vanished.check.tensor
            detail = f"{detail} The difference vanishes once {name} is marked as an output: a fusion across it."
            remedies = (f"build(..., outputs=[{name!r}]) prevents that fusion", *remedies)
            return Departure("fusion", vanished.check.node, detail, remedies, vanished.check)
        except QATError as error:
            return Departure(cause, None, f"{detail} The layer was not found: {error}", remedies)
        return Departure(cause, check.node, detail, remedies, check, before)


def losing_layers(graph: Reference, feeds: Mapping[str, np.ndarray], tolerance: float) -> list[str]:
    """The nodes whose rounding to FP16 costs more than INT8 itself, found in ONNX Runtime: no engine is built.

    The nodes are rounded from the first on, up to the one that spoils an output; that one is then left in float32, and so on.

    Returns:
        Names in the order of the graph; empty if all nodes together cost no more, or if too many would be needed.
    """
    nodes = [node.name for node in graph.nodes if node.name and is_rounded(graph, node)]
    expected, unquantized = graph.run(feeds), graph.run_unquantized(feeds)
    limits = {
        name: budget(difference(name, expected[name], unquantized[name], "ONNX Runtime"), tolerance) - SLACK
        for name in graph.outputs
    }
    kept: list[str] = []

    def loses(count: int) -> bool:
        found = graph.run_rounded(feeds, half=True, nodes={name for name in nodes[:count] if name not in kept})
        return any(
            non_finite(expected[name], found[name])
            or not within(difference(name, expected[name], found[name], "ONNX Runtime"), limit, tolerance)
            for name, limit in limits.items()
        )

    while len(kept) <= _MAX_LAYERS and loses(len(nodes)):
        good, bad = 0, len(nodes)
        while bad - good > 1:
            middle = (good + bad) // 2
            good, bad = (good, middle) if loses(middle) else (middle, bad)
        if nodes[bad - 1] in kept:
            return []
        kept.append(nodes[bad - 1])
    return sorted(kept, key=nodes.index) if len(kept) <= _MAX_LAYERS else []
