"""What a verification found: plain attributes, a table to print, and JSON."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..support.text import Plain, Printed
from .differences import Difference


@dataclass(frozen=True)
class OutputCheck:
    """One output, compared in pairs; a pair that was not asked for is ``None``.

    Attributes:
        name: The output.
        onnx: ONNX Runtime against PyTorch.
        engine: The engine against ONNX Runtime.
        end_to_end: The engine against PyTorch.
        drift: PyTorch against itself, summing in another order; without a model ONNX Runtime against itself.
        fp16: ONNX Runtime against itself with every result rounded to FP16.
        int8: ONNX Runtime against itself without Q/DQ: what INT8 itself costs. ``None`` for a float graph.
        limit: The SQNR in dB that the engine must reach, unless its ``max_rel`` is within the tolerance.
        limit_fp32: The same for an engine that computes in FP32.
        onnx_ok: Whether ONNX Runtime agrees with PyTorch; True if not compared.
        engine_ok: Whether the engine agrees with ONNX Runtime; True if not compared.
        non_finite: How many NaN and infinite values the engine has where ONNX Runtime has finite ones.
    """

    name: str
    onnx: Difference | None
    engine: Difference | None
    end_to_end: Difference | None
    drift: Difference
    fp16: Difference | None
    int8: Difference | None
    limit: float | None
    limit_fp32: float | None
    onnx_ok: bool
    engine_ok: bool
    non_finite: int = 0


@dataclass(frozen=True)
class Agreement:
    """Top-1 agreement of one output over a data set.

    Attributes:
        output: The output.
        pair: Who is compared with whom.
        samples: How many samples.
        equal: Share of equal largest classes.
    """

    output: str
    pair: str
    samples: int
    equal: float


@dataclass(frozen=True)
class TensorCheck:
    """One tensor inside the graph: the engine against ONNX Runtime.

    Attributes:
        tensor: Its name.
        node: The node that computes it.
        op: The node's operator.
        error: How far the engine is off.
        limit: The SQNR in dB below which it departs.
        codes_differing: Share of differing INT8 codes; ``None`` for a tensor that no Q/DQ pair gives.
        codes_max_difference: Largest difference of codes.
        non_finite: How many NaN and infinite values the engine has where ONNX Runtime has finite ones.
        departs: Whether that is more than rounding explains.
    """

    tensor: str
    node: str
    op: str
    error: Difference
    limit: float
    codes_differing: float | None
    codes_max_difference: int | None
    non_finite: int
    departs: bool

    def __str__(self) -> str:
        if self.non_finite:
            return f"{self.node} ({self.op}): {self.non_finite} NaN or infinite values"
        text = (
            f"{self.node} ({self.op}): max rel {self.error.max_rel:.3g}, SQNR {self.error.sqnr:.1f} dB (limit {self.limit:.1f})"
        )
        if self.codes_differing is not None:
            text += f", {self.codes_differing:.2%} of its codes differ, by at most {self.codes_max_difference}"
        return text


@dataclass(frozen=True)
class Departure:
    """Where and why the two sides part.

    Attributes:
        cause: ``"export"``: ONNX Runtime differs from PyTorch; ``"engine"``: an engine built anew from the file agrees;
            ``"fp16"``: an FP32 build agrees; ``"runtime"``: an FP32 build differs as well; ``"fusion"``: the difference
            vanishes once a tensor inside is marked as an output; ``"unknown"``: not found out, ``detail`` says why.
        layer: Name of the first node that departs, or of the first quantization site for ``"export"``.
        detail: What was found, in a sentence.
        remedies: What to try.
        tensor: The first tensor that departs.
        before: Tensors that this one is computed from, and that were compared as well.
        fp32_layers: Nodes to keep in FP32, found by rounding the graph to FP16 in ONNX Runtime; empty if that shows no loss.
        builds: How many engines were built to find out.
    """

    cause: str
    layer: str | None
    detail: str
    remedies: tuple[str, ...] = ()
    tensor: TensorCheck | None = None
    before: tuple[TensorCheck, ...] = ()
    fp32_layers: tuple[str, ...] = ()
    builds: int = 0


@dataclass(frozen=True)
class VerifyReport(Printed, Plain):
    """What :func:`qat.verify.verify` found; prints as tables.

    Attributes:
        outputs: One entry an output.
        agreement: Top-1 agreement over the data set, if there was one.
        departure: Where the sides part, if they do and it was looked for.
        tolerance: The ``max_rel`` that is accepted whatever causes it.
        min_top1: The agreement that is asked for, if any.
    """

    _width = 128

    outputs: list[OutputCheck]
    agreement: list[Agreement] = field(default_factory=list)
    departure: Departure | None = None
    tolerance: float = 0.01
    min_top1: float | None = None

    @property
    def ok(self) -> bool:
        """Whether all that was compared agrees."""
        outputs = all(o.onnx_ok and o.engine_ok for o in self.outputs)
        return outputs and all(self.min_top1 is None or a.equal >= self.min_top1 for a in self.agreement)

    @property
    def exit_status(self) -> int:
        """0 if all agrees, otherwise 1."""
        return 0 if self.ok else 1

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values; what is infinite or NaN is ``None``."""
        return {**super().to_dict(), "ok": self.ok}

    def __rich__(self) -> Group:
        parts: list[RenderableType] = [self._output_table()]
        if self.agreement:
            parts.append(self._agreement_table())
        if self.departure is not None:
            # Names of nodes and files are no markup.
            parts += map(Text, self._departure_lines(self.departure))
        return Group(*parts, "Result: " + ("equal within rounding" if self.ok else "DIFFERENT"))

    def _output_table(self) -> Table:
        table = Table(title="The same function on every side?", title_justify="left")
        for column in ("output", "compared", "max abs", "max rel", "SQNR dB", "top-1 equal", ""):
            table.add_column(column, justify="left" if column in ("output", "compared", "") else "right", overflow="fold")
        for o in self.outputs:
            drift = "drift: PyTorch, other order of sums" if o.onnx is not None else "drift: ONNX Runtime, other order of sums"
            rows: list[tuple[str, Difference | None, str]] = [
                ("ONNX Runtime - PyTorch", o.onnx, "ok" if o.onnx_ok else "DIFFERENT"),
                ("engine - ONNX Runtime", o.engine, "ok" if o.engine_ok else f"DIFFERENT{_count(o.non_finite)}"),
                ("engine - PyTorch", o.end_to_end, ""),
                (drift, o.drift, ""),
                ("rounding to FP16 alone", o.fp16, ""),
                ("rounding to INT8 itself", o.int8, ""),
            ]
            for label, diff, verdict in rows:
                if diff is not None:
                    top1 = "" if diff.top1 is None else f"{diff.top1:.2%}"
                    numbers = (f"{diff.max_abs:.3g}", f"{diff.max_rel:.3g}", f"{diff.sqnr:.1f}")
                    table.add_row(Text(o.name), label, *numbers, top1, verdict)
            table.add_section()
        return table

    def _agreement_table(self) -> Table:
        table = Table(title="Top-1 agreement over the data set", title_justify="left")
        for column in ("output", "compared", "samples", "equal"):
            table.add_column(column, justify="left" if column in ("output", "compared") else "right", overflow="fold")
        for a in self.agreement:
            table.add_row(Text(a.output), a.pair, f"{a.samples}", f"{a.equal:.2%}")
        return table

    def _departure_lines(self, departure: Departure) -> list[str]:
        lines = [f"Cause: {departure.cause}. {departure.detail}"]
        if departure.layer is not None:
            lines.append(f"First layer that departs: {departure.tensor or departure.layer}")
        lines += [f"  before it: {check}" for check in departure.before]
        if departure.fp32_layers:
            lines.append("Layers that lose in FP16: " + ", ".join(departure.fp32_layers))
        lines += [f"Try: {remedy}" for remedy in departure.remedies]
        return [*lines, f"Engines built to find out: {departure.builds}"]


def _count(non_finite: int) -> str:
    return f", {non_finite} NaN or infinite" if non_finite else ""
