"""Multi-head attention with quantized projections.

``nn.MultiheadAttention`` calls no linear module: its projections are functional. The quantized form computes what
``torch.nn.functional.multi_head_attention_forward`` documents, with a quantizer in front of each operand of the input and
output projections. The two products of activations and the softmax stay in float.
"""

from __future__ import annotations

import functools
import math
import operator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.quantizer import Quantizer, State, WeightQuantizer
from .derive import Derived


def _does_nothing(module: nn.Module, args: Any) -> None:
    """A forward pre-hook: its presence is what counts."""


def keep_python_path(model: nn.Module) -> None:
    """Make PyTorch's encoder layers call their modules in inference, too, wherever these hold sites.

    The fused kernels read the weights of the modules and bypass their forwards. A layer with a hook does not use them;
    an encoder must not make nested tensors then, which only the kernels take.
    """
    for module in model.modules():
        if not isinstance(module, nn.TransformerEncoder | nn.TransformerEncoderLayer):
            continue
        if any(isinstance(inner, Quantizer) for inner in module.modules()):
            if isinstance(module, nn.TransformerEncoderLayer):
                module.__dict__["_qat_hook"] = module.register_forward_pre_hook(_does_nothing)
            elif getattr(module, "use_nested_tensor", False):
                module.__dict__.update(use_nested_tensor=False, _qat_nested=True)


def allow_fused_path(model: nn.Module) -> None:
    """Inverse of :func:`keep_python_path`."""
    for module in model.modules():
        if "_qat_hook" in module.__dict__:
            module.__dict__.pop("_qat_hook").remove()
        if module.__dict__.pop("_qat_nested", False):
            module.__dict__["use_nested_tensor"] = True


class QuantAttention(Derived):
    """Mixin of multi-head attention: five input sites (query, key, value, output projection) and their weights."""

    query_quantizer: Quantizer
    key_quantizer: Quantizer
    value_quantizer: Quantizer
    out_quantizer: Quantizer
    in_weight_quantizer: WeightQuantizer
    out_weight_quantizer: WeightQuantizer
    in_proj_weight: Tensor
    in_proj_bias: Tensor | None
    bias_k: Tensor | None
    bias_v: Tensor | None
    out_proj: nn.Linear
    dropout: float
    embed_dim: int
    num_heads: int

    def add_quantizers(self, inputs: dict[str, Quantizer], weights: dict[str, WeightQuantizer]) -> None:
        """Attach the sites, keyed as :func:`projections` keys them."""
        for key, site in inputs.items():
            self.add_module(f"{key}_quantizer", site)
        for key, weight_site in weights.items():
            self.add_module(f"{key}_weight_quantizer", weight_site)

    def remove_quantizers(self) -> None:
        """Inverse of :meth:`add_quantizers`."""
        # Not named_children: it passes over a quantizer that two inputs share.
        for name in [n for n, child in self._modules.items() if isinstance(child, Quantizer)]:
            delattr(self, name)

    def refresh_weight_ranges(self) -> None:
        """Record the current weights' ranges where they follow the weights."""
        for key, weight in projections(self).items():
            site = getattr(self, f"{key}_weight_quantizer")
            if site.state is State.QUANTIZING:
                site.refresh(weight)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.refresh_weight_ranges()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # Self-attention reads one tensor three times: quantize it once.
        quantizing = self.query_quantizer.state is not State.COLLECTING
        q_in = self.query_quantizer(query)
        k_in = q_in if quantizing and key is query else self.key_quantizer(key)
        v_in = k_in if quantizing and value is key else self.value_quantizer(value)
        bias = self.in_proj_bias
        if self._qkv_same_embed_dim:
            weight = self.in_weight_quantizer(self.in_proj_weight)
            if q_in is k_in and k_in is v_in:
                return F.linear(q_in, weight, bias).chunk(3, dim=-1)  # type: ignore[return-value]
            weights = weight.chunk(3)
        else:
            weights = tuple(getattr(self, f"{key}_weight_quantizer")(w) for key, w in projections(self).items() if key != "out")
        biases = bias.chunk(3) if bias is not None else (None, None, None)
        q, k, v = (F.linear(x, w, b) for x, w, b in zip((q_in, k_in, v_in), weights, biases, strict=True))
        return q, k, v

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if all(site.state is State.OFF for site in self._modules.values() if isinstance(site, Quantizer)):
            # The float model, to the bit: PyTorch may run a fused kernel here.
            return super().forward(
                query,
                key,
                value,
                key_padding_mask=key_padding_mask,
                need_weights=need_weights,
                attn_mask=attn_mask,
                average_attn_weights=average_attn_weights,
                is_causal=is_causal,
            )
        if is_causal and attn_mask is None:
            raise ValueError("is_causal is a hint about attn_mask: pass the mask too, as nn.MultiheadAttention demands")
        batched = query.dim() == 3
        same = key is query, value is key
        # Batches first, unlike torch: models that lay out their sequences so need no transposition then, nor does the graph.
        if not batched:
            query, key, value = (t.unsqueeze(0) for t in (query, key, value))
        elif not self.batch_first:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        # Views of one tensor are different objects: keep the identity that _project looks for.
        key = query if same[0] else key
        value = key if same[1] else value
        batch, length, _ = query.shape
        q, k, v = self._project(query, key, value)
        # As in torch: the hint replaces the mask where nothing else needs it, which keeps the fused causal kernel.
        causal = is_causal and key_padding_mask is None and not need_weights
        mask = None if causal else self._merge_masks_to_float(attn_mask, key_padding_mask, q, k.shape[1])
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(batch, 1, -1)], dim=1)
            v = torch.cat([v, self.bias_v.expand(batch, 1, -1)], dim=1)
            mask = F.pad(mask, (0, 1)) if mask is not None else None
        q, k, v = (self._split_heads(t) for t in (q, k, v))
        if self.add_zero_attn:
            k, v = (torch.cat([t, t.new_zeros(*t.shape[:2], 1, t.shape[3])], dim=2) for t in (k, v))
            mask = F.pad(mask, (0, 1)) if mask is not None else None
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
            weights = torch.softmax(scores if mask is None else scores + mask, dim=-1)
            weights = F.dropout(weights, dropout, training=True) if dropout > 0.0 else weights
            out = weights @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal)
        out = out.transpose(1, 2).reshape(batch, length, self.embed_dim)
        out = F.linear(self.out_quantizer(out), self.out_weight_quantizer(self.out_proj.weight), self.out_proj.bias)
        if weights is not None:
            weights = weights.mean(dim=1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        if not batched:
            out = out.squeeze(0)
        elif not self.batch_first:
            out = out.transpose(0, 1)
        return out, weights

    def _split_heads(self, x: Tensor) -> Tensor:
        """``(N, L, E)`` to ``(N, heads, L, E / heads)``."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def _merge_masks_to_float(
        self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor, keys: int
    ) -> Tensor | None:
        """One additive mask that broadcasts to ``(N, heads, L, S)``, or ``None``."""
        batch, length = q.shape[:2]
        merged = None
        if attn_mask is not None:
            merged = _additive(attn_mask, q.dtype)
            if merged.dim() == 3:
                merged = merged.reshape(batch, self.num_heads, length, keys)
        if key_padding_mask is not None:
            padding = _additive(key_padding_mask, q.dtype).reshape(batch, 1, 1, keys)
            merged = padding if merged is None else merged + padding
        if merged is None or merged.dim() == 4:
            return merged
        return merged.reshape(1, 1, length, keys)

    @classmethod
    def rebuild_args(cls) -> tuple[Any, ...]:
        return quant_attention_class, cls.float_class


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))


def projections(module: nn.MultiheadAttention | QuantAttention) -> dict[str, Tensor]:
    """The projection weights of an attention module: ``in`` (packed) or ``query``, ``key``, ``value``; and ``out``."""
    if module._qkv_same_embed_dim:
        names = {"in": "in_proj_weight"}
    else:
        names = {"query": "q_proj_weight", "key": "k_proj_weight", "value": "v_proj_weight"}
    # Not get_parameter: weight_norm, functional_call and FSDP put plain tensors in their place.
    return {key: operator.attrgetter(name)(module) for key, name in {**names, "out": "out_proj.weight"}.items()}


@functools.cache
def quant_attention_class(float_class: type) -> type[QuantAttention]:
    """The quantized class that derives from ``float_class``."""
    return type(
        f"Quant{float_class.__name__}", (QuantAttention, float_class), {"float_class": float_class, "__module__": __name__}
    )
