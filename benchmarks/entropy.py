"""Which ranges the entropy search may not choose: networks calibrated by it with several limits.

    python benchmarks/entropy.py

EfficientNet-Lite0 with ImageNet weights on stamps (most of the pictures is white), and on Fashion-MNIST (most is black) a
ResNet-20 trained for two epochs on 8,192 pictures, minutes on a CPU. Compared are the outputs with those of the float model:
Kullback-Leibler divergence in nats, and the share of equal classes. A range that clips more than the first figure of the values
does not count if its squared error is more than the second figure times the least.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import qat
from qat.calibration.methods import METHODS, amax_by_entropy
from qat.core.quantizer import quantizers, set_ranges
from qat.recipes.data import load
from qat.recipes.models import build

# Share clipped and factor of the error: as published; none that clips more than half; the default and its neighbours.
LIMITS = ((1, 0), (0.5, 0), (0.01, 10), (0.001, 100), (0.001, 30), (0.001, 10), (0.001, 4), (0, 10))


def stacked(dataset: Any, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images and labels of ``count`` random samples."""
    samples = [dataset[int(i)] for i in torch.randperm(len(dataset), generator=generator)[:count]]
    return torch.stack([image for image, _ in samples]), torch.tensor([label for _, label in samples])


def lite0(generator: torch.Generator) -> tuple[nn.Module, Tensor, Tensor]:
    """Network, images to calibrate on and images to compare on."""
    data = load("stamps")
    model = build("efficientnet_lite0", len(data.classes), pretrained=True).eval()
    held_out = [stacked(part, 10**9, generator)[0] for part in (data.val, data.test)]
    return model, stacked(data.plain_train, 256, generator)[0], torch.cat(held_out)


def resnet20(generator: torch.Generator) -> tuple[nn.Module, Tensor, Tensor]:
    """As :func:`lite0`, trained here."""
    data = load("fashion-mnist")
    model = build("resnet20", len(data.classes))
    images, labels = stacked(data.plain_train, 8192, generator)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    epochs, size = 2, 64
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=epochs * len(images) // size)
    for _ in range(epochs):
        for batch in torch.randperm(len(images), generator=generator).split(size):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            schedule.step()
    return model.eval(), images[:1024], stacked(data.test, 2000, generator)[0]


def rows(model: nn.Module, images: Tensor, test: Tensor) -> Iterator[str]:
    """A line of the table for each method."""

    @torch.no_grad()
    def logits() -> Tensor:
        return torch.cat([model(batch) for batch in test.split(100)])

    reference = logits()
    qat.prepare(model, example_inputs=images[:1])
    calibration = qat.calibrate(model, [(batch, None) for batch in images.split(64)], progress=False)
    sites = dict(quantizers(model))

    def row(name: str) -> str:
        found = logits()
        divergence = F.kl_div(found.log_softmax(1), reference.log_softmax(1), log_target=True, reduction="batchmean")
        equal = (found.argmax(1) == reference.argmax(1)).float().mean()
        return f"| {name} | {divergence:.4f} | {100 * equal:.2f} |"

    for method in METHODS:
        if method != "entropy":
            calibration.apply(method)
            yield row(method)
    for clipped, factor in LIMITS:
        found = {
            sites[path]: amax_by_entropy(h.counts[: len(h.used)], h.width, h.amax, clipped=clipped, error_factor=factor)
            for path, h in calibration.histograms.items()
        }
        set_ranges(found)
        yield row(f"entropy, {clipped:g}, {factor:g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    networks = {"lite0": lite0, "resnet20": resnet20}
    parser.add_argument("--networks", nargs="+", default=list(networks), choices=networks)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for name in args.networks:
        torch.manual_seed(args.seed)
        model, images, test = networks[name](torch.Generator().manual_seed(args.seed))
        print(f"\n| {name}, {len(test)} images | divergence | as float % |\n|---|---|---|", flush=True)
        for line in rows(model, images, test):
            print(line, flush=True)


if __name__ == "__main__":
    main()
