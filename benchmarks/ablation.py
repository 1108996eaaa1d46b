"""What each setting of QATCallback is worth: fine-tuning with all defaults, against the same with one of them changed.

    python benchmarks/ablation.py --seeds 0 1 2 3 4 5 --jobs 2 --results FILE

ResNet-20 on scikit-learn's digits, trained by the recipe and then fine-tuned, every variant from the same float model with the
same order of batches. 8-bit PTQ loses nothing on them, so there are formats where it does. Differences are paired by seed.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import copy
import json
import logging
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

FORMATS: dict[str, dict[str, Any]] = {
    "W8A8": {},
    "W4A8": {"weight_format": "int4"},
    "W4A8, one weight range a tensor": {"weight_format": "int4", "weight_granularity": "tensor"},
}
# Arguments of QATCallback, besides those of the configuration under "config".
VARIANTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "calibration max": {"calibration": {"method": "max"}},
    "calibration percentile": {"calibration": {"method": "percentile"}},
    "calibration entropy": {"calibration": {"method": "entropy"}},
    "batch norm never frozen": {"freeze_bn_epoch": None},
    "batch norm frozen from epoch 2": {"freeze_bn_epoch": 2},
    "batch norm re-estimated": {"freeze_bn_epoch": None, "reestimate_bn": 10},
    "weight ranges frozen": {"config": {"weight_range": "frozen"}},
    "ranges frozen from epoch 2": {"freeze_ranges_epoch": 2},
    "learned scales": {"learn_scales": True},
    "learned scales, a tenth of the rate": {"learn_scales": True, "range_lr_factor": 0.1},
    "learned scales, frozen from epoch 2": {"learn_scales": True, "freeze_ranges_epoch": 2},
    "distillation": {"distill_from": "float"},
    "oscillations dampened": {"dampen_oscillations": 0.01},
}


def run_seed(seed: int, epochs: int, lr: float, done: set[tuple[str, str]]) -> list[dict[str, Any]]:
    """Every format and variant for one seed but those that are ``done``; a row each."""
    import io

    import torch
    from rich.console import Console
    from torch.nn import functional as F

    import qat
    from qat.recipes import models
    from qat.recipes.data import load
    from qat.recipes.resnet import ResNetSettings
    from qat.recipes.training import fit, make_classifier

    torch.set_num_threads(1)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    console = Console(file=io.StringIO())
    settings = ResNetSettings(device="cpu", seed=seed, qat_epochs=epochs, qat_lr=lr)
    data = load("digits")
    torch.manual_seed(seed)
    model = models.build(settings.arch, len(data.classes))
    base = make_classifier(model, settings, fine_tune=False)
    fit(base, data, settings, epochs=settings.epochs, name="float", console=console, seed=seed)
    model.cpu().eval()
    batches = list(data.loader(data.test, 256))
    labels = torch.cat([label for _, label in batches])

    def logits_of(model: Any) -> torch.Tensor:
        model.eval()
        with torch.no_grad():
            return torch.cat([model(images) for images, _ in batches])

    reference = logits_of(model)

    def row(of_format: str, variant: str, logits: torch.Tensor) -> dict[str, Any]:
        return {
            "seed": seed,
            "format": of_format,
            "variant": variant,
            "loss": F.cross_entropy(logits, labels).item(),
            "top1": 100 * (logits.argmax(1) == labels).float().mean().item(),
            "agreement": 100 * (logits.argmax(1) == reference.argmax(1)).float().mean().item(),
        }

    rows = [] if ("", "float") in done else [row("", "float", reference)]
    calibration = data.calibration(settings.calibration_images, settings.batch_size)
    for name, config in FORMATS.items():
        for method in ("max", "percentile", "mse", "entropy"):
            if (name, f"PTQ, {method}") in done:
                continue
            ptq = copy.deepcopy(model)
            qat.prepare(ptq, qat.QuantConfig.from_dict(config))
            qat.calibrate(ptq, calibration, method=method, progress=False)
            rows.append(row(name, f"PTQ, {method}", logits_of(ptq)))
        for variant, options in VARIANTS.items():
            if (name, variant) in done:
                continue
            given = dict(options)
            callback = qat.QATCallback(
                qat.QuantConfig.from_dict({**config, **given.pop("config", {})}),
                calibration={"progress": False, **given.pop("calibration", {})},
                calibration_data=calibration,
                log_ranges=None,
                **given,
            )
            tuned = make_classifier(copy.deepcopy(model), settings, fine_tune=True)
            tuned.train()
            fit(tuned, data, settings, epochs=epochs, name=variant, console=console, seed=seed + 1, callbacks=[callback])
            rows.append(row(name, variant, logits_of(tuned.model)))
    return rows


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean, and its standard error."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.mean(values), error


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a table a format; differences to the defaults, and their standard errors."""
    lines = []
    found = {(r["format"], r["variant"], r["seed"]): r for r in rows}
    seeds = sorted({r["seed"] for r in rows})
    loss, _ = mean_and_error([found["", "float", s]["loss"] for s in seeds])
    top1, error = mean_and_error([found["", "float", s]["top1"] for s in seeds])
    lines.append(f"Float: test loss {loss:.4f}, top-1 {top1:.2f} ± {error:.2f} %, {len(seeds)} seeds.\n")
    for name in FORMATS:
        lines += [f"| {name} | loss | to the defaults | top-1 % | to the defaults | as float % |", "|---|---|---|---|---|---|"]
        for variant in dict.fromkeys([*(r["variant"] for r in rows if r["variant"].startswith("PTQ")), *VARIANTS]):
            cells = []
            for figure, digits in (("loss", 4), ("top1", 2)):
                mean, _ = mean_and_error([found[name, variant, s][figure] for s in seeds])
                apart = [found[name, variant, s][figure] - found[name, "defaults", s][figure] for s in seeds]
                difference, error = mean_and_error(apart)
                cells += [
                    f"{mean:.{digits}f}",
                    "" if variant == "defaults" else f"{difference:+.{digits}f} ± {error:.{digits}f}",
                ]
            agreement, _ = mean_and_error([found[name, variant, s]["agreement"] for s in seeds])
            lines.append(f"| {variant} | {' | '.join(cells)} | {agreement:.2f} |")
        lines.append("")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4, 5])
    parser.add_argument("--epochs", type=int, default=4, help="of fine-tuning")
    parser.add_argument("--lr", type=float, default=0.001, help="of fine-tuning, at its start")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--results", type=Path, required=True, help="JSON file; what is in it is not run again")
    args = parser.parse_args()
    rows = json.loads(args.results.read_text()) if args.results.exists() else []
    wanted = {("", "float"), *((name, variant) for name in FORMATS for variant in VARIANTS)}
    present = {seed: {(row["format"], row["variant"]) for row in rows if row["seed"] == seed} for seed in args.seeds}
    missing = {seed: done for seed, done in present.items() if wanted - done}
    begin = time.time()
    with concurrent.futures.ProcessPoolExecutor(args.jobs) as pool:
        jobs = [pool.submit(run_seed, seed, args.epochs, args.lr, done) for seed, done in missing.items()]
        for job in concurrent.futures.as_completed(jobs):
            rows += job.result()
            args.results.write_text(json.dumps(rows, indent=1))
            print(f"seed {rows[-1]['seed']} after {time.time() - begin:.0f} s", file=sys.stderr, flush=True)
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
