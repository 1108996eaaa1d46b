"""What torch's exporter would write clumsily, rewritten in the traced program before it is converted."""

from __future__ import annotations

import math
from typing import Any

import torch

_ADAPTIVE_POOLS = {
    torch.ops.aten.adaptive_avg_pool1d.default: 1,
    torch.ops.aten.adaptive_avg_pool2d.default: 2,
    torch.ops.aten.adaptive_avg_pool3d.default: 3,
}
# Brings an operator for attention as a whole.
_ATTENTION_OPSET = 23


def rewrite(program: torch.export.ExportedProgram, opset: int) -> None:
    """Rewrite ``program`` in place for an export to ``opset``; it computes the same."""
    _mean_of_one(program.graph)
    if opset < _ATTENTION_OPSET:
        _plain_attention(program.graph)
    program.graph_module.recompile()


def _mean_of_one(graph: torch.fx.Graph) -> None:
    """Write an adaptive average pooling to size 1 as the mean it is, in place.

    torch's exporter does so too, but lays a channels-last result out anew: in ONNX, a table of indices and a Gather.
    """
    for node in graph.nodes:
        spatial = _ADAPTIVE_POOLS.get(node.target, 0)
        if spatial and set(node.args[1]) == {1}:
            node.target = torch.ops.aten.mean.dim
            node.args = (node.args[0], list(range(-spatial, 0)), True)


def _plain_attention(graph: torch.fx.Graph) -> None:
    """Write attention as two matrix products and a softmax, in place.

    torch's exporter transposes the keys by way of two reshapes whose sizes the graph computes at run time. Causal, grouped
    and Boolean masks are left to it. The result is laid out as a matrix product's is, not as torch's kernel for attention
    does: views of it become reshapes.
    """
    ops = torch.ops.aten
    for node in list(graph.nodes):
        if node.target is not ops.scaled_dot_product_attention.default:
            continue
        given = dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), node.args, strict=False))
        given |= node.kwargs
        mask = given.get("attn_mask")
        boolean = mask is not None and mask.meta["val"].dtype == torch.bool
        if boolean or any(given.get(name) for name in ("dropout_p", "is_causal", "enable_gqa")):
            continue
        scale = given.get("scale")
        if scale is None:
            scale = 1 / math.sqrt(given["query"].meta["val"].shape[-1])

        def call(target: Any, *args: Any, like: torch.fx.Node = node) -> torch.fx.Node:
            made = graph.call_function(target, args)
            # Who it belongs to; its value is computed anew by the exporter.
            made.meta = {key: value for key, value in like.meta.items() if key != "val"}
            return made

        with graph.inserting_before(node):
            scores = call(
                ops.matmul.default, call(ops.mul.Tensor, given["query"], scale), call(ops.transpose.int, given["key"], -2, -1)
            )
            if mask is not None:
                scores = call(ops.add.Tensor, scores, mask)
            weights = call(ops.softmax.int, scores, -1)
        node.target, node.args, node.kwargs = ops.matmul.default, (weights, given["value"]), {}
        for view in graph.find_nodes(op="call_function", target=ops.view.default):
            view.target = ops.reshape.default
