"""Detectors: the part that an engine runs."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class BackboneAndHead(nn.Module):
    """The part of a detector that an engine runs: images to raw logits and boxes, before any post-processing.

    It shares the modules, so it is made before or after ``qat.prepare`` alike. Images are what the detector's own
    transform hands to the backbone: normalised, of one size. Anchors, decoding and NMS stay in PyTorch.

    Args:
        backbone: Images ``(N, C, H, W)`` to a tensor or a dict of feature maps.
        head: Called with the list of feature maps.

    Example:
        >>> import torch
        >>> features = nn.Conv2d(3, 4, 3)
        >>> BackboneAndHead(features, nn.Identity())(torch.zeros(1, 3, 8, 8))[0].shape
        torch.Size([1, 4, 6, 6])
    """

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, images: Tensor) -> Any:
        features = self.backbone(images)
        return self.head([features] if isinstance(features, Tensor) else list(features.values()))
