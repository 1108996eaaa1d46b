"""What the helpers of post-training quantization are worth: least-squared-error PTQ, against the same with each of them.

    python benchmarks/ptq.py --seeds 0 1 2 --jobs 2 --results FILE

The recipe's ResNet-20 and a small MobileNetV2 on scikit-learn's digits (539 test images), trained by the recipe. ReLU takes the
place of MobileNetV2's ReLU6, across which nothing can be equalized. Every variant starts from the same float model and sees the
same 512 training images. "error" is the squared difference of the logits to the float model's, relative to their square.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import copy
import io
import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

from ablation import FORMATS, mean_and_error

# What is applied, in this order: "equalize" before calibration, "weights" (their ranges by least squared error) in it.
VARIANTS = {
    "PTQ, mse": (),
    "+ equalize": ("equalize",),
    "+ biases": ("biases",),
    "+ equalize, biases": ("equalize", "biases"),
    "+ round": ("round",),
    "+ equalize, round": ("equalize", "round"),
    "+ equalize, round, biases": ("equalize", "round", "biases"),
    "+ weights": ("weights",),
    "+ weights, round": ("weights", "round"),
    "+ weights, round, biases": ("weights", "round", "biases"),
}
ARCHS = ("resnet20", "mobilenetv2")


def build(arch: str, classes: int) -> Any:
    from torch import nn
    from torchvision.models import MobileNetV2

    from qat.recipes import models

    if arch == "resnet20":
        return models.build(arch, classes)
    # Expansion, channels, blocks, stride: for images of 8 pixels.
    setting = [[1, 16, 1, 1], [6, 24, 2, 1], [6, 32, 2, 2], [6, 64, 2, 2]]
    model = MobileNetV2(num_classes=classes, inverted_residual_setting=setting, dropout=0.0)
    model.features[0][0].stride = (1, 1)
    model.features[-1] = nn.Identity()
    model.classifier[1] = nn.Linear(64, classes)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU6):
                setattr(module, name, nn.ReLU(inplace=True))
    return model


def run_seed(arch: str, seed: int, steps: int) -> list[dict[str, Any]]:
    """Every format and variant for one seed; a row each."""
    import torch
    from rich.console import Console
    from torch.nn import functional as F

    import qat
    from qat.recipes.data import load
    from qat.recipes.resnet import ResNetSettings
    from qat.recipes.training import fit, make_classifier

    torch.set_num_threads(1)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    settings, data = ResNetSettings(device="cpu", seed=seed), load("digits")
    torch.manual_seed(seed)
    model = build(arch, len(data.classes))
    base = make_classifier(model, settings, fine_tune=False)
    fit(base, data, settings, epochs=settings.epochs, name="float", console=Console(file=io.StringIO()), seed=seed)
    model.cpu().eval()
    batches = list(data.loader(data.test, 256))
    labels = torch.cat([label for _, label in batches])
    calibration = data.calibration(settings.calibration_images, settings.batch_size)

    def row(of_format: str, variant: str, quantized: Any, seconds: float = 0.0) -> dict[str, Any]:
        quantized.eval()
        with torch.no_grad():
            logits = torch.cat([quantized(images) for images, _ in batches])
            wanted = torch.cat([model(images) for images, _ in batches])
        return {
            "arch": arch,
            "seed": seed,
            "format": of_format,
            "variant": variant,
            "loss": F.cross_entropy(logits, labels).item(),
            "top1": 100 * (logits.argmax(1) == labels).float().mean().item(),
            "error": 100 * ((logits - wanted).square().mean() / wanted.square().mean()).item(),
            "seconds": seconds,
        }

    rows = [row("", "float", model)]
    for name, config in FORMATS.items():
        for variant, steps_taken in VARIANTS.items():
            ptq, begin = copy.deepcopy(model), time.time()
            if "equalize" in steps_taken:
                qat.equalize(ptq, batches[0][0][:4])
            by_error = "weights" in steps_taken
            qat.prepare(ptq, qat.QuantConfig.from_dict({**config, **({"weight_range": "frozen"} if by_error else {})}))
            qat.calibrate(ptq, calibration, weight_method="mse" if by_error else "max", progress=False)
            if "round" in steps_taken:
                qat.round_weights(ptq, calibration, steps=steps, progress=False)
            if "biases" in steps_taken:
                qat.correct_biases(ptq, calibration, progress=False)
            rows.append(row(name, variant, ptq, time.time() - begin))
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a table for each network and format; means and standard errors, differences to PTQ paired by seed."""
    lines = []
    found = {(r["arch"], r["format"], r["variant"], r["seed"]): r for r in rows}
    for arch in dict.fromkeys(r["arch"] for r in rows):
        seeds = sorted({r["seed"] for r in rows if r["arch"] == arch})

        def values(of_format: str, variant: str, figure: str, arch: str = arch, seeds: list[int] = seeds) -> list[float]:
            return [found[arch, of_format, variant, seed][figure] for seed in seeds]

        loss, _ = mean_and_error(values("", "float", "loss"))
        top1, _ = mean_and_error(values("", "float", "top1"))
        lines.append(f"{arch}, float: test loss {loss:.4f}, top-1 {top1:.2f} %, {len(seeds)} seeds.\n")
        for name in FORMATS:
            lines += [f"| {arch}, {name} | loss | to PTQ | top-1 % | to PTQ | error % | s |", "|---|---|---|---|---|---|---|"]
            first = next(iter(VARIANTS))
            for variant in VARIANTS:
                cells = []
                for figure, digits in (("loss", 4), ("top1", 2)):
                    mean, _ = mean_and_error(values(name, variant, figure))
                    pairs = zip(values(name, variant, figure), values(name, first, figure), strict=True)
                    apart, error = mean_and_error([a - b for a, b in pairs])
                    cells += [f"{mean:.{digits}f}", "" if variant == first else f"{apart:+.{digits}f} ± {error:.{digits}f}"]
                wrong, _ = mean_and_error(values(name, variant, "error"))
                seconds, _ = mean_and_error(values(name, variant, "seconds"))
                lines.append(f"| {variant} | {' | '.join(cells)} | {wrong:.3f} | {seconds:.0f} |")
            lines.append("")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", nargs="+", default=ARCHS, choices=ARCHS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1000, help="of learned rounding")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--results", type=Path, required=True, help="JSON file; networks and seeds in it are not run again")
    args = parser.parse_args()
    from qat.support.files import write_text

    rows = json.loads(args.results.read_text()) if args.results.exists() else []
    done = {(row["arch"], row["seed"]) for row in rows}
    missing = [(arch, seed) for seed in args.seeds for arch in args.archs if (arch, seed) not in done]
    begin = time.time()
    with concurrent.futures.ProcessPoolExecutor(args.jobs) as pool:
        for future in concurrent.futures.as_completed([pool.submit(run_seed, *item, args.steps) for item in missing]):
            rows += future.result()
            write_text(args.results, json.dumps(rows, indent=1))
            print(f"{rows[-1]['arch']}, seed {rows[-1]['seed']} after {time.time() - begin:.0f} s", file=sys.stderr, flush=True)
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
