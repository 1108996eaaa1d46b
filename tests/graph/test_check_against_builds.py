"""What ``check_onnx`` foretells, what ``inspect`` names as obstacle and what TensorRT-RTX builds: one answer a node.

The graphs of the tables are branches of one file, each with an input and an output of its own, so that one build answers for
all of them.
"""

from dataclasses import dataclass, field

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from rtx import compile_kernels, needs_rtx

from qat.graph.check import check_onnx
from qat.graph.graph import Graph
from qat.graph.wishes import wishes
from qat.tensorrt import inspect

CHANNELS = 32
PADS = np.array([0, 0, 1, 1, 0, 0, 1, 1], np.int64)
TWICE = np.array([1, 1, 2, 2], np.float32)
# These notes say that a layer does not run in INT8, which is no loss where the pair costs nothing.
IN_FLOAT = {"transposed"}


def int64(*values):
    return np.array(values, np.int64)


def random(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@dataclass
class Branch:
    """A part of the file; names of its nodes and tensors begin with its own. The node that is asked about is ``node``."""

    name: str
    nodes: list = field(default_factory=list)
    constants: dict = field(default_factory=dict)
    shape: tuple = (1, CHANNELS, 8, 8)

    @property
    def x(self):
        """The input behind a ReLU, so that no branch begins with its pair."""
        return self.node("Relu", [f"{self.name}/x"], "before")

    def constant(self, name, value):
        self.constants[f"{self.name}/{name}"] = np.asarray(value)
        return f"{self.name}/{name}"

    def node(self, op, inputs, name, outputs=1, **attributes):
        """Add a node; the name of its first output."""
        names = [f"{self.name}/{name}.{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(op, inputs, names, f"{self.name}/{name}", **attributes))
        return names[0]

    def quantize(self, x, name, scale=0.1, **attributes):
        scales = [self.constant(f"{name}/s", np.float32(scale)), self.constant(f"{name}/z", np.zeros_like(scale, np.int8))]
        return self.node("QuantizeLinear", [x, *scales], f"{name}/Q", **attributes), scales

    def pair(self, x, name, scale=0.1, **attributes):
        codes, scales = self.quantize(x, name, scale, **attributes)
        return self.node("DequantizeLinear", [codes, *scales], f"{name}/DQ", **attributes)

    def steps(self, x, name, steps):
        """Operators one behind the other: ``(operator, constants, attributes)``; ``None`` leaves an input out."""
        for i, (op, constants, attributes) in enumerate(steps):
            names = ["" if c is None else self.constant(f"{name}{i}/{j}", c) for j, c in enumerate(constants)]
            x = self.node(op, [x, *names], f"{name}{i}", **attributes)
        return x

    def conv(self, x, channels=CHANNELS, name="node"):
        stored = self.constant(f"{name}/w", random(CHANNELS, channels, 3, 3))
        return self.node("Conv", [x, self.pair(stored, f"{name}/w", [0.01] * CHANNELS, axis=0)], name, pads=[1] * 4)


def behind(op, *constants, channels=CHANNELS, outputs=1, **attributes):
    """Q, DQ, an operator, a convolution."""

    def build(b):
        names = ["" if c is None else b.constant(f"m/{i}", c) for i, c in enumerate(constants)]
        return b.conv(b.node(op, [b.pair(b.x, "in"), *names], "m", outputs, **attributes), channels)

    return build


def between(op, **attributes):
    """Q, an operator on the codes, DQ, a convolution."""

    def build(b):
        codes, scales = b.quantize(b.x, "in")
        return b.conv(b.node("DequantizeLinear", [b.node(op, [codes], "m", **attributes), *scales], "in/DQ"))

    return build


def weighted(
    shape, scale, axis=None, *, op="Conv", x=(1, CHANNELS, 8, 8), data=(), steps=(), stored=False, first=False, **more
):
    """A product whose weight has this shape, these scales along this axis, and operators between DQ and the product."""

    def build(b):
        b.shape = x
        left = b.steps(b.pair(b.x, "in"), "data", data)
        along = {} if axis is None else {"axis": axis}
        if stored:
            scales = [b.constant("w/s", np.float32(scale)), b.constant("w/z", np.zeros_like(scale, np.int8))]
            right = b.node("DequantizeLinear", [b.constant("w", np.ones(shape, np.int8)), *scales], "w/DQ", **along)
        else:
            right = b.pair(b.constant("w", random(*shape)), "w", scale, **along)
        right = b.steps(right, "step", steps)
        return b.node(op, [right, left] if first else [left, right], "node", **more)

    return build


def channels(count):
    return [0.01] * count


def joined(op, scales=(0.1, 0.1), *, inputs=2 * CHANNELS, **attributes):
    """Two pairs, or a pair and a float tensor, in one operator, and a convolution on it."""

    def build(b):
        x = b.x
        parts = [x, b.node("Sigmoid", [x], "other")]
        parts = [
            part if s is None else b.pair(part, f"in{i}", s) for i, (part, s) in enumerate(zip(parts, scales, strict=True))
        ]
        return b.conv(b.node(op, parts, "m", **attributes), inputs)

    return build


def joined_codes(b):
    x = b.x
    codes, scales = b.quantize(x, "left")
    more, _ = b.quantize(b.node("Sigmoid", [x], "other"), "right")
    together = b.node("Concat", [codes, more], "m", axis=1)
    return b.conv(b.node("DequantizeLinear", [together, *scales], "in/DQ"), 2 * CHANNELS)


def joined_weight(b):
    """One of the two is a constant."""
    constant = b.pair(b.constant("c", random(1, CHANNELS, 8, 8)), "c")
    return b.conv(b.node("Concat", [b.pair(b.x, "in"), constant], "m", axis=1), 2 * CHANNELS)


def several(b):
    """Pooling, a Concat with what it pools, a Transpose."""
    x = b.pair(b.x, "in")
    pooled = b.node("MaxPool", [x], "pool", kernel_shape=[3, 3], pads=[1] * 4)
    together = b.node("Concat", [pooled, x], "m", axis=1)
    return b.conv(b.node("Transpose", [together], "t", perm=[0, 1, 3, 2]), 2 * CHANNELS)


def operands(data, weight):
    """A convolution with a pair on one of its operands."""

    def build(b):
        x, w = b.x, b.constant("w", random(CHANNELS, CHANNELS, 3, 3))
        x = b.pair(x, "in") if data else x
        w = b.pair(w, "w", channels(CHANNELS), axis=0) if weight else w
        return b.node("Conv", [x, w], "node", pads=[1] * 4)

    return build


def activation(scale, **attributes):
    """An activation whose scale has another shape."""
    return lambda b: b.conv(b.pair(b.x, "in", scale, **attributes))


def attention(*quantized):
    """A product of two activations."""

    def build(b):
        b.shape = (1, 4, CHANNELS, CHANNELS)
        x = b.x
        left, right = (b.pair(t, f"in{i}") if q else t for i, (t, q) in enumerate(zip((x, x), quantized, strict=True)))
        return b.node("MatMul", [left, b.node("Transpose", [right], "t", perm=[0, 1, 3, 2])], "node")

    return build


def half(b):
    """Casts around the pairs, as in a graph of float16."""
    x = b.pair(b.steps(b.x, "to", [("Cast", [], {"to": TensorProto.FLOAT16}), ("Cast", [], {"to": TensorProto.FLOAT})]), "in")
    w = b.pair(b.constant("w", random(CHANNELS, CHANNELS, 3, 3)), "w", channels(CHANNELS), axis=0)
    x, w = (b.node("Cast", [t], f"{n}/half", to=TensorProto.FLOAT16) for t, n in ((x, "in"), (w, "w")))
    return b.node("Cast", [b.node("Conv", [x, w], "node", pads=[1] * 4)], "back", to=TensorProto.FLOAT)


def square(axis, *steps, **more):
    """A convolution whose weight has as many input as output channels, so that its scales fit both axes."""
    return weighted((CHANNELS, CHANNELS, 3, 3), channels(CHANNELS), axis, steps=steps, **more)


def gemm(shape, axis, *steps, **more):
    return weighted(shape, channels(shape[axis]), axis, op="Gemm", x=(6, 64), steps=steps, **more)


def flat(step, size, **more):
    return weighted((size, 64), channels(64), 1, op="Gemm", data=step, **more)


def reshape(*shape):
    return ("Reshape", [int64(*shape)], {})


PRODUCTS = {
    "identity": behind("Identity"),
    "max pool": behind("MaxPool", kernel_shape=[2, 2]),
    "global max pool": behind("GlobalMaxPool"),
    "depth to space": behind("DepthToSpace", channels=CHANNELS // 4, blocksize=2),
    "space to depth": behind("SpaceToDepth", channels=CHANNELS * 4, blocksize=2),
    "dropout": behind("Dropout"),
    "transpose": behind("Transpose", perm=[0, 1, 3, 2]),
    "reshape": behind("Reshape", int64(1, CHANNELS, 4, 16)),
    "slice": behind("Slice", int64(0), int64(CHANNELS // 2), int64(1), channels=CHANNELS // 2),
    "slice backwards": behind("Slice", int64(-1), int64(-100), int64(1), int64(-1)),
    "split": behind("Split", channels=CHANNELS // 2, outputs=2, axis=1, num_outputs=2),
    "gather": behind("Gather", np.arange(CHANNELS)[::-1].copy(), axis=1),
    "gather elements": behind("GatherElements", np.zeros((1, CHANNELS, 8, 8), np.int64), axis=1),
    "gather nd": behind("GatherND", int64(0).reshape(1, 1)),
    "tile": behind("Tile", int64(1, 1, 2, 1)),
    "expand": behind("Expand", int64(4, CHANNELS, 8, 8)),
    "pad": behind("Pad", PADS),
    "pad with zero": behind("Pad", PADS, np.float32(0)),
    "pad with one": behind("Pad", PADS, np.float32(1)),
    "pad by reflection": behind("Pad", PADS, mode="reflect"),
    "pad by the edge": behind("Pad", PADS, mode="edge"),
    "relu": behind("Relu"),
    "clip": behind("Clip", np.float32(0), np.float32(6)),
    "batch norm": behind(
        "BatchNormalization", *np.eye(4, CHANNELS, dtype=np.float32)[[0, 0, 0]], np.ones(CHANNELS, np.float32)
    ),
    "resize": behind("Resize", None, TWICE, mode="nearest"),
    "average pool": behind("AveragePool", kernel_shape=[2, 2]),
    "global average pool": behind("GlobalAveragePool"),
    "reduce max": behind("ReduceMax", int64(2, 3)),
    "reduce mean": behind("ReduceMean", int64(2, 3)),
    "reduce min": behind("ReduceMin", int64(2, 3)),
    "neg": behind("Neg"),
    "abs": behind("Abs"),
    "times a number": behind("Mul", np.float32(-2)),
    "by a number": behind("Div", np.float32(2)),
    "times a number a channel": behind("Mul", np.linspace(0.5, 2, CHANNELS, dtype=np.float32).reshape(-1, 1, 1)),
    "plus a number": behind("Add", np.float32(2)),
    "flatten": flat([("Flatten", [], {})], CHANNELS * 64),
    "reshape to a matrix": flat([reshape(1, -1)], CHANNELS * 64),
    "squeeze": flat([("GlobalMaxPool", [], {}), ("Squeeze", [int64(2, 3)], {})], CHANNELS),
    "unsqueeze": flat([("Unsqueeze", [int64(0)], {}), reshape(1, -1)], CHANNELS * 64),
    "codes, max pool": between("MaxPool", kernel_shape=[2, 2]),
    "codes, transpose": between("Transpose", perm=[0, 1, 3, 2]),
    "codes, concat": joined_codes,
    "concat": joined("Concat", axis=1),
    "concat of unequal scales": joined("Concat", (0.1, 0.3), axis=1),
    "concat with float": joined("Concat", (0.1, None), axis=1),
    "concat with a constant": joined_weight,
    "max of two": joined("Max", inputs=CHANNELS),
    "min of two": joined("Min", inputs=CHANNELS),
    "max of unequal scales": joined("Max", (0.1, 0.3), inputs=CHANNELS),
    "sum of two": joined("Add", inputs=CHANNELS),
    "product of two": joined("Mul", inputs=CHANNELS),
    "several": several,
    "data alone": operands(True, False),
    "weight alone": operands(False, True),
    "activation scale of shape [1]": activation([0.1]),
    "activation scale a channel": activation([0.1] * CHANNELS, axis=1),
    "half": half,
    "attention": attention(True, True),
    "attention, left": attention(True, False),
    "attention, right": attention(False, True),
    "weight, one scale": weighted((CHANNELS, CHANNELS, 3, 3), 0.01),
    "weight, scale of shape [1]": weighted((CHANNELS, CHANNELS, 3, 3), [0.01]),
    "weight, stored codes": square(0, stored=True),
    "weight, stored codes, axis 1": square(1, stored=True),
    "weight, axis 1": square(1),
    "weight, axis 1, transpose": square(1, ("Transpose", [], {"perm": [1, 0, 2, 3]})),
    "weight, axis 0, transpose": square(0, ("Transpose", [], {"perm": [1, 0, 2, 3]})),
    "weight, dropout": square(0, ("Dropout", [], {})),
    "weight, axis 1, identity": square(1, ("Identity", [], {})),
    "weight, reshape": weighted((CHANNELS, CHANNELS, 9), channels(CHANNELS), 0, steps=[reshape(CHANNELS, CHANNELS, 3, 3)]),
    "weight, axis 1, reshape": weighted(
        (CHANNELS, CHANNELS, 9), channels(CHANNELS), 1, steps=[reshape(CHANNELS, CHANNELS, 3, 3)]
    ),
    "weight, slice": weighted(
        (64, CHANNELS, 3, 3), channels(64), 0, steps=[("Slice", [int64(0), int64(CHANNELS), int64(0)], {})]
    ),
    "weight, gather": weighted((64, CHANNELS, 3, 3), channels(64), 0, steps=[("Gather", [np.arange(CHANNELS)], {"axis": 0})]),
    "weight, pad": weighted((CHANNELS, CHANNELS, 1, 1), channels(CHANNELS), 0, steps=[("Pad", [PADS], {})]),
    "weight, tile": weighted((16, CHANNELS, 3, 3), channels(16), 0, steps=[("Tile", [int64(2, 1, 1, 1)], {})]),
    "weight, relu": square(0, ("Relu", [], {})),
    "weight, times a number": square(0, ("Mul", [np.float32(2)], {})),
    "depthwise": weighted((CHANNELS, 1, 3, 3), channels(CHANNELS), 0, group=CHANNELS),
    "groups": weighted((CHANNELS, 8, 3, 3), channels(CHANNELS), 0, group=4),
    "transposed convolution": square(1, op="ConvTranspose"),
    "one dimension": weighted((CHANNELS, CHANNELS, 3), channels(CHANNELS), 0, x=(1, CHANNELS, 64)),
    "gemm": gemm((64, 128), 1),
    "gemm, axis 0": gemm((64, 128), 0),
    "gemm, transposed": gemm((128, 64), 0, transB=1),
    "gemm, transposed, axis 1": gemm((128, 64), 1, transB=1),
    "gemm, flattened weight": gemm((64, 8, 8), 0, ("Flatten", [], {}), transB=1),
    "gemm, flattened weight, axis 0": gemm((64, 64), 0, ("Flatten", [], {})),
    "gemm, reshaped weight, axis 0": gemm((64, 64), 0, reshape(64, 64)),
    "matmul": weighted((64, 128), channels(128), 1, op="MatMul", x=(2, 8, 64)),
    "matmul, last axis": weighted((64, 128), channels(128), -1, op="MatMul", x=(2, 8, 64)),
    "matmul, batch": weighted((2, 64, 128), channels(128), 2, op="MatMul", x=(2, 8, 64)),
    "matmul, batch, axis 1": weighted((2, 64, 128), channels(64), 1, op="MatMul", x=(2, 8, 64)),
    "matmul, weight first": weighted((128, 64), channels(128), 0, op="MatMul", x=(64, CHANNELS), first=True),
    "matmul, weight first, axis 1": weighted((128, 64), channels(64), 1, op="MatMul", x=(64, CHANNELS), first=True),
}


def residual(left, right, *, activated=False, other="Sigmoid", last=False):
    """conv + other, each perhaps with a pair."""

    def build(b):
        x = b.pair(b.x, "in")
        y = b.conv(x, name="conv")
        y = b.node("Relu", [y], "activation") if activated else y
        z = b.conv(x, name="other") if other == "Conv" else b.node(other, [x], "other")
        y, z = b.pair(y, "left") if left else y, b.pair(z, "right") if right else z
        y = b.node("Relu", [b.node("Add", [y, z], "node")], "relu")
        return y if last else b.conv(b.pair(y, "out"), name="next")

    return build


def bare_sum(b):
    """An Add that no convolution feeds."""
    x = b.x
    return b.node("Add", [b.pair(x, "left"), b.pair(b.node("Sigmoid", [x], "other"), "right")], "node")


ADDS = {
    "none": residual(False, False),
    "residual": residual(False, True),
    "conv": residual(True, False),
    "both": residual(True, True),
    "both, two convs": residual(True, True, other="Conv"),
    "residual, two convs": residual(False, True, other="Conv"),
    "both, last": residual(True, True, last=True),
    "both, activated": residual(True, True, activated=True),
    "residual, activated": residual(False, True, activated=True),
    "no conv": bare_sum,
}
BRANCHES = {**PRODUCTS, **{f"add, {name}": build for name, build in ADDS.items()}}


def file_of(branches):
    nodes, inputs, outputs, constants = [], [], [], []
    for name, build in branches.items():
        branch = Branch(name)
        outputs.append(helper.make_tensor_value_info(build(branch), TensorProto.FLOAT, None))
        inputs.append(helper.make_tensor_value_info(f"{name}/x", TensorProto.FLOAT, branch.shape))
        nodes += branch.nodes
        constants += [numpy_helper.from_array(value, key) for key, value in branch.constants.items()]
    graph = helper.make_graph(nodes, "g", inputs, outputs, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)


@dataclass(frozen=True, repr=False)
class Answers:
    """By name of a node: what check finds, what stands in its way, and what the build shows."""

    findings: dict
    obstacles: dict
    int8: set
    states: dict


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    path = tmp_path_factory.mktemp("branches") / "branches.onnx"
    model = file_of(BRANCHES)
    onnx.save(model, str(path))
    findings = {}
    for finding in check_onnx(path, target="rtx"):
        findings.setdefault(finding.node.partition("/")[0], []).append(finding)
    # Read by the tests' own helper, not by what is tested.
    int8 = {node for kernel in compile_kernels(path) if kernel.is_int8 for node in kernel.nodes}
    return Answers(
        findings,
        {wish.node: wish.obstacle for wish in wishes(Graph(model), rtx=True)},
        int8,
        {site.node: site.state for site in inspect(path).sites},
    )


@needs_rtx
@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_runs_in_int8_if_nothing_is_found_and_nothing_in_its_way(answers, name):
    found = [f for f in answers.findings.get(name, []) if f.level != "note" or f.rule in IN_FLOAT]
    obstacle = answers.obstacles[f"{name}/node"]
    runs = f"{name}/node" in answers.int8
    assert (not found, obstacle is None) == (runs, runs), (list(map(str, found)), obstacle)


@needs_rtx
@pytest.mark.parametrize("name", ADDS)
def test_an_add_is_fused_if_nothing_is_found_and_nothing_in_its_way(answers, name):
    found = [f for f in answers.findings.get(f"add, {name}", []) if f.rule == "add-both"]
    obstacle = answers.obstacles[f"add, {name}/node"]
    fused = answers.states[f"add, {name}/node"] == "fused"
    assert fused == (name != "no conv")
    assert (fused and bool(found), obstacle is None) == (False, fused), (list(map(str, found)), obstacle)
