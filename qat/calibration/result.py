"""What a calibration pass found."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from rich.table import Table
from torch import Tensor

from ..core.quantizer import Quantizer, set_ranges
from ..support.text import Printed
from .histogram import Histogram
from .methods import check_method, find_ranges, quality


class Calibration(Printed):
    """The statistics of one pass over the data, from which any method's ranges can be taken.

    Prints as a table of the ranges that were applied last. Holds one histogram a site (32 KiB), no activations.

    Attributes:
        histograms: Of the activations, by site path.
        weights: Their ranges by site path, in the shape of the site's ``amax``.
        weight_method: What those are, ``"max"`` for ``max(abs(weight))``.
    """

    def __init__(
        self,
        sites: Mapping[str, Quantizer],
        histograms: Mapping[str, Histogram],
        weights: Mapping[str, Tensor],
        *,
        weight_method: str = "max",
    ) -> None:
        self._sites = dict(sites)
        self.histograms = dict(histograms)
        self.weights = dict(weights)
        self.weight_method = weight_method
        self._applied: tuple[str, dict[str, Tensor]] | None = None

    def ranges(self, method: str = "mse", *, percentile: float = 99.99) -> dict[str, Tensor]:
        """The activation ranges by ``method``; changes nothing.

        Args:
            method: ``"max"``, ``"percentile"``, ``"mse"`` or ``"entropy"``.
            percentile: For ``method="percentile"``; above 0, at most 100.

        Returns:
            Site path to ``amax``, a float32 scalar; zero for a tensor of zeros.

        Raises:
            QATError: For an unknown method or an impossible percentile.
        """
        check_method(method, percentile)
        found: dict[str, Tensor] = {}
        for fmt in {self._sites[path].fmt for path in self.histograms}:
            there = {path: histogram for path, histogram in self.histograms.items() if self._sites[path].fmt == fmt}
            ranges = find_ranges(list(there.values()), method, percentile=percentile, fmt=fmt)
            found.update(zip(there, ranges, strict=True))
        return {path: found[path] for path in self.histograms}

    def apply(self, method: str = "mse", *, percentile: float = 99.99) -> None:
        """Set the ranges of the calibrated model, in place, and start quantizing.

        Activations get the ranges by ``method``; weights get theirs, as they were during the pass.

        Args:
            method: As in :meth:`ranges`.
            percentile: As in :meth:`ranges`.

        Raises:
            QATError: For an unknown method or an impossible percentile.
        """
        ranges = self.ranges(method, percentile=percentile)
        set_ranges({self._sites[path]: amax for path, amax in {**ranges, **self.weights}.items()})
        label = f"percentile {percentile:g}" if method == "percentile" else method
        self._applied = label, ranges

    def dead_sites(self) -> list[str]:
        """Paths of the sites whose activation or weight was zero throughout."""
        dead = [path for path, histogram in self.histograms.items() if histogram.amax == 0]
        alive = [amax.any() for amax in self.weights.values()]
        # One copy from the device, not one a weight.
        flags = torch.stack([flag.to(alive[0].device) for flag in alive]).tolist() if alive else []
        return dead + [path for path, flag in zip(self.weights, flags, strict=True) if not flag]

    def __rich__(self) -> Table:
        method, ranges = self._applied or ("not applied", {})
        table = Table(title=f"Activation ranges ({method})", caption=f"{len(self.weights)} weights: by {self.weight_method}")
        table.add_column("site", overflow="fold")
        for column in ("max", "amax", "clipped", "SQNR dB"):
            table.add_column(column, justify="right", no_wrap=True)
        for path, histogram in self.histograms.items():
            row = [path, f"{histogram.amax:.4g}"]
            amax = float(ranges[path]) if path in ranges else 0.0
            if amax > 0:
                clipped, sqnr = quality(histogram, amax, fmt=self._sites[path].fmt)
                row += [f"{amax:.4g}", f"{clipped:.4%}", f"{sqnr:.1f}"]
            table.add_row(*row)
        return table
