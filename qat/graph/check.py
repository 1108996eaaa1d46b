"""What TensorRT would refuse, quietly not run in INT8, or run slower than it could, found in the ONNX graph alone.

Rules: TensorRT's explicit quantization (developer guide, "Working with Quantized Types"), the operator tables of its ONNX
parser, and what TensorRT-RTX was observed to do with graphs that break them; the tests build such graphs.
"""

from __future__ import annotations

import os
from pathlib import Path

import onnx

from ..errors import QATError
from .graph import Graph
from .reading import read_model, refuse_invalid
from .rules import RULES, TARGETS, Finding, Target

__all__ = ["TARGETS", "Finding", "check_onnx"]


def check_onnx(
    model: onnx.ModelProto | str | os.PathLike[str], *, target: str | None = None, sm: int | None = None
) -> list[Finding]:
    """Check a Q/DQ graph against TensorRT's rules, before TensorRT does.

    A finding's ``level`` is ``"error"`` (TensorRT refuses the graph, or computes something else than ONNX says), ``"loss"``
    (it builds, but the operator does not run in INT8) or ``"note"`` (works, but slower or otherwise than one may expect).

    Args:
        model: The graph, or its file. Weights are not read, external ones included.
        target: The TensorRT that is to build it: ``"8.6"``, ``"10"``, ``"11"`` or ``"rtx"``; by default, every rule that
            holds in one of them.
        sm: Compute capability of the GPU, such as 75 or 89, for the rules that depend on it.

    Returns:
        What was found, in graph order, what concerns the whole graph last; empty if nothing.

    Raises:
        QATError: If the file cannot be read, is no valid ONNX, or refers to data outside its folder.

    Example:
        >>> from onnx import TensorProto, helper
        >>> value = lambda name: helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 3])
        >>> node = helper.make_node("DynamicQuantizeLinear", ["x"], ["codes", "scale", "zero"], "dynamic")
        >>> back = helper.make_node("DequantizeLinear", ["codes", "scale", "zero"], ["y"], "back")
        >>> model = helper.make_model(helper.make_graph([node, back], "g", [value("x")], [value("y")]))
        >>> str(check_onnx(model)[0])
        'dynamic: TensorRT does not support DynamicQuantizeLinear. Use Q/DQ pairs around the float operator.'
    """
    if target is not None and target not in TARGETS:
        raise QATError(f"target={target!r}: choose one of {', '.join(TARGETS)}, or none for every rule")
    if sm is not None and (not isinstance(sm, int) or not 50 <= sm < 200):
        raise QATError(f"sm={sm!r}: pass a compute capability without its dot, such as 86")
    if isinstance(model, onnx.ModelProto):
        graph = _valid(model, None)
    else:
        path = Path(model)
        try:
            graph = _valid(read_model(path), str(path.resolve().parent))
        except QATError as error:
            if str(path) in str(error):
                raise
            raise QATError(f"{str(path)!r}: {error}") from error
    wanted = Target(target, sm)
    found = [finding for rule in RULES for finding in rule(graph, wanted)]
    order = {name: i for i, node in reversed(list(enumerate(graph.nodes))) for name in (node.name, _stand_in(node))}
    return sorted(found, key=lambda finding: order.get(finding.node, len(graph.nodes)))


def _valid(model: onnx.ModelProto, folder: str | None) -> Graph:
    refuse_invalid(model, folder)
    return Graph(model, folder)


def _stand_in(node: onnx.NodeProto) -> str:
    return f"node of {node.output[0]}" if node.output else ""
