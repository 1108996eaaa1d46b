"""TensorRT-RTX as an oracle: it compiles for a GPU that is not there, and its log tells the data types of every kernel."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import pytest

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed (pip install -e '.[rtx]')"
)

# GPUs that files are compiled for. Another one takes as long again and shows the same kernels.
TARGETS = ["SM86", pytest.param("SM89", marks=pytest.mark.slow)]

# Kernels that multiply and accumulate.
_MAC = {"correlation", "gemm", "deconv", "runtime_fusion"}
_HEAD = re.compile(r"Name: (.*?), LayerType: (\w+), ")
_FIELD = re.compile(r"(Inputs|Constants|Outputs): \[(.*?)\](?=, (?:Constants|Outputs|TacticName): )")
_DATATYPE = re.compile(r"Datatype: (\w+)")
_TAG = re.compile(r"\[ONNX Layer: (.*?)\]\Z")


@dataclass(frozen=True)
class Kernel:
    """One line of the build log: what runs, on which types, for which ONNX nodes."""

    kind: str
    operands: tuple[str, ...]
    nodes: frozenset[str]

    @property
    def is_int8(self) -> bool:
        """Whether both operands of the multiply-accumulate are INT8."""
        return self.kind != "runtime_fusion" and self.operands[:2] == ("Int8", "Int8")


def compile_kernels(path: Path, target: str = "SM86") -> list[Kernel]:
    """Build the file for ``target`` (``SM80``, ``SM86``, ``SM89``, ``SM120``) without a GPU; the kernels of the engine."""
    import tensorrt_rtx as trt

    class Log(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.messages: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            self.messages.append(message)

    log = Log()
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(path)):
        raise ValueError("\n".join(parser.get_error(i).desc() for i in range(parser.num_errors)))
    config = builder.create_builder_config()
    # Without DETAILED there is no listing of the kernels.
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, target), 0)
    profile = builder.create_optimization_profile()
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        if -1 in tensor.shape:
            shapes = [[n if d == -1 else d for d in tensor.shape] for n in (1, 4, 8)]
            profile.set_shape(tensor.name, *shapes)
    config.add_optimization_profile(profile)
    if builder.build_serialized_network(network, config) is None:
        raise ValueError("build failed:\n" + "\n".join(log.messages[-5:]))
    listing = next(message for message in log.messages if message.startswith("Layers:\n"))
    return [kernel for line in listing.splitlines() if (kernel := _kernel(line)) is not None]


def _kernel(line: str) -> Kernel | None:
    head = _HEAD.match(line)
    if head is None or head[2] in ("signal", "wait"):
        return None
    types = {field: _DATATYPE.findall(content) for field, content in _FIELD.findall(line)}
    tags = line.rpartition("Metadata: ")[2].split("\x1f")
    nodes = frozenset(match[1] for tag in tags if (match := _TAG.match(tag)))
    return Kernel(head[2], (*types["Inputs"], *types["Constants"]), nodes)


def not_int8(path: Path, target: str = "SM86") -> list[str]:
    """The Conv, Gemm and MatMul nodes behind two Q/DQ pairs that do not run on INT8 operands; empty if all do."""
    running = {
        name for kernel in compile_kernels(path, target) if kernel.kind in _MAC and kernel.is_int8 for name in kernel.nodes
    }
    return [name for name in quantized_nodes(path) if name not in running]


def quantized_nodes(path: Path) -> list[str]:
    """Names of the Conv, Gemm and MatMul nodes whose both operands come from DequantizeLinear, found by name alone."""
    graph = onnx.load(str(path)).graph
    producer = {output: node for node in graph.node for output in node.output}

    def dequantized(name: str) -> bool:
        node = producer.get(name)
        while node is not None and node.op_type in ("Transpose", "Reshape", "Split", "Slice", "Cast"):
            node = producer.get(node.input[0])
        return node is not None and node.op_type == "DequantizeLinear"

    return [
        node.name
        for node in graph.node
        if node.op_type in ("Conv", "Gemm", "MatMul") and all(dequantized(name) for name in node.input[:2])
    ]
