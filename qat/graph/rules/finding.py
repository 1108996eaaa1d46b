"""A broken rule, and for which TensorRT it counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

from onnx import NodeProto

from ..graph import Graph

# Highest opset that each reads: onnx-tensorrt docs/operators.md (8.6; 10.0 and 10.1), TensorRT's opset guide (11; 25 from
# 11.5 on), seen to build (TensorRT-RTX).
OPSETS = {"8.6": 17, "10": 20, "11": 24, "rtx": 25}
TARGETS = tuple(OPSETS)


@dataclass(frozen=True)
class Target:
    """What is to build the graph.

    Attributes:
        version: One of ``TARGETS``, or ``None`` for all.
        sm: Compute capability of the GPU, or ``None`` for any.
    """

    version: str | None = None
    sm: int | None = None

    def is_any_of(self, *versions: str) -> bool:
        """Whether a rule of these versions counts."""
        return self.version is None or self.version in versions

    @property
    def is_rtx(self) -> bool:
        """Whether it is TensorRT-RTX and nothing else: what others are not known to do counts."""
        return self.version == "rtx"


@dataclass(frozen=True)
class Finding:
    """One broken rule.

    Attributes:
        node: Name of the ONNX node; ``"graph"`` for what concerns the whole file.
        problem: What is wrong and what TensorRT does about it.
        remedy: What to do.
        level: ``"error"``: refused, or computed otherwise than ONNX says; ``"loss"``: builds, but INT8 is lost; ``"note"``:
            works, but slower or otherwise than one may expect.
        rule: Short name of the rule, the same for every node that breaks it.
    """

    node: str
    problem: str
    remedy: str
    level: str = "error"
    rule: str = ""

    def __str__(self) -> str:
        return f"{self.node}: {self.problem}. {self.remedy}."


Rule: TypeAlias = Callable[[Graph, Target], Iterator[Finding]]


def name_of(node: NodeProto) -> str:
    """The name of a node, or what stands for it."""
    return node.name or (f"node of {node.output[0]}" if node.output else "a node without name")
