"""One pass over the data sets every range."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn

from ..core.quantizer import Quantizer, State, WeightQuantizer, quantizers
from ..errors import QATError
from ..support.batches import run_batch
from ..support.modes import looking_at
from ..support.progress import progress_bar
from .methods import check_method, check_weight_method
from .observers import HistogramObserver, SiteObserver, WeightObserver, settle
from .reduce import failed_ranks, rank, reduce_observers
from .result import Calibration


def calibrate(
    model: nn.Module,
    data: Iterable[Any] | Callable[[nn.Module], Any],
    *,
    method: str = "mse",
    percentile: float = 99.99,
    weight_method: str = "max",
    batches: int | None = None,
    progress: bool = True,
) -> Calibration:
    """Set all ranges of a prepared model, in place, by running it on data: post-training quantization.

    The model runs once over the data in float, in evaluation mode and without gradients; batch-norm statistics, training
    flags and the random state of torch, NumPy and Python stay as they are. Activations are counted in histograms, from which
    ``method`` takes the ranges, of weights ``weight_method``. In a distributed run every rank passes its own data, and all
    end with the ranges of the union, exactly as if one process had seen it.

    If anything fails, the model is left as it was. On CUDA the pass neither copies anything to the host nor waits for the
    device, unless the model or the data do; a NaN or Inf is therefore reported at its end.

    Args:
        model: After ``qat.prepare``. Ranges it already has are replaced.
        data: A loader of tensors, of mappings (entries named like parameters of ``model.forward`` are passed to it), or of
            tuples and lists ``(inputs, target, ...)`` (only the inputs are used); or a function that is called with the
            model and runs it. Use training data: ranges chosen on validation data flatter the validation score.
        method: ``"mse"``: least squared error, which follows the tensor's distribution and needs no setting;
            ``"percentile"``: no percentile suits all models; ``"entropy"``: TensorRT's own, least KL divergence, clips more,
            but not over 0.1 % of the values at ten times the least squared error; ``"max"``: no clipping.
        percentile: For ``method="percentile"``; above 0, at most 100.
        weight_method: ``"max"``; or ``"mse"``, least squared error, for weights of few bits, whose ranges must then stay:
            prepare with ``QuantConfig(weight_range="frozen")`` or ``learn_scales=True``.
        batches: Stop after that many, with a warning if the data end before; ``None`` takes all. Not for a function.
        progress: Show a progress bar, on rank 0.

    Returns:
        The statistics, which print as a table and give the ranges by other methods without another pass.

    Raises:
        QATError: If the model is not prepared, an argument is invalid, the data are empty, a NaN or Inf is seen, a site sees
            no data, or another rank fails.

    Example:
        >>> import qat
        >>> from torch import nn
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> _ = qat.prepare(model)
        >>> result = qat.calibrate(model, [torch.randn(32, 4) for _ in range(4)], progress=False)
        >>> by_max = result.ranges("max")  # on the same statistics
        >>> all(by_max[site] >= amax for site, amax in result.ranges("mse").items())
        True
    """
    check_method(method, percentile)
    check_weight_method(weight_method)
    check_data(data, batches)
    # DistributedDataParallel would broadcast buffers in each forward: ranks with fewer batches would be waited for.
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    sites = dict(quantizers(model))
    if not sites:
        raise QATError("model: holds no quantizers. Run qat.prepare(model) first")
    device = next(iter(sites.values())).amax.device
    if device.type == "meta":
        raise QATError("model: is on the meta device. Load its weights first")

    following = [path for path, site in sites.items() if isinstance(site, WeightQuantizer) and site.follow]
    if weight_method != "max" and following:
        raise QATError(
            f"weight_method={weight_method!r}: the range of {following[0]} follows its weight, whatever is found here. Prepare "
            "with QuantConfig(weight_range='frozen') or learn_scales=True"
        )

    with _unchanged_on_failure(sites):
        log: list[SiteObserver] = []
        activations, weights = _attach_observers(sites, log, weight_method)
        failed = True
        try:
            with looking_at(model, keep_random=True):
                _run(model, data, batches, progress and rank() == 0)
            settle(log)
            failed = False
        finally:
            # Also on the way out of an exception: the other ranks are waiting.
            failures = failed_ranks(failed, device)
        if failures:
            raise QATError(f"data: calibration failed on rank {', '.join(map(str, failures))}; its own error says why")
        reduce_observers(activations, weights, device)
        observers: dict[str, SiteObserver] = {**activations, **weights}
        _check_all_seen({path: observer.seen for path, observer in observers.items()})
        result = Calibration(
            sites,
            {path: observer.histogram for path, observer in activations.items()},
            {path: observer.amax for path, observer in weights.items()},
            weight_method=weight_method,
        )
        result.apply(method, percentile=percentile)
        dead = result.dead_sites()
        if dead and rank() == 0:
            warnings.warn(
                f"{', '.join(dead)}: only zeros were seen; the smallest scale is used. Check that the layers before are alive",
                stacklevel=2,
            )
    return result


def check_data(data: Any, batches: int | None) -> None:
    """Refuse data that :func:`calibrate` cannot take."""
    if isinstance(data, Tensor | Mapping | str):
        raise QATError(f"data: is a {type(data).__name__}, so one batch at best; pass an iterable of batches, such as [batch]")
    if _is_function(data):
        if batches is not None:
            raise QATError("batches: a function runs the model as often as it wants; leave batches out")
    elif not hasattr(data, "__iter__") and not hasattr(data, "__getitem__"):
        raise QATError(f"data: is of type {type(data).__name__}; pass a loader or a function that runs the model")
    if batches is not None and (isinstance(batches, bool) or not isinstance(batches, int) or batches < 1):
        raise QATError(f"batches={batches!r}: must be a positive integer, or None for all")


def _is_function(data: Any) -> bool:
    return callable(data) and not hasattr(data, "__iter__")


def _attach_observers(
    sites: Mapping[str, Quantizer], log: list[SiteObserver], weight_method: str
) -> tuple[dict[str, HistogramObserver], dict[str, WeightObserver]]:
    activations: dict[str, HistogramObserver] = {}
    weights: dict[str, WeightObserver] = {}
    for path, site in sites.items():
        if isinstance(site, WeightQuantizer):
            site.observer = weights[path] = WeightObserver(path, site, log, method=weight_method)
        else:
            site.observer = activations[path] = HistogramObserver(path, log, device=site.amax.device)
        site.state = State.COLLECTING
    return activations, weights


def _run(model: nn.Module, data: Any, batches: int | None, progress: bool) -> None:
    with progress_bar(shown=progress) as bar:
        if _is_function(data):
            bar.add_task("Calibrating", total=None)
            data(model)
            return
        length = operator.length_hint(data) or None
        total = min(length, batches) if length and batches else length or batches
        tensor = next(chain(model.parameters(), model.buffers()), None)
        count = 0
        for batch in bar.track(islice(data, batches), total=total, description="Calibrating"):
            run_batch(model, batch, None if tensor is None else tensor.device)
            count += 1
        if count == 0:
            raise QATError("data: the loader is empty; nothing to calibrate on")
        promised = length if batches is None else batches
        if promised is not None and count < promised:
            warnings.warn(f"data: the loader ended after {count} of {promised} batches", stacklevel=3)


def _check_all_seen(seen: Mapping[str, bool]) -> None:
    unseen = [path for path, flag in seen.items() if not flag]
    if len(unseen) == len(seen):
        raise QATError("data: no layer of the model was run. Is the loader empty? A function must call model(inputs)")
    if unseen:
        module = unseen[0].rpartition(".")[0]
        raise QATError(
            f"{', '.join(unseen)}: no data seen. If the layers never run in evaluation mode, leave them in float by "
            f"QuantConfig(rules=[{{'match': {module!r}, 'quantize': False}}, ...]); otherwise pass data that reaches them"
        )


@contextmanager
def _unchanged_on_failure(sites: Mapping[str, Quantizer]) -> Iterator[None]:
    """Remove observers; unless the body succeeds, put states and ranges back as well."""
    before = [(site, site.state, site.observer, site.amax.detach().clone()) for site in sites.values()]
    succeeded = False
    try:
        yield
        succeeded = True
    finally:
        for site, state, observer, amax in before:
            site.observer = observer
            if not succeeded:
                site.state = state
                with torch.no_grad():
                    site.amax.copy_(amax)
