"""Accuracy, latency and size of exported classifiers, measured with ONNX Runtime on the CPU."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..graph import run
from ..support.modes import looking_at

if TYPE_CHECKING:
    from onnxruntime import InferenceSession


@dataclass(frozen=True)
class Accuracy:
    """Accuracy on a test set.

    Attributes:
        top1: Share of correct predictions, in ``[0, 1]``.
        stderr: Its standard error, ``sqrt(p (1 - p) / n)``.
        balanced: Mean over classes of the share found.
        images: ``n``.
    """

    top1: float
    stderr: float
    balanced: float
    images: int


def accuracy(predicted: NDArray[Any], labels: NDArray[Any]) -> Accuracy:
    """Compare predicted classes with labels, both ``(n,)``.

    Example:
        >>> accuracy(np.array([0, 0, 0, 1]), np.array([0, 0, 1, 1]))
        Accuracy(top1=0.75, stderr=0.21650635094610965, balanced=0.75, images=4)
    """
    hit = predicted == labels
    top1 = float(hit.mean())
    recall = [float(hit[labels == label].mean()) for label in np.unique(labels)]
    return Accuracy(top1, float(np.sqrt(top1 * (1 - top1) / len(hit))), float(np.mean(recall)), len(hit))


def open_session(path: str | Path, *, as_written: bool = False) -> InferenceSession:
    """An ONNX Runtime session on the CPU, with as many threads as PyTorch uses.

    Args:
        path: The ONNX file.
        as_written: As for :func:`qat.graph.run.open_session`.
    """
    # OMP_NUM_THREADS and the processes beside this one then count for both runtimes.
    return run.open_session(path, as_written=as_written, threads=torch.get_num_threads())


def predict_onnx(path: str | Path, batches: Iterable[tuple[Any, Any]]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Predicted classes and labels of all ``batches``, by ONNX Runtime with Q/DQ in float."""
    session = open_session(path, as_written=True)
    name = session.get_inputs()[0].name
    predicted, labels = [], []
    for images, label in batches:
        predicted.append(session.run(None, {name: images.numpy()})[0].argmax(1))
        labels.append(label.numpy())
    return np.concatenate(predicted), np.concatenate(labels)


def predict_torch(model: nn.Module, batches: Iterable[tuple[Any, Any]]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Predicted classes and labels of all ``batches``, by ``model`` in eval mode on its own device."""
    device = next(model.parameters()).device
    with looking_at(model):
        results = [(model(images.to(device)).argmax(1).cpu().numpy(), label.numpy()) for images, label in batches]
    return np.concatenate([p for p, _ in results]), np.concatenate([label for _, label in results])


def cpu_latency(
    paths: Mapping[str, Path], image: NDArray[np.float32], *, runs: int = 50, warm_up: int = 10
) -> dict[str, float]:
    """Median time of one call in milliseconds, with all optimizations of ONNX Runtime.

    The files take turns, so that a change of the machine's speed meets all of them.

    Args:
        paths: ONNX files by name.
        image: Input of shape ``(1, 3, H, W)``.
        runs: Measured calls of each file.
        warm_up: Calls of each file before those.
    """
    sessions = {name: open_session(path) for name, path in paths.items()}
    times: dict[str, list[float]] = {name: [] for name in paths}
    for turn in range(warm_up + runs):
        for name, session in sessions.items():
            feed = {session.get_inputs()[0].name: image}
            start = time.perf_counter()
            session.run(None, feed)
            if turn >= warm_up:
                times[name].append(1000 * (time.perf_counter() - start))
    return {name: median(values) for name, values in times.items()}
