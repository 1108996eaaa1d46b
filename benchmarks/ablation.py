"""What each setting of QATCallback is worth: fine-tuning with all defaults, against the same with one of them changed.

    python benchmarks/ablation.py --seeds 0 1 2 3 4 5 --jobs 2 --results FILE
    python benchmarks/ablation.py --recipe efficientnet --config recipes/efficientnet-elpv-w4a8.yaml --part val --results FILE

FILE gets a line of JSON as soon as a variant is measured, and the float model of each seed is kept beside it: a run that was
cut off goes on where it stopped, from the same float model (training on a GPU does not repeat itself to the bit).

A recipe's network and data (ResNet-20 on scikit-learn's digits), trained by the recipe and then fine-tuned, every variant from
the same float model with the same order of batches. 8-bit PTQ loses nothing on the digits, so there are formats where it does;
with ``--config`` the format is that of the file. Differences are paired by seed. To choose settings, look at ``--part val``;
with ``--folds K`` it is another part of the training and validation images for each of K seeds (cross-validation).
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
# Arguments of QATCallback, besides those of the configuration under "config"; "folded" starts from a network whose batch
# normalization torch has folded into its convolutions, "again" takes new ranges from the fine-tuned network.
VARIANTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "calibration max": {"calibration": {"method": "max"}},
    "calibration percentile": {"calibration": {"method": "percentile"}},
    "calibration entropy": {"calibration": {"method": "entropy"}},
    "batch norm never frozen": {"freeze_bn_epoch": None},
    "batch norm frozen from epoch 2": {"freeze_bn_epoch": 2},
    "batch norm frozen from epoch 3": {"freeze_bn_epoch": 3},
    "batch norm re-estimated": {"freeze_bn_epoch": None, "reestimate_bn": 10},
    "batch norm folded first": {"folded": True},
    "calibration entropy, batch norm frozen from epoch 2": {"calibration": {"method": "entropy"}, "freeze_bn_epoch": 2},
    "weight ranges frozen": {"config": {"weight_range": "frozen"}},
    "ranges frozen from epoch 2": {"freeze_ranges_epoch": 2},
    "learned scales": {"learn_scales": True},
    "learned scales, a tenth of the rate": {"learn_scales": True, "range_lr_factor": 0.1},
    "learned scales, frozen from epoch 2": {"learn_scales": True, "freeze_ranges_epoch": 2},
    "learned scales, batch norm frozen from epoch 3": {"learn_scales": True, "freeze_bn_epoch": 3},
    "learned scales, calibration max": {"learn_scales": True, "calibration": {"method": "max"}},
    "calibrated once more": {"again": True},
    "residual Adds, one input": {"config": {"add_inputs": "residual"}},
    "distillation": {"distill_from": "float"},
    "oscillations dampened": {"dampen_oscillations": 0.01},
    "weights by mse": {"calibration": {"weight_method": "mse"}, "config": {"weight_range": "frozen"}},
    "weights by mse, learned scales": {"calibration": {"weight_method": "mse"}, "learn_scales": True},
}
# What only formats of few bits are tried with, as it takes its time: "epochs" multiplies those of the command line, "rounded"
# starts from learned rounding with corrected biases.
LONGER: dict[str, dict[str, Any]] = {
    "three times the epochs": {"epochs": 3},
    "three times the epochs, distillation": {"epochs": 3, "distill_from": "float"},
    "three times the epochs, weights by mse": {**VARIANTS["weights by mse"], "epochs": 3},
    "three times the epochs, weights by mse, learned scales": {**VARIANTS["weights by mse, learned scales"], "epochs": 3},
    "three times the epochs, weights by mse, rounded": {**VARIANTS["weights by mse"], "epochs": 3, "rounded": True},
}
FLOAT, FLOAT_LONGER = "float", "float trained equally long"
# The float model has the batch-norm schedule of the variants that it is compared with.
BATCH_NORM: dict[int | None, str] = {
    0: "",
    2: ", batch norm frozen from epoch 2",
    3: ", batch norm frozen from epoch 3",
    None: ", batch norm never frozen",
}


def float_longer(factor: int, first: int | None) -> str:
    """Name of the float model trained ``factor`` times the epochs, with batch norm frozen from epoch ``first``."""
    return FLOAT_LONGER + (f", {factor} times the epochs" if factor > 1 else "") + BATCH_NORM[first]


def run_seed(seed: int, args: argparse.Namespace, done: set[tuple[str, str]]) -> int:
    """Every format and variant for one seed but those that are ``done``, each a line of the results; returns the seed."""
    import importlib
    import io

    import torch
    from rich.console import Console
    from torch.fx.experimental.optimization import fuse
    from torch.nn import functional as F

    import qat
    from qat.recipes import models, training, variants
    from qat.recipes.data import load
    from qat.recipes.settings import parse
    from qat.support.tensor_files import write_tensors

    torch.set_num_threads(1)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    console = Console(file=io.StringIO())
    module = importlib.import_module(f"qat.recipes.{args.recipe}")
    kind = next(v for v in vars(module).values() if getattr(v, "recipe", None) == args.recipe)
    given = ["--seed", str(seed), "--device", args.device, *(["--config", str(args.config)] if args.config else [])]
    given += ["--qat-epochs", str(args.epochs)] if args.epochs else []
    given += ["--qat-lr", str(args.lr)] if args.lr else []
    settings = parse(kind, "", given)
    device = training.device_of(settings.device)
    data = load(settings.data, settings.data_dir, settings.image_size)
    if args.folds:
        data = data.fold(seed % args.folds, args.folds)
    torch.manual_seed(seed)
    options = {"small_stem": settings.small_stem, "pretrained": settings.pretrained}
    model = models.build(settings.arch, len(data.classes), image_size=data.image_size, **options)
    kept = args.results.with_suffix(f".seed{seed}.pt")
    if kept.exists():
        model.load_state_dict(torch.load(kept, weights_only=True))
    else:
        base = training.make_classifier(model, settings, fine_tune=False)
        training.fit(base, data, settings, epochs=settings.epochs, name="float", console=console, seed=seed)
        write_tensors(kept, model.cpu().state_dict())
    model.cpu().eval()
    batches = list(data.loader(getattr(data, args.part), 256))
    labels = torch.cat([label for _, label in batches])

    def logits_of(model: Any) -> torch.Tensor:
        model.eval().to(device)
        with torch.no_grad():
            found = torch.cat([model(images.to(device)).float().cpu() for images, _ in batches])
        model.cpu()
        return found

    reference = logits_of(model)

    def measured(of_format: str, variant: str, logits: torch.Tensor) -> None:
        row = {
            "seed": seed,
            "format": of_format,
            "variant": variant,
            "loss": F.cross_entropy(logits, labels).item(),
            "top1": 100 * (logits.argmax(1) == labels).float().mean().item(),
            "agreement": 100 * (logits.argmax(1) == reference.argmax(1)).float().mean().item(),
        }
        # One write of a whole line: the processes of other seeds append to the same file.
        with args.results.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def tuned(model: Any, callback: Any, epochs: int, name: str) -> Any:
        classifier = training.make_classifier(copy.deepcopy(model), settings, fine_tune=True)
        classifier.train()
        training.fit(classifier, data, settings, epochs=epochs, name=name, console=console, seed=seed + 1, callbacks=[callback])
        return classifier.model

    if ("", FLOAT) not in done:
        measured("", FLOAT, reference)
    calibration = data.calibration(settings.calibration_images, settings.batch_size)
    batch = [(images.to(device), label) for images, label in calibration]

    def calibrated(config: qat.QuantConfig, **options: Any) -> Any:
        found = copy.deepcopy(model).to(device)
        qat.prepare(found, config, example_inputs=batch[0][0][:1])
        qat.calibrate(found, batch, **options, progress=False)
        return found

    chosen = {name: variant for name, variant in {**VARIANTS, **LONGER}.items() if name in args.variants}
    schedules = {(variant.get("epochs", 1), variant.get("freeze_bn_epoch", 0)) for variant in chosen.values()}
    for factor, first in sorted(schedules, key=str):
        name = float_longer(factor, first)
        if ("", name) not in done:
            frozen = variants.FreezeBatchNorm(factor * settings.qat_epochs if first is None else first)
            measured("", name, logits_of(tuned(model, frozen, factor * settings.qat_epochs, name)))
    for name, of_format in formats(args).items():
        plain = {**settings.quant.to_dict(), **of_format}
        for method in ("max", "percentile", "mse", "entropy"):
            if (name, f"PTQ, {method}") in done:
                continue
            measured(name, f"PTQ, {method}", logits_of(calibrated(qat.QuantConfig.from_dict(plain), method=method)))
        for variant, options in chosen.items():
            if (name, variant) in done:
                continue
            given_options = dict(options)
            config = qat.QuantConfig.from_dict({**plain, **given_options.pop("config", {})})
            epochs = given_options.pop("epochs", 1) * settings.qat_epochs
            calibrate_options = given_options.pop("calibration", {})
            again = given_options.pop("again", False)
            start = fuse(copy.deepcopy(model).eval()) if given_options.pop("folded", False) else model
            if given_options.pop("rounded", False):
                start = calibrated(config, **calibrate_options)
                images = max(variants.ROUNDING_IMAGES // settings.batch_size, 1)
                qat.round_weights(start, batch, steps=settings.rounding_steps, batches=images, progress=False)
                qat.correct_biases(start, batch, batches=images, progress=False)
                start.cpu()
            callback = qat.QATCallback(
                config,
                calibration={"progress": False, **calibrate_options},
                calibration_data=calibration,
                log_ranges=None,
                **given_options,
            )
            found = tuned(start, callback, epochs, variant)
            if again:
                qat.calibrate(found.to(device).eval(), batch, **calibrate_options, progress=False)
            measured(name, variant, logits_of(found))
    return seed


def formats(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The changes to the recipe's settings by the name of the format."""
    return {args.config.stem: {}} if args.config else FORMATS


def read(results: Path) -> list[dict[str, Any]]:
    """The rows measured so far."""
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean, and its standard error."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.mean(values), error


def table(rows: list[dict[str, Any]], names: list[str]) -> str:
    """Markdown: a table a format; differences to the defaults, and their standard errors, over the seeds that have both."""
    lines = []
    found = {(r["format"], r["variant"], r["seed"]): r for r in rows}

    def to_float_longer(name: str, variant: str) -> str:
        """Difference of top-1 to the float model of as many epochs and the same batch-norm schedule."""
        options = {**VARIANTS, **LONGER}.get(variant, {})
        longer = float_longer(options.get("epochs", 1), options.get("freeze_bn_epoch", 0))
        differences = [
            found[name, variant, s]["top1"] - found["", longer, s]["top1"]
            for s in seeds
            if (name, variant, s) in found and ("", longer, s) in found
        ]
        return "{:+.2f} ± {:.2f}".format(*mean_and_error(differences)) if differences else ""

    seeds = sorted({r["seed"] for r in rows})
    for variant in dict.fromkeys(r["variant"] for r in rows if not r["format"]):
        those = [found["", variant, s] for s in seeds if ("", variant, s) in found]
        loss, _ = mean_and_error([r["loss"] for r in those])
        top1, error = mean_and_error([r["top1"] for r in those])
        lines.append(f"{variant}: loss {loss:.4f}, top-1 {top1:.2f} ± {error:.2f} %, {len(those)} seeds.\n")
    for name in names:
        header = f"| {name} | loss | to the defaults | top-1 % | to the defaults | to {FLOAT_LONGER} | as float % | seeds |"
        lines += [header, "|---" * (header.count("|") - 1) + "|"]
        for variant in dict.fromkeys(r["variant"] for r in rows if r["format"] == name):
            pairs = [
                (found[name, variant, s], found[name, "defaults", s])
                for s in seeds
                if (name, variant, s) in found and (name, "defaults", s) in found
            ]
            if not pairs:
                continue
            cells = []
            for figure, digits in (("loss", 4), ("top1", 2)):
                mean, _ = mean_and_error([row[figure] for row, _ in pairs])
                difference, error = mean_and_error([row[figure] - default[figure] for row, default in pairs])
                cells += [
                    f"{mean:.{digits}f}",
                    "" if variant == "defaults" else f"{difference:+.{digits}f} ± {error:.{digits}f}",
                ]
            agreement, _ = mean_and_error([row["agreement"] for row, _ in pairs])
            cells += [to_float_longer(name, variant), f"{agreement:.2f}", str(len(pairs))]
            lines.append(f"| {variant} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4, 5])
    parser.add_argument("--recipe", default="resnet", choices=("resnet", "mobilenet", "efficientnet", "vit"))
    parser.add_argument("--config", type=Path, help="settings of the recipe (default: its own, in three formats)")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=[*VARIANTS, *LONGER], metavar="VARIANT")
    parser.add_argument("--part", default="test", choices=("val", "test"), help="images that the figures are of")
    parser.add_argument("--folds", type=int, metavar="K", help="--part val: cross-validation, seed S holds out part S mod K")
    parser.add_argument("--epochs", type=int, help="of fine-tuning (default: the recipe's)")
    parser.add_argument("--lr", type=float, help="of fine-tuning, at its start (default: the recipe's)")
    parser.add_argument("--device", default="cpu", help="Lightning accelerator")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--results", type=Path, required=True, help="JSON lines; what is in it is not run again")
    args = parser.parse_args()
    if "defaults" not in args.variants:
        parser.error("--variants: differences are to the defaults, so name them too")
    if args.folds and args.part != "val":
        parser.error("--folds: is for --part val")
    rows = read(args.results)
    wanted = {("", FLOAT), *((name, variant) for name in formats(args) for variant in args.variants)}
    present = {seed: {(row["format"], row["variant"]) for row in rows if row["seed"] == seed} for seed in args.seeds}
    missing = {seed: done for seed, done in present.items() if wanted - done}
    begin = time.time()
    with concurrent.futures.ProcessPoolExecutor(args.jobs) as pool:
        jobs = [pool.submit(run_seed, seed, args, done) for seed, done in missing.items()]
        for job in concurrent.futures.as_completed(jobs):
            print(f"seed {job.result()} after {time.time() - begin:.0f} s", file=sys.stderr, flush=True)
    print(table(read(args.results), list(formats(args))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
