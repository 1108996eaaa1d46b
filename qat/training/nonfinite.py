"""Where a NaN or an infinity enters a prepared model."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..core.quantizer import Quantizer, WeightQuantizer, watching


def first_non_finite(model: nn.Module, run: Callable[[nn.Module], Any]) -> str | None:
    """Run ``model`` once and name the first site that saw a NaN or an infinity.

    One diagnostic forward, meant for the moment when a loss has already turned out to be non-finite: it looks at every
    tensor that reaches a site and synchronises each time.

    Args:
        model: A prepared model.
        run: Runs the model once, e.g. ``lambda model: model(images)``.

    Returns:
        The path of the site and what it saw, or ``None`` if every site saw finite values only.

    Example:
        >>> import qat
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> _ = qat.prepare(model)
        >>> first_non_finite(model, lambda model: model(torch.full((1, 4), torch.nan)))
        '0.input_quantizer (NaN in its input)'
    """
    seen: list[str] = []

    def look(name: str, site: Quantizer, x: Tensor) -> None:
        if not seen and not bool(x.isfinite().all()):
            kind = "NaN" if bool(x.isnan().any()) else "infinity"
            seen.append(f"{name} ({kind} in its {'weight' if isinstance(site, WeightQuantizer) else 'input'})")

    with watching(model, look), torch.no_grad():
        run(model)
    return seen[0] if seen else None
