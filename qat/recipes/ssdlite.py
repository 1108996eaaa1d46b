"""SSDLite with a MobileNetV2 backbone (Sandler et al. 2018, section 6.2), as TensorFlow's detection models have it.

Convolutions have a bias and no batch norm: the published weights come with most batch norms folded, and
:func:`load_tensorflow` folds the others (behind depthwise convolutions). Padding is TensorFlow's SAME: where it is
uneven, the extra pixel goes to the bottom and the right.

Images ``(N, 3, size, size)`` are in ``[-1, 1]``. Outputs are raw, for every anchor box: its four numbers and a logit for each
class, of which the first is the background (scores are sigmoids). Decoding and non-maximum suppression are functions of
:mod:`qat.recipes.boxes`, outside the network and its ONNX file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..errors import QATError

# FusedBatchNorm's epsilon in the graph of the published detector.
EPSILON = 1e-3


@dataclass(frozen=True)
class Design:
    """Sizes of an SSDLite.

    Attributes:
        image_size: Height and width in pixels.
        stem: Channels of the first convolution.
        blocks: Expansion, channels and stride of each inverted residual. The first map of features is the expansion of the
            last block of stride 2.
        last: Channels of the backbone's last convolution, the second map of features.
        extras: Squeezed and final channels of each further map, half as large as the one before.
        classes: Logits of an anchor, background included.
    """

    image_size: int
    stem: int
    blocks: tuple[tuple[int, int, int], ...]
    last: int
    extras: tuple[tuple[int, int], ...]
    classes: int


def _stages(*stages: tuple[int, int, int, int]) -> tuple[tuple[int, int, int], ...]:
    """Blocks of stages, given as in table 2 of the paper: expansion, channels, blocks, stride of the first."""
    return tuple((t, c, s if i == 0 else 1) for t, c, n, s in stages for i in range(n))


COCO = Design(
    300,
    32,
    _stages((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)),
    1280,
    ((256, 512), (128, 256), (128, 256), (64, 128)),
    91,
)
TINY = Design(64, 8, _stages((1, 8, 1, 1), (4, 16, 2, 2), (4, 24, 2, 2)), 64, ((16, 32), (16, 32)), 4)


class SameConv(nn.Sequential):
    """A convolution with SAME padding and bias, and ReLU6 behind it unless it is ``linear``; of fixed size.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output; those of the input for a depthwise convolution.
        size: Height and width of the input.
        kernel: Height and width of the kernel.
        stride: Stride.
        depthwise: One filter a channel.
        linear: Without ReLU6.

    Example:
        >>> conv = SameConv(3, 8, 300, kernel=3, stride=2)
        >>> conv.out_size, conv(torch.zeros(1, 3, 300, 300)).shape[2:]
        (150, torch.Size([150, 150]))
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        size: int,
        *,
        kernel: int = 1,
        stride: int = 1,
        depthwise: bool = False,
        linear: bool = False,
    ) -> None:
        super().__init__()
        self.out_size = -(-size // stride)
        total = max((self.out_size - 1) * stride + kernel - size, 0)
        if total % 2:
            # A convolution of torch pads evenly.
            self.pad = nn.ZeroPad2d((total // 2, total - total // 2) * 2)
        groups = in_channels if depthwise else 1
        padding = 0 if total % 2 else total // 2
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, groups=groups)
        if not linear:
            self.act = nn.ReLU6()


class InvertedResidual(nn.Module):
    """Widen, filter each channel, narrow; and the input on top where shapes allow (Sandler et al. 2018, figure 4).

    Args:
        in_channels: Channels of the input.
        channels: Channels of the output.
        size: Height and width of the input.
        expansion: Factor of widening; 1 leaves it out.
        stride: Of the filter.
    """

    def __init__(self, in_channels: int, channels: int, size: int, expansion: int, stride: int) -> None:
        super().__init__()
        wide = expansion * in_channels
        self.expand = SameConv(in_channels, wide, size) if expansion != 1 else nn.Identity()
        self.depthwise = SameConv(wide, wide, size, kernel=3, stride=stride, depthwise=True)
        self.out_size = self.depthwise.out_size
        self.project = SameConv(wide, channels, self.out_size, linear=True)
        self.residual = stride == 1 and in_channels == channels

    def forward(self, x: Tensor) -> Tensor:
        """Shape ``(N, in_channels, size, size)`` to ``(N, channels, out_size, out_size)``."""
        out = self.project(self.depthwise(self.expand(x)))
        return x + out if self.residual else out


class Predictor(nn.Module):
    """A depthwise and a 1x1 convolution that predict ``values`` numbers for each of ``anchors`` boxes a position."""

    def __init__(self, in_channels: int, size: int, anchors: int, values: int) -> None:
        super().__init__()
        self.values = values
        self.depthwise = SameConv(in_channels, in_channels, size, kernel=3, depthwise=True)
        self.predict = SameConv(in_channels, anchors * values, size, linear=True)

    def forward(self, x: Tensor) -> Tensor:
        """Shape ``(N, in_channels, size, size)`` to ``(N, size * size * anchors, values)``."""
        x = self.predict(self.depthwise(x))
        return x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, self.values)


class SSDLite(nn.Module):
    """SSDLite with a MobileNetV2 backbone.

    Args:
        design: Its sizes: ``COCO``, or ``TINY`` for tests.

    Example:
        >>> out = SSDLite(TINY)(torch.zeros(2, 3, 64, 64))
        >>> out["boxes"].shape, out["logits"].shape
        (torch.Size([2, 1272, 4]), torch.Size([2, 1272, 4]))
    """

    def __init__(self, design: Design = COCO) -> None:
        super().__init__()
        self.design = design
        stem = SameConv(3, design.stem, design.image_size, kernel=3, stride=2)
        channels, size = design.stem, stem.out_size
        # The block whose expansion is the first map of features is cut behind that.
        cut = max(i for i, (_, _, stride) in enumerate(design.blocks) if stride == 2)
        early: list[nn.Module] = [stem]
        late: list[nn.Module] = []
        for i, (expansion, out, stride) in enumerate(design.blocks):
            if i == cut:
                wide = expansion * channels
                early.append(SameConv(channels, wide, size))
                maps = [(wide, size)]
                depthwise = SameConv(wide, wide, size, kernel=3, stride=stride, depthwise=True)
                size = depthwise.out_size
                late += [depthwise, SameConv(wide, out, size, linear=True)]
            else:
                block = InvertedResidual(channels, out, size, expansion, stride)
                (early if i < cut else late).append(block)
                size = block.out_size
            channels = out
        late.append(SameConv(channels, design.last, size))
        maps.append((design.last, size))
        self.early, self.late = nn.Sequential(*early), nn.Sequential(*late)
        self.extras = nn.ModuleList()
        for squeezed, out in design.extras:
            in_channels, size = maps[-1]
            depthwise = SameConv(squeezed, squeezed, size, kernel=3, stride=2, depthwise=True)
            last = SameConv(squeezed, out, depthwise.out_size)
            self.extras.append(nn.Sequential(SameConv(in_channels, squeezed, size), depthwise, last))
            maps.append((out, depthwise.out_size))
        self.map_sizes = tuple(size for _, size in maps)
        counts = [len(shapes) for shapes in anchor_shapes(len(maps))]
        self.box_heads, self.class_heads = (
            nn.ModuleList(Predictor(c, size, n, values) for (c, size), n in zip(maps, counts, strict=True))
            for values in (4, design.classes)
        )

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images ``(N, 3, size, size)`` to ``boxes``, the codes ``(N, A, 4)``, and ``logits`` ``(N, A, classes)``."""
        maps = [self.early(images)]
        maps.append(self.late(maps[0]))
        for extra in self.extras:
            maps.append(extra(maps[-1]))
        boxes = [head(x) for head, x in zip(self.box_heads, maps, strict=True)]
        logits = [head(x) for head, x in zip(self.class_heads, maps, strict=True)]
        return {"boxes": torch.cat(boxes, 1), "logits": torch.cat(logits, 1)}


def anchor_shapes(maps: int) -> list[list[tuple[float, float]]]:
    """Heights and widths of the anchors at a position of each map of features, as shares of the image.

    The scales rise from 0.2 to 0.95 in even steps; each has aspect ratios 1, 2, 1/2, 3 and 1/3 and a square between it and
    the next scale. The first map has three shapes only (TensorFlow's ``ssd_anchor_generator``, Liu et al. 2016, section 2.2).
    """
    scales = [0.2 + 0.75 * i / (maps - 1) for i in range(maps)] + [1.0]
    shapes = []
    for i in range(maps):
        wanted = [(scales[i], ratio) for ratio in (1.0, 2.0, 0.5, 3.0, 0.3333)]
        wanted.append((sqrt(scales[i] * scales[i + 1]), 1.0))
        if i == 0:
            wanted = [(0.1, 1.0), (scales[0], 2.0), (scales[0], 0.5)]
        shapes.append([(scale / sqrt(ratio), scale * sqrt(ratio)) for scale, ratio in wanted])
    return shapes


def make_anchors(model: SSDLite) -> Tensor:
    """The anchors of ``model`` in the order of its outputs.

    Returns:
        Shape ``(A, 4)``: centre x, centre y, width and height, as shares of the image.
    """
    rows = []
    for size, shapes in zip(model.map_sizes, anchor_shapes(len(model.map_sizes)), strict=True):
        centre = [(i + 0.5) / size for i in range(size)]
        rows += [(x, y, width, height) for y in centre for x in centre for height, width in shapes]
    return torch.tensor(rows)


def load_tensorflow(model: SSDLite, tensors: Mapping[str, NDArray[Any]]) -> None:
    """Load the tensors of TensorFlow's ``ssdlite_mobilenet_v2_coco`` by name, in place; batch norms that are left are folded.

    Args:
        model: Of the design ``COCO``.
        tensors: As :func:`qat.recipes.tfjs.read_tensors` gives them.

    Raises:
        QATError: If a tensor is missing, or has another shape. The model is then unchanged.
    """
    found = [(conv, *_folded(tensors, name, conv)) for name, conv in _tensorflow_names(model)]
    with torch.no_grad():
        for conv, weight, bias in found:
            conv.weight.copy_(weight)
            assert conv.bias is not None
            conv.bias.copy_(bias)


def _tensorflow_names(model: SSDLite) -> Iterator[tuple[str, nn.Conv2d]]:
    """Every convolution with its name in TensorFlow's graph."""
    root = "FeatureExtractor/MobilenetV2"
    early: list[Any] = list(model.early)
    late: list[Any] = list(model.late)
    yield f"{root}/Conv", early[0].conv
    blocks: list[list[tuple[str, Any]]] = [list(block.named_children()) for block in early[1:-1]]
    blocks.append([("expand", early[-1]), ("depthwise", late[0]), ("project", late[1])])
    blocks += [list(block.named_children()) for block in late[2:-1]]
    for i, parts in enumerate(blocks):
        for part, module in parts:
            if isinstance(module, SameConv):
                yield f"{root}/expanded_conv{f'_{i}' if i else ''}/{part}", module.conv
    yield f"{root}/Conv_1", late[-1].conv
    extra: Any
    for i, extra in enumerate(model.extras, 2):
        squeeze, depthwise, last = (module.conv for module in extra)
        name = f"{root}/layer_19_2_Conv2d_{i}_3x3_s2_{last.out_channels}"
        yield f"{root}/layer_19_1_Conv2d_{i}_1x1_{squeeze.out_channels}", squeeze
        yield f"{name}_depthwise", depthwise
        yield name, last
    head: Any
    for heads, name in ((model.box_heads, "BoxEncodingPredictor"), (model.class_heads, "ClassPredictor")):
        for i, head in enumerate(heads):
            yield f"BoxPredictor_{i}/{name}_depthwise", head.depthwise.conv
            yield f"BoxPredictor_{i}/{name}", head.predict.conv


def _folded(tensors: Mapping[str, NDArray[Any]], name: str, conv: nn.Conv2d) -> tuple[Tensor, Tensor]:
    """Weight ``(C_out, C_in / groups, kH, kW)`` and bias of a convolution, batch norm included."""

    def get(*suffixes: str) -> NDArray[np.float64]:
        for suffix in suffixes:
            if f"{name}/{suffix}" in tensors:
                return tensors[f"{name}/{suffix}"].astype(np.float64)
        raise QATError(f"the weights have no {name}/{suffixes[0]}: not those of ssdlite_mobilenet_v2_coco")

    kernel = get("depthwise_weights") if conv.groups > 1 else get("Conv2D/merged_input", "weights")
    if kernel.ndim != 4:
        raise QATError(f"{name}: the kernel in the weights has {kernel.ndim} dimensions, expected 4")
    # Height, width, inputs, outputs; for a depthwise kernel height, width, channels, 1.
    weight = kernel.transpose((2, 3, 0, 1) if conv.groups > 1 else (3, 2, 0, 1))
    scale: NDArray[np.float64] = np.ones(conv.out_channels)
    if f"{name}/BatchNorm/gamma" in tensors:
        norm = {key: get(f"BatchNorm/{key}") for key in ("gamma", "beta", "moving_mean", "moving_variance")}
        _check(name, {key: value.shape for key, value in norm.items()}, (conv.out_channels,))
        scale = norm["gamma"] / np.sqrt(norm["moving_variance"] + EPSILON)
        shift = norm["beta"] - norm["moving_mean"] * scale
    else:
        shift = get("BatchNorm/batchnorm/sub", "biases")
        if f"{name}/BatchNorm/batchnorm/mul" in tensors:
            scale = get("BatchNorm/batchnorm/mul")
    _check(name, {"scale": scale.shape, "shift": shift.shape}, (conv.out_channels,))
    _check(name, {"kernel": weight.shape}, tuple(conv.weight.shape))
    folded = np.ascontiguousarray(weight * scale[:, None, None, None])
    return torch.from_numpy(folded).float(), torch.from_numpy(shift).float()


def _check(name: str, shapes: Mapping[str, tuple[int, ...]], expected: tuple[int, ...]) -> None:
    for what, shape in shapes.items():
        if shape != expected:
            raise QATError(f"{name}: the {what} in the weights has shape {shape}, expected {expected}")
