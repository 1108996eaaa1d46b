"""Modules with the attributes, key layout and arithmetic of pytorch-quantization 2.2.1, written anew for the tests.

``TensorQuantizer`` computes ``clamp(round(x * s), -bound - 1, bound) / s`` with ``s = bound / amax``, unlike ``qat``, which
divides by ``amax / bound``; an amax of at most 2 ** -24 gives zeros.
"""

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd


def fake_quant(x, amax, bits=8, unsigned=False, narrow_range=False):
    bound = 2.0 ** (bits - 1 + int(unsigned)) - 1.0
    low = 0.0 if unsigned else -bound if narrow_range else -bound - 1.0
    dead = amax <= 2.0**-24
    scale = torch.where(dead, torch.zeros_like(amax), bound / amax)
    codes = torch.clamp((x * scale).round(), low, bound)
    return codes / torch.where(dead, torch.ones_like(amax), scale)


class Clip(nn.Module):
    def __init__(self, low, high):
        super().__init__()
        self.clip_value_min = nn.Parameter(torch.tensor(float(low)))
        self.clip_value_max = nn.Parameter(torch.tensor(float(high)))

    def forward(self, x):
        return torch.minimum(torch.maximum(x, self.clip_value_min), self.clip_value_max)


class TensorQuantizer(nn.Module):
    def __init__(self, amax=None, axis=None, bits=8, unsigned=False, narrow_range=False, scale_amax=None, learn=None):
        super().__init__()
        self._num_bits, self._axis, self._unsigned, self._narrow_range = bits, axis, unsigned, narrow_range
        self._scale_amax, self._learn_amax, self._fake_quant = scale_amax, learn is not None, True
        self._disabled, self._if_quant, self._if_calib, self._if_clip = False, True, False, False
        if learn is not None:
            self.clip = Clip(*learn)
        if amax is not None:
            self.register_buffer("_amax", torch.as_tensor(amax, dtype=torch.float32))

    def forward(self, x):
        if self._disabled or not self._if_quant:
            return x
        if self._learn_amax:
            x, amax = self.clip(x), torch.maximum(-self.clip.clip_value_min, self.clip.clip_value_max).detach()
        elif hasattr(self, "_amax"):
            amax = self._amax
        else:  # dynamic
            dims = [d for d in range(x.ndim) if d != self._axis]
            amax = x.detach().abs().amax(dims, keepdim=self._axis is not None)
        if self._scale_amax is not None and not self._learn_amax:
            amax = amax * self._scale_amax
        return fake_quant(x, amax, self._num_bits, self._unsigned, self._narrow_range)


def weight_range(weight, axis=0):
    """What its calibration of weights stores."""
    return weight.detach().abs().amax([d for d in range(weight.ndim) if d != axis], keepdim=True)


class QuantConv2d(_ConvNd):
    """Derives from torch's abstract base, not from ``nn.Conv2d``, as the original does."""

    def __init__(self, c_in, c_out, size, stride=1, padding=0, groups=1, bias=True, padding_mode="zeros"):
        pair = ((size, size), (stride, stride), (padding, padding), (1, 1))
        super().__init__(c_in, c_out, *pair, False, (0, 0), groups, bias, padding_mode)
        self._input_quantizer, self._weight_quantizer = TensorQuantizer(), TensorQuantizer(axis=0)

    def forward(self, x):
        x, weight = self._input_quantizer(x), self._weight_quantizer(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class QuantConvTranspose2d(_ConvTransposeNd):
    def __init__(self, c_in, c_out, size, stride=1):
        super().__init__(c_in, c_out, (size, size), (stride, stride), (0, 0), (1, 1), True, (0, 0), 1, True, "zeros")
        self._input_quantizer, self._weight_quantizer = TensorQuantizer(), TensorQuantizer(axis=1)

    def forward(self, x):
        return F.conv_transpose2d(self._input_quantizer(x), self._weight_quantizer(self.weight), self.bias, self.stride)


class QuantLinear(nn.Linear):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._input_quantizer, self._weight_quantizer = TensorQuantizer(), TensorQuantizer(axis=0)

    def forward(self, x):
        return F.linear(self._input_quantizer(x), self._weight_quantizer(self.weight), self.bias)


class _QuantInput:
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._input_quantizer = TensorQuantizer()

    def forward(self, x):
        return super().forward(self._input_quantizer(x))


class QuantAdaptiveAvgPool2d(_QuantInput, nn.AdaptiveAvgPool2d):
    pass


class QuantMaxPool2d(_QuantInput, nn.MaxPool2d):
    pass


class QuantInstanceNorm2d(_QuantInput, nn.InstanceNorm2d):
    pass


@torch.no_grad()
def calibrate(model, x, per_channel=True):
    """Give every quantizer that sees ``x`` the maximum as its range, as ``_amax`` buffers of that package's shapes."""
    seen, handles = {}, []
    quantizers = {name: m for name, m in model.named_modules() if isinstance(m, TensorQuantizer)}
    for name, module in quantizers.items():
        module._if_quant = False
        keep = lambda m, args, out, name=name: seen.__setitem__(name, args[0])  # noqa: E731
        handles.append(module.register_forward_hook(keep))
    model.eval()(x)
    for handle in handles:
        handle.remove()
    for name, module in quantizers.items():
        module._if_quant = True
        if name in seen and not module._disabled:
            tensor = seen[name]
            per = module._axis is not None and per_channel
            module.register_buffer("_amax", weight_range(tensor, module._axis) if per else tensor.abs().max())
    return model
