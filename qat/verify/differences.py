"""What a comparison of PyTorch with the exported graph found: plain attributes, and tables to print."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table

from ..support.text import Printed

# The largest distance from a tie, in codes, at which float rounding may still decide between two codes.
TIE = 0.01


@dataclass(frozen=True)
class Difference:
    """How far two versions of one output are apart.

    Attributes:
        max_abs: Largest absolute difference.
        max_rel: The same, relative to the output's largest magnitude.
        sqnr: Signal to noise in dB, infinite for equal outputs.
        top1: Share of equal largest classes; ``None`` for an output that is not ``(N, classes)``.
    """

    max_abs: float
    max_rel: float
    sqnr: float
    top1: float | None

    @classmethod
    def between(cls, reference: np.ndarray, other: np.ndarray) -> Difference:
        """The difference of ``other`` from ``reference``, two arrays of one shape."""
        wide, noise = reference.astype(np.float64), other.astype(np.float64) - reference.astype(np.float64)
        max_abs = float(np.abs(noise).max(initial=0.0))
        peak = float(np.abs(wide).max(initial=0.0))
        with np.errstate(divide="ignore", invalid="ignore"):
            sqnr = float(10 * np.log10(np.square(wide).sum() / np.square(noise).sum())) if max_abs else float("inf")
        classes = reference.ndim == 2 and reference.shape[1] > 1 and np.issubdtype(reference.dtype, np.floating)
        top1 = float((reference.argmax(1) == other.argmax(1)).mean()) if classes else None
        return cls(max_abs, max_abs / peak if peak else max_abs, sqnr, top1)


@dataclass(frozen=True)
class OutputParity:
    """One output: ONNX Runtime against PyTorch, and PyTorch against itself, summing in another order or in float16."""

    name: str
    onnx: Difference
    drift: Difference


@dataclass(frozen=True)
class SiteParity:
    """The codes of one call of an activation site, end to end.

    Attributes:
        site: Path of the site.
        call: Which of its calls, from 0.
        elements: How many codes.
        equal: Share of equal codes, ONNX Runtime against PyTorch.
        max_difference: Largest difference of codes.
        drift_equal: Share of equal codes, PyTorch against itself, summing in another order.
    """

    site: str
    call: int
    elements: int
    equal: float
    max_difference: int
    drift_equal: float


@dataclass(frozen=True)
class SegmentParity:
    """The codes of one call of a site when each part of the graph is fed PyTorch's own input to it.

    Attributes:
        site: Path of the site.
        call: Which of its calls, from 0.
        is_weight: Whether the site quantizes a weight.
        elements: How many codes.
        differing: How many differ.
        max_difference: Largest difference of codes.
        tie_distance: Largest distance of a differing element from the nearest tie, in codes; 0 if none differs.
    """

    site: str
    call: int
    is_weight: bool
    elements: int
    differing: int
    max_difference: int
    tie_distance: float


@dataclass(frozen=True)
class ParityReport(Printed):
    """What :func:`parity` found; prints as tables.

    Attributes:
        outputs: One entry an output.
        sites: One entry a call of an activation site, if asked for.
        segments: One entry a call of any site, if asked for.
        unmatched: Sites that PyTorch calls more or less often than the graph.
        precision: What the graph computes in, ``"fp32"`` or ``"fp16"``.
        is_quantized: Whether the file lists any site; one of a float model lists none.
    """

    _width = 128

    outputs: list[OutputParity]
    sites: list[SiteParity] = field(default_factory=list)
    segments: list[SegmentParity] = field(default_factory=list)
    unmatched: list[str] = field(default_factory=list)
    precision: str = "fp32"
    is_quantized: bool = True

    @property
    def top1(self) -> float | None:
        """The lowest top-1 agreement of any output."""
        return min((o.onnx.top1 for o in self.outputs if o.onnx.top1 is not None), default=None)

    @property
    def codes_equal(self) -> float | None:
        """Share of equal codes over all sites, ONNX Runtime against PyTorch."""
        return _share([(s.elements, s.equal) for s in self.sites])

    @property
    def drift_codes_equal(self) -> float | None:
        """Share of equal codes over all sites, PyTorch against itself, summing in another order."""
        return _share([(s.elements, s.drift_equal) for s in self.sites])

    def within_drift(self, slack: float = 6.0) -> bool:
        """Whether ONNX Runtime is no farther from PyTorch than PyTorch is from itself, summing in another order.

        Args:
            slack: Tolerated difference of the two SQNRs in dB. Both are single draws of the same chaotic process: which
                value falls to which side of a tie. 6 dB are a factor of 2 in amplitude.

        Returns:
            True also for outputs that differ by float rounding alone (``max_rel <= 1e-5``).
        """
        return all(o.onnx.max_rel <= 1e-5 or o.onnx.sqnr >= o.drift.sqnr - slack for o in self.outputs)

    @property
    def segments_exact(self) -> bool:
        """Whether all weight codes are equal, and activation codes differ by at most 1 and only at ties."""
        return all(s.differing == 0 if s.is_weight else s.max_difference <= 1 and s.tie_distance <= TIE for s in self.segments)

    def __rich__(self) -> Group:
        parts: list[RenderableType] = [self._output_table()]
        if not self.is_quantized:
            parts.append("A float file: nothing in it is quantized")
        if self.sites:
            parts.append(self._site_table())
        if self.segments:
            parts.append(self._segment_summary())
        if self.unmatched:
            parts.append("Not compared, called a different number of times: " + ", ".join(self.unmatched))
        return Group(*parts)

    def _output_table(self) -> Table:
        cause = "other order of sums" if self.precision == "fp32" else f"results of modules rounded to {self.precision}"
        table = Table(title=f"ONNX Runtime against PyTorch, and PyTorch's own drift ({cause})", title_justify="left")
        for column in ("output", "compared", "max abs", "max rel", "SQNR dB", "top-1 equal"):
            table.add_column(column, justify="left" if column in ("output", "compared") else "right")
        for output in self.outputs:
            for label, diff in (("ONNX", output.onnx), ("drift", output.drift)):
                top1 = "" if diff.top1 is None else f"{diff.top1:.2%}"
                table.add_row(output.name, label, f"{diff.max_abs:.3g}", f"{diff.max_rel:.3g}", f"{diff.sqnr:.1f}", top1)
        return table

    def _site_table(self) -> Table:
        table = Table(title="Equal INT8 codes, end to end", title_justify="left")
        for column in ("site", "codes", "ONNX", "max diff", "drift"):
            table.add_column(column, justify="left" if column == "site" else "right", overflow="fold")
        for s in self.sites:
            name = s.site if s.call == 0 else f"{s.site} (call {s.call})"
            table.add_row(name, f"{s.elements}", f"{s.equal:.4%}", f"{s.max_difference}", f"{s.drift_equal:.4%}")
        total = sum(s.elements for s in self.sites)
        table.add_section()
        table.add_row("all", f"{total}", f"{self.codes_equal:.4%}", "", f"{self.drift_codes_equal:.4%}")
        return table

    def _segment_summary(self) -> Table:
        table = Table(title="Segment by segment, each fed PyTorch's own input", title_justify="left")
        for column in ("codes of", "calls", "codes", "differing", "max diff", "farthest from a tie"):
            table.add_column(column, justify="left" if column == "codes of" else "right")
        for label, chosen in (
            ("weights", [s for s in self.segments if s.is_weight]),
            ("activations", [s for s in self.segments if not s.is_weight]),
        ):
            numbers = (len(chosen), sum(s.elements for s in chosen), sum(s.differing for s in chosen))
            worst = max((s.max_difference for s in chosen), default=0)
            far = max((s.tie_distance for s in chosen), default=0.0)
            table.add_row(label, *map(str, numbers), f"{worst}", f"{far:.2g}")
        return table


def _share(parts: list[tuple[int, float]]) -> float | None:
    total = sum(elements for elements, _ in parts)
    return sum(elements * share for elements, share in parts) / total if total else None
