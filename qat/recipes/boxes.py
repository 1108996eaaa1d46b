"""Boxes of a single-shot detector: codes, matching, losses, detections and their precision.

A box is left, top, right, bottom; an anchor centre x, centre y, width, height; both as shares of the image. A code is what
the network predicts for an anchor: ``(10 (y - ya) / ha, 10 (x - xa) / wa, 5 log(h / ha), 5 log(w / wa))`` of the centres
and sizes (Ren et al. 2015, section 3.1.2, with the scales and the order of TensorFlow's ``FasterRcnnBoxCoder``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import batched_nms, box_convert, box_iou, sigmoid_focal_loss

from ..errors import QATError

_SCALES = (10.0, 10.0, 5.0, 5.0)
# exp of more would overflow float16; a box of the whole image is 5 log(1 / 0.1) = 11.5 from the smallest anchor.
_LARGEST = 5 * 10.0


def decode(codes: Tensor, anchors: Tensor) -> Tensor:
    """Boxes of codes, cut at the border of the image.

    Args:
        codes: Shape ``(..., A, 4)``.
        anchors: Shape ``(A, 4)``.

    Example:
        >>> decode(torch.zeros(1, 4), torch.tensor([[0.5, 0.5, 0.5, 1.0]]))
        tensor([[0.2500, 0.0000, 0.7500, 1.0000]])
    """
    y, x, h, w = (codes.clamp(max=_LARGEST) / codes.new_tensor(_SCALES)).unbind(-1)
    centres = torch.stack([x, y], -1) * anchors[:, 2:] + anchors[:, :2]
    sizes = torch.stack([w, h], -1).exp() * anchors[:, 2:]
    return torch.cat([centres - sizes / 2, centres + sizes / 2], -1).clamp(0, 1)


def encode(boxes: Tensor, anchors: Tensor) -> Tensor:
    """Codes of boxes: inverse of :func:`decode`, without the cut.

    Args:
        boxes: Shape ``(A, 4)``, of positive width and height.
        anchors: Shape ``(A, 4)``.
    """
    x, y, w, h = box_convert(boxes, "xyxy", "cxcywh").unbind(-1)
    xa, ya, wa, ha = anchors.unbind(-1)
    codes = torch.stack([(y - ya) / ha, (x - xa) / wa, (h / ha).log(), (w / wa).log()], -1)
    return codes * codes.new_tensor(_SCALES)


def match(boxes: Tensor, anchors: Tensor, threshold: float = 0.5) -> Tensor:
    """The box that each anchor is to predict (Liu et al. 2016, section 2.2).

    An anchor gets the box that it overlaps most if their intersection over union is at least ``threshold``; and each box
    gets the anchor that it overlaps most, whatever the overlap.

    Args:
        boxes: Shape ``(n, 4)``.
        anchors: Shape ``(A, 4)``.
        threshold: Smallest overlap.

    Returns:
        Shape ``(A,)``, int64: index of the box, -1 for none.
    """
    if not len(boxes):
        return torch.full((len(anchors),), -1, device=anchors.device)
    overlap = box_iou(box_convert(anchors, "cxcywh", "xyxy"), boxes)
    best, chosen = overlap.max(1)
    chosen = torch.where(best >= threshold, chosen, -1)
    chosen[overlap.argmax(0)] = torch.arange(len(boxes), device=anchors.device)
    return chosen


def ssd_loss(codes: Tensor, logits: Tensor, targets: Sequence[Mapping[str, Tensor]], anchors: Tensor) -> Tensor:
    """Focal loss of the classes (Lin et al. 2017) and smooth L1 of the codes, for each matched anchor of the batch.

    Args:
        codes: Shape ``(N, A, 4)``.
        logits: Shape ``(N, A, classes)``; the first class is the background, which has no target of its own.
        targets: For each image ``boxes`` ``(n, 4)``, as shares of the image, and ``labels`` ``(n,)`` from 1.
        anchors: Shape ``(A, 4)``.

    Returns:
        Shape ``()``.
    """
    wanted = torch.zeros_like(logits)
    box_loss = codes.new_zeros(())
    positives = 0
    for i, target in enumerate(targets):
        chosen = match(target["boxes"], anchors)
        matched = (chosen >= 0).nonzero().squeeze(1)
        wanted[i, matched, target["labels"][chosen[matched]]] = 1
        expected = encode(target["boxes"][chosen[matched]], anchors[matched])
        box_loss = box_loss + F.smooth_l1_loss(codes[i, matched], expected, reduction="sum")
        positives += len(matched)
    class_loss = sigmoid_focal_loss(logits[..., 1:], wanted[..., 1:], reduction="sum")
    return (class_loss + box_loss) / max(positives, 1)


def distillation_loss(student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> Tensor:
    """How far codes and class probabilities are from a teacher's, for each object that the teacher sees.

    The sum of the Kullback-Leibler divergences of all probabilities (of one sigmoid each) and of smooth L1 of the codes; an
    anchor's codes count as much as the teacher's largest probability there that it is no background.

    Args:
        student: Codes under ``boxes``, ``(N, A, 4)``, and ``logits`` ``(N, A, classes)``.
        teacher: The same.

    Returns:
        Shape ``()``, at least 0.
    """
    wanted = teacher["logits"].sigmoid()
    entropy = F.binary_cross_entropy_with_logits(teacher["logits"], wanted, reduction="sum")
    divergence = F.binary_cross_entropy_with_logits(student["logits"], wanted, reduction="sum") - entropy
    weight = wanted[..., 1:].amax(-1)
    box_loss = (weight * F.smooth_l1_loss(student["boxes"], teacher["boxes"], reduction="none").sum(-1)).sum()
    return (divergence + box_loss) / weight.sum().clamp(min=1)


def detections(
    codes: Tensor, logits: Tensor, anchors: Tensor, *, size: int, threshold: float = 0.02, overlap: float = 0.6, top: int = 100
) -> list[dict[str, Tensor]]:
    """What a detector sees: boxes above a score, the best of those that overlap.

    Args:
        codes: Shape ``(N, A, 4)``.
        logits: Shape ``(N, A, classes)``, the first class being the background.
        anchors: Shape ``(A, 4)``.
        size: Height and width of the image in pixels.
        threshold: Smallest score.
        overlap: Of two boxes of a class with a larger intersection over union, the one of the lower score is dropped.
        top: Largest number of boxes an image.

    Returns:
        For each image ``boxes`` ``(n, 4)`` in pixels, ``scores`` and ``labels`` ``(n,)``, best first.
    """
    found = []
    for image_boxes, image_logits in zip(decode(codes, anchors) * size, logits, strict=True):
        scores, order = image_logits[:, 1:].sigmoid().flatten().sort(descending=True)
        count = min(int((scores > threshold).sum()), 10 * top)
        scores, order = scores[:count], order[:count]
        classes = image_logits.shape[1] - 1
        boxes, labels = image_boxes[order // classes], order % classes + 1
        kept = batched_nms(boxes, scores, labels, overlap)[:top]
        found.append({"boxes": boxes[kept], "scores": scores[kept], "labels": labels[kept]})
    return found


@dataclass(frozen=True)
class Precision:
    """Mean average precision over the classes of a set of images, as COCO defines it.

    Attributes:
        map50: At an intersection over union of 0.5.
        map: Mean over 0.5, 0.55, ..., 0.95.
    """

    map50: float
    map: float


def precision(found: Sequence[Mapping[str, Tensor]], targets: Sequence[Mapping[str, Tensor]]) -> Precision:
    """Mean average precision of detections, by torchmetrics and pycocotools.

    Args:
        found: As :func:`detections` gives them.
        targets: For each image ``boxes`` in pixels and ``labels``.

    Raises:
        QATError: Without pycocotools.
    """
    from torchmetrics.detection import MeanAveragePrecision

    try:
        metric = MeanAveragePrecision(backend="pycocotools")
    except ModuleNotFoundError as error:
        raise QATError("mean average precision needs pycocotools: pip install -e '.[detection]'") from error
    metric.update([dict(each) for each in found], [dict(each) for each in targets])
    values = metric.compute()
    return Precision(float(values["map_50"]), float(values["map"]))
