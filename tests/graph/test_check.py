"""check_onnx: each rule on a graph that breaks it, and none on a graph that keeps them."""

import re

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from rtx import compile_kernels, needs_rtx

from qat.errors import QATError
from qat.graph.check import TARGETS, check_onnx


def conv_graph(*, opset=19, **changes):
    """x -> Q -> DQ -> Conv(w -> Q -> DQ, bias), with some constants or parts exchanged."""
    given = {
        "x_scale": np.float32(0.1),
        "x_zero": np.int8(0),
        "w": np.ones((4, 3, 1, 1), np.float32),
        "w_scale": np.full(4, 0.01, np.float32),
        "w_zero": np.zeros(4, np.int8),
        "bias": np.zeros(4, np.float32),
        **{name: value for name, value in changes.items() if isinstance(value, np.ndarray | np.generic)},
    }
    axis = changes.get("axis", 0)
    per_channel = {"axis": axis} if given["w_scale"].ndim else {}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "x_scale", "x_zero"], ["x_q"], "x/Q"),
        helper.make_node("DequantizeLinear", ["x_q", "x_scale", "x_zero"], ["x_dq"], "x/DQ"),
        helper.make_node("QuantizeLinear", ["w", "w_scale", "w_zero"], ["w_q"], "w/Q", **per_channel),
        helper.make_node("DequantizeLinear", ["w_q", "w_scale", "w_zero"], ["w_dq"], "w/DQ", **per_channel),
        helper.make_node(changes.get("op", "Conv"), ["x_dq", "w_dq", "bias"], ["y"], "conv"),
    ]
    for edit in changes.values():
        if callable(edit):
            edit(nodes)
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 5, 5])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in given.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])


def matmul_graph(*, shape=(6, 4), axis=1, transpose=False, scales=4):
    """x @ w with both operands quantized, the weight perhaps behind a Transpose."""
    constants = {
        "s": np.float32(0.1),
        "z": np.int8(0),
        "w": np.ones(shape, np.float32),
        "w_s": np.full(scales, 0.01, np.float32),
        "w_z": np.zeros(scales, np.int8),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["x_q"], "x/Q"),
        helper.make_node("DequantizeLinear", ["x_q", "s", "z"], ["x_dq"], "x/DQ"),
        helper.make_node("QuantizeLinear", ["w", "w_s", "w_z"], ["w_q"], "w/Q", axis=axis),
        helper.make_node("DequantizeLinear", ["w_q", "w_s", "w_z"], ["w_dq"], "w/DQ", axis=axis),
    ]
    if transpose:
        nodes.append(helper.make_node("Transpose", ["w_dq"], ["w_t"], "transpose", perm=[1, 0]))
    nodes.append(helper.make_node("MatMul", ["x_dq", "w_t" if transpose else "w_dq"], ["y"], "matmul"))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)])


def rename(nodes):
    nodes[4].name = "x/Q"


def rename_pair(nodes):
    nodes[3].name = "x/DQ"


def unname(nodes):
    nodes[4].name = ""


def bare_data(nodes):
    nodes[4].input[0] = "x"


def bare_weight(nodes):
    nodes[4].input[1] = "w"


def identity(nodes):
    nodes.insert(0, helper.make_node("Identity", ["x_scale"], ["copy"], "copy"))


def quantized_bias(nodes):
    nodes.insert(4, helper.make_node("DequantizeLinear", ["bias", "x_scale"], ["b_dq"], "b/DQ"))
    nodes[5].input[2] = "b_dq"


def no_zero_point(nodes):
    del nodes[0].input[2]


def other_scale(nodes):
    nodes[1].input[1] = "s2"


def computed_scale(nodes):
    nodes.insert(0, helper.make_node("ReduceMax", ["x"], ["x_max"], "max", keepdims=0))
    nodes[1].input[1] = nodes[2].input[1] = "x_max"


def codes_read(nodes):
    nodes[1].op_type = "Cast"
    del nodes[1].input[1:]
    nodes[1].attribute.append(helper.make_attribute("to", TensorProto.FLOAT))


def dynamic(nodes):
    nodes.insert(0, helper.make_node("DynamicQuantizeLinear", ["x"], ["a", "b", "c"], "dynamic"))


def broken(model, **target):
    """Findings but notes."""
    return [finding for finding in check_onnx(model, **target) if finding.level != "note"]


def test_a_correct_graph_has_no_findings():
    assert broken(conv_graph()) == []


@pytest.mark.parametrize(
    ("changes", "node", "message", "level"),
    [
        ({"x_scale": np.float32(0)}, "x/Q", "1 scale.s. are not positive", "error"),
        ({"w_scale": np.array([1, 1, -1, np.nan], np.float32)}, "w/Q", "2 scale.s. are not positive", "error"),
        ({"x_scale": np.array([0.1], np.float32)}, "x/DQ", r"shape \[1\]", "loss"),
        ({"x_scale": np.full(3, 0.1, np.float32)}, "x/Q", "per-channel scales are for weights", "loss"),
        ({"x_zero": np.int8(3)}, "x/Q", "zero-point is not zero", "error"),
        ({"x_zero": np.uint8(0)}, "x/Q", "UINT8 zero-point", "error"),
        ({"x_zero": np.int16(0)}, "x/Q", "INT16 zero-point", "error"),
        ({"w_scale": np.full(3, 0.01, np.float32)}, "w/Q", "3 scales on axis 0 of size 4", "error"),
        ({"w_scale": np.full(3, 0.01, np.float32), "axis": 1}, "w/DQ", "on axis 1, which does not run in INT8", "loss"),
        ({"axis": 7}, "w/Q", "axis 7 of a tensor of rank 4", "error"),
        ({"edit": rename}, "x/Q", "two nodes are named", "note"),
        ({"edit": rename_pair}, "x/DQ", "two nodes are named", "error"),
        ({"edit": unname}, "node of y", "has no name", "note"),
        ({"edit": bare_data}, "conv", "its data has no Q/DQ", "loss"),
        ({"edit": bare_weight}, "conv", "its weight has no Q/DQ", "loss"),
        ({"edit": identity}, "copy", "Identity on a constant", "error"),
        ({"edit": quantized_bias, "bias": np.zeros(4, np.int32)}, "b/DQ", "int32 data", "error"),
        ({"edit": quantized_bias, "bias": np.zeros(4, np.int8)}, "conv", "Q/DQ on the bias", "note"),
        ({"edit": no_zero_point}, "x/Q", "no zero-point", "error"),
        ({"edit": other_scale, "s2": np.float32(0.3)}, "x/DQ", "scale differs from that of x/Q", "note"),
        ({"edit": computed_scale}, "x/Q", "scale is computed in the graph", "error"),
        ({"edit": codes_read}, "x/Q", "read by something else", "loss"),
        ({"edit": dynamic}, "dynamic", "does not support DynamicQuantizeLinear", "error"),
    ],
)
def test_a_broken_rule_is_found(changes, node, message, level):
    findings = check_onnx(conv_graph(**changes))
    assert any(f.node == node and re.search(message, f.problem) and f.level == level for f in findings), findings


def test_int8_weights_are_not_for_opset_17():
    def stored(nodes):
        del nodes[2]
        nodes[2].input[0] = "codes"

    def findings(opset, **target):
        model = conv_graph(opset=opset, edit=stored, codes=np.ones((4, 3, 1, 1), np.int8))
        return [f.node for f in broken(model, **target)]

    assert findings(17) == ["w/DQ"]
    assert findings(17, target="10") == []
    assert findings(19) == []
    assert findings(19, target="8.6") == ["w/DQ"]


def test_transposed_convolution_is_noted_only():
    graph = conv_graph(op="ConvTranspose", w_scale=np.float32(0.01), w_zero=np.int8(0))
    assert [(f.node, f.level) for f in check_onnx(graph) if f.node != "graph"] == [("conv", "note")]


@pytest.mark.parametrize(
    ("settings", "is_broken"),
    [
        ({"shape": (6, 4), "axis": 1}, False),
        ({"shape": (6, 4), "axis": 0, "scales": 6}, True),
        ({"shape": (4, 6), "axis": 0, "transpose": True}, False),
        ({"shape": (4, 6), "axis": 1, "scales": 6, "transpose": True}, True),
    ],
)
def test_matmul_weights_are_quantized_along_the_output(settings, is_broken):
    found = [f for f in check_onnx(matmul_graph(**settings)) if "does not run in INT8" in f.problem]
    assert bool(found) is is_broken


def test_float_layer_may_read_what_a_quantized_one_reads():
    model = conv_graph()
    model.graph.node.append(helper.make_node("Conv", ["x_dq", "w"], ["z"], "float"))
    assert broken(model) == []


def test_a_file_is_read(tmp_path):
    onnx.save(conv_graph(x_scale=np.float32(-1)), str(tmp_path / "m.onnx"))
    finding = check_onnx(tmp_path / "m.onnx")[0]
    assert str(finding).startswith("x/Q: ")
    assert "Calibrate again" in str(finding)


# Graphs that TensorRT-RTX builds, or doesn't: x (1, 32, 8, 8) -> ... -> conv (32, 32, 3, 3) -> y.

CONSTANTS = {
    "s": np.float32(0.1),
    "s2": np.float32(0.3),
    "z": np.int8(0),
    "w": np.random.default_rng(0).standard_normal((32, 32, 3, 3)).astype(np.float32),
    "ws": np.full(32, 0.01, np.float32),
    "wz": np.zeros(32, np.int8),
    "b": np.zeros(32, np.float32),
}
N = helper.make_node


def pair(x, name, scale="s", zero="z", **attributes):
    """Q and DQ from ``x`` to ``name``."""
    return [
        N("QuantizeLinear", [x, scale, zero], [f"{name}_q"], f"{name}/Q", **attributes),
        N("DequantizeLinear", [f"{name}_q", scale, zero], [name], f"{name}/DQ", **attributes),
    ]


def weight(axis=0):
    return pair("w", "wd", "ws", "wz", **({} if axis is None else {"axis": axis}))


def conv(x="xd", w="wd", bias="b", **attributes):
    return N("Conv", [x, w, bias] if bias else [x, w], ["y"], "conv", pads=[1, 1, 1, 1], **attributes)


def wide(nodes, *, opset=19, x=TensorProto.FLOAT, y=TensorProto.FLOAT, shape=(1, 32, 8, 8), metadata=None, **constants):
    read = {name for node in nodes for name in node.input} - {name for node in nodes for name in node.output}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", x, shape)],
        [helper.make_tensor_value_info("y", y, None)],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in {**CONSTANTS, **constants}.items() if k in read],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    model.ir_version = helper.find_min_ir_version_for(list(model.opset_import))
    helper.set_model_props(model, metadata or {})
    return model


def moved(*nodes, **changes):
    """Operators between the DQ and the convolution."""
    return wide([*pair("x", "xd"), *weight(), *nodes, conv("xm")], **changes)


def product(op="MatMul", shape=(64, 128), axis=1, scales=128, **attributes):
    weights = {"w": np.ones(shape, np.float32), "ws": np.full(scales, 0.01, np.float32), "wz": np.zeros(scales, np.int8)}
    nodes = [*pair("x", "xd"), *weight(axis), N(op, ["xd", "wd"], ["y"], "conv", **attributes)]
    return wide(nodes, shape=(6, 64), **weights)


def typed(nodes, *, opset=19, bias=np.float16, **changes):
    return wide(nodes, opset=opset, b=np.zeros(32, bias), **changes)


def form_a(opset=19):
    half = {name: value.astype(np.float16) for name, value in CONSTANTS.items() if value.dtype == np.float32}
    types = {"x": TensorProto.FLOAT16, "y": TensorProto.FLOAT16}
    return wide([*pair("x", "xd"), *weight(), conv()], opset=opset, **types, **half)


def form_b(opset=19):
    casts = [N("Cast", ["xd"], ["xh"], "c2", to=10), N("Cast", ["wd"], ["wh"], "c3", to=10)]
    nodes = [N("Cast", ["x"], ["xf"], "c1", to=1), *pair("xf", "xd"), *weight(), *casts, conv("xh", "wh")]
    return typed(nodes, opset=opset, x=TensorProto.FLOAT16, y=TensorProto.FLOAT16)


def form_c():
    nodes = [*pair("x", "xd"), *weight(), conv()]
    for node in (nodes[1], nodes[3]):
        node.attribute.append(helper.make_attribute("output_dtype", TensorProto.FLOAT16))
    return typed(nodes, opset=23, x=TensorProto.FLOAT16, y=TensorProto.FLOAT16)


def concat(scale):
    join = N("Concat", ["xd", "xe"], ["xm"], "cat", axis=1)
    nodes = [N("Relu", ["x"], ["r"], "relu"), *pair("x", "xd"), *pair("r", "xe", scale), *weight(), join, conv("xm")]
    return wide(nodes, w=np.ones((32, 64, 3, 3), np.float32))


def integers(*values):
    return np.array(values, np.int64)


PAD = integers(0, 0, 1, 1, 0, 0, 1, 1)

KEPT = {
    "plain": lambda: wide([*pair("x", "xd"), *weight(), conv()]),
    "form A": form_a,
    "form B": form_b,
    "form B, opset 13": lambda: form_b(13),
    "form C": form_c,
    "concat of equal scales": lambda: concat("s"),
    "max pooling": lambda: moved(N("MaxPool", ["xd"], ["xm"], "m", kernel_shape=[2, 2])),
    "global max pooling": lambda: moved(N("GlobalMaxPool", ["xd"], ["xm"], "m")),
    "padding with zeros": lambda: moved(N("Pad", ["xd", "p"], ["xm"], "m"), p=PAD),
    "reflection padding": lambda: moved(N("Pad", ["xd", "p"], ["xm"], "m", mode="reflect"), p=PAD),
    "transpose": lambda: moved(N("Transpose", ["xd"], ["xm"], "m", perm=[0, 1, 3, 2])),
    "gather": lambda: moved(N("Gather", ["xd", "i"], ["xm"], "m", axis=1), i=integers(*range(32))),
    "tile": lambda: moved(N("Tile", ["xd", "i"], ["xm"], "m"), i=integers(2, 1, 1, 1)),
    "expand": lambda: moved(N("Expand", ["xd", "i"], ["xm"], "m"), i=integers(4, 32, 8, 8)),
    "space to depth": lambda: moved(
        N("SpaceToDepth", ["xd"], ["xm"], "m", blocksize=2), w=np.ones((32, 128, 3, 3), np.float32)
    ),
    "codes through max pooling": lambda: wide(
        [
            N("QuantizeLinear", ["x", "s", "z"], ["q"], "x/Q"),
            N("MaxPool", ["q"], ["p"], "m", kernel_shape=[2, 2]),
            N("DequantizeLinear", ["p", "s", "z"], ["xd"], "x/DQ"),
            *weight(),
            conv(),
        ]
    ),
    "weight cast before Q": lambda: wide(
        [*pair("x", "xd"), N("Cast", ["wh"], ["w"], "c", to=1), *weight(), conv()], wh=CONSTANTS["w"].astype(np.float16)
    ),
    "Gemm, transposed weight": lambda: product("Gemm", (128, 64), 0, transB=1),
    "MatMul": product,
    "weight scale [1]": lambda: wide(
        [*pair("x", "xd"), *weight(), conv()], ws=np.array([0.01], np.float32), wz=np.zeros(1, np.int8)
    ),
}

LOST = {
    "activation scale [1]": (
        lambda: wide(
            [*pair("x", "xd", zero="z1"), *weight(), conv()], s=np.array([0.1], np.float32), z1=np.array([0], np.int8)
        ),
        "activation-scale",
        "xd/Q",
    ),
    "per-channel activation": (
        lambda: wide(
            [*pair("x", "xd", "sc", "zc", axis=1), *weight(), conv()], sc=np.full(32, 0.1, np.float32), zc=np.zeros(32, np.int8)
        ),
        "activation-scale",
        "xd/Q",
    ),
    "convolution weight on axis 1": (lambda: wide([*pair("x", "xd"), *weight(1), conv()]), "output-axis", "wd/DQ"),
    "MatMul weight on axis 0": (lambda: product("MatMul", (64, 128), 0, 64), "output-axis", "wd/DQ"),
    "Gemm weight on axis 1": (lambda: product("Gemm", (128, 64), 1, 64, transB=1), "output-axis", "wd/DQ"),
    "weight only": (lambda: wide([*weight(), conv("x")]), "operands", "conv"),
    "activation only": (lambda: wide([*pair("x", "xd"), conv(w="w")]), "operands", "conv"),
    "ReLU behind DQ": (lambda: moved(N("Relu", ["xd"], ["xm"], "m")), "operands", "conv"),
    "resize behind DQ": (
        lambda: moved(N("Resize", ["xd", "", "r"], ["xm"], "m", mode="nearest"), r=np.array([1, 1, 2, 2], np.float32)),
        "operands",
        "conv",
    ),
    "padding with ones": (lambda: moved(N("Pad", ["xd", "p", "v"], ["xm"], "m"), p=PAD, v=np.float32(1)), "operands", "conv"),
    "concat of unequal scales": (lambda: concat("s2"), "operands", "conv"),
    "codes cast": (
        lambda: wide(
            [
                N("QuantizeLinear", ["x", "s", "z"], ["q"], "x/Q"),
                N("Cast", ["q"], ["xd"], "cast", to=1),
                *weight(),
                conv(),
            ]
        ),
        "codes",
        "x/Q",
    ),
    "INT8 weight in blocks": (
        lambda: wide(
            [
                N("DequantizeLinear", ["w", "ws"], ["wd"], "wd/DQ", axis=0, block_size=32),
                N("MatMul", ["x", "wd"], ["y"], "conv"),
            ],
            opset=21,
            shape=(6, 64),
            w=np.ones((64, 128), np.int8),
            ws=np.full((2, 128), 0.01, np.float32),
        ),
        "block",
        "wd/DQ",
    ),
}

REFUSED = {
    "zero scale": (lambda: wide([*pair("x", "xd"), *weight(), conv()], s=np.float32(0)), "scale-positive", "xd/Q"),
    "one negative channel": (
        lambda: wide([*pair("x", "xd"), *weight(), conv()], ws=np.array([1] * 31 + [-1], np.float32)),
        "scale-positive",
        "wd/Q",
    ),
    "zero-point": (lambda: wide([*pair("x", "xd"), *weight(), conv()], z=np.int8(3)), "zero-point-zero", "xd/Q"),
    "INT16 zero-point": (
        lambda: wide([*pair("x", "xd"), *weight(), conv()], z=np.int16(0), opset=21),
        "zero-point-type",
        "xd/Q",
    ),
    "int32 bias": (
        lambda: wide(
            [*pair("x", "xd"), *weight(), N("DequantizeLinear", ["b", "s"], ["bd"], "b/DQ"), conv(bias="bd")],
            b=np.zeros(32, np.int32),
        ),
        "int32",
        "b/DQ",
    ),
    "FP32 data, FP16 bias": (lambda: typed([*pair("x", "xd"), *weight(), conv()]), "types", "conv"),
    "FP16 data, FP32 scales, FP16 bias, opset 23": (
        lambda: typed([*pair("x", "xd"), *weight(), conv()], opset=23, x=TensorProto.FLOAT16),
        "types",
        "conv",
    ),
    "sum of two types": (
        lambda: wide([N("Cast", ["x"], ["h"], "cast", to=10), N("Add", ["x", "h"], ["y"], "add")]),
        "types",
        "add",
    ),
    "scales of another length": (
        lambda: wide([*pair("x", "xd"), *weight(), conv()], ws=np.ones(16, np.float32), wz=np.zeros(16, np.int8)),
        "axis",
        "wd/Q",
    ),
    "two pairs of one name": (
        lambda: wide(
            [
                *pair("x", "xd"),
                N("QuantizeLinear", ["x", "s2", "z"], ["q2"], "xd/Q"),
                N("DequantizeLinear", ["q2", "s2", "z"], ["x2"], "other"),
                *weight(),
                N("Conv", ["xd", "wd"], ["c"], "conv", pads=[1, 1, 1, 1]),
                N("Add", ["c", "x2"], ["y"], "add"),
            ]
        ),
        "name",
        "xd/Q",
    ),
    "QLinearConv": (
        lambda: wide(
            [
                N("QuantizeLinear", ["x", "s", "z"], ["q"], "x/Q"),
                N("QLinearConv", ["q", "s", "z", "w", "s", "z", "s", "z"], ["o"], "integer"),
                N("DequantizeLinear", ["o", "s", "z"], ["y"], "o/DQ"),
            ],
            w=np.ones((32, 32, 3, 3), np.int8),
        ),
        "operator",
        "integer",
    ),
    "ConvInteger": (
        lambda: wide(
            [
                N("QuantizeLinear", ["x", "s", "z"], ["q"], "x/Q"),
                N("ConvInteger", ["q", "w"], ["o"], "integer"),
                N("Cast", ["o"], ["y"], "cast", to=1),
            ],
            w=np.ones((32, 32, 3, 3), np.int8),
        ),
        "operator",
        "integer",
    ),
    "MatMulInteger": (
        lambda: wide(
            [
                N("QuantizeLinear", ["x", "s", "z"], ["q"], "x/Q"),
                N("MatMulInteger", ["q", "w"], ["o"], "integer"),
                N("Cast", ["o"], ["y"], "cast", to=1),
            ],
            w=np.ones((8, 8), np.int8),
        ),
        "operator",
        "integer",
    ),
}


def runs_int8(model, folder, target="SM86"):
    onnx.save(model, str(folder / "m.onnx"))
    kernels = compile_kernels(folder / "m.onnx", target)
    return any("conv" in kernel.nodes and kernel.kind in ("correlation", "gemm") and kernel.is_int8 for kernel in kernels)


@pytest.mark.parametrize("case", KEPT)
def test_what_keeps_int8_is_not_blamed(case):
    assert broken(KEPT[case]()) == []


@needs_rtx
@pytest.mark.parametrize("case", KEPT)
def test_rtx_keeps_int8(case, tmp_path):
    assert runs_int8(KEPT[case](), tmp_path)


@pytest.mark.parametrize("case", LOST)
def test_lost_int8_is_found(case):
    make, rule, node = LOST[case]
    assert (node, rule, "loss") in {(f.node, f.rule, f.level) for f in check_onnx(make(), target="rtx")}


@needs_rtx
@pytest.mark.parametrize("case", LOST)
def test_rtx_loses_int8(case, tmp_path):
    assert not runs_int8(LOST[case][0](), tmp_path)


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_is_found(case):
    make, rule, node = REFUSED[case]
    assert (node, rule, "error") in {(f.node, f.rule, f.level) for f in check_onnx(make(), target="rtx")}


@needs_rtx
@pytest.mark.parametrize("case", REFUSED)
def test_rtx_refuses(case, tmp_path):
    with pytest.raises(ValueError, match=r"\S"):
        runs_int8(REFUSED[case][0](), tmp_path)


@needs_rtx
@pytest.mark.parametrize(("make", "refused"), [(KEPT["MatMul"], True), (KEPT["plain"], False)], ids=["product", "convolution"])
def test_turing(make, refused, tmp_path):
    assert [f.level for f in broken(make(), target="rtx", sm=75)] == ["error" if refused else "loss"]
    assert broken(make(), target="11", sm=75) == []
    if refused:
        with pytest.raises(ValueError, match="FP32 GEMM is not supported"):
            runs_int8(make(), tmp_path, "SM75")
    else:
        assert not runs_int8(make(), tmp_path, "SM75")


def fp8():
    import ml_dtypes

    return wide([*pair("x", "y", zero="z8")], z8=np.zeros((), ml_dtypes.float8_e4m3fn))


@needs_rtx
def test_fp8_needs_ada(tmp_path):
    assert [f.rule for f in broken(fp8(), target="rtx", sm=86)] == ["fp8-gpu", "fp8-gpu"]
    assert broken(fp8(), target="rtx", sm=89) == []
    with pytest.raises(ValueError, match="fp8"):
        runs_int8(fp8(), tmp_path, "SM86")


def test_fp8_and_bf16_are_unknown_to_tensorrt_8():
    assert {f.rule for f in broken(fp8(), target="8.6")} == {"type-version"}
    model = wide([N("Cast", ["x"], ["y"], "cast", to=TensorProto.BFLOAT16)], y=TensorProto.BFLOAT16)
    assert [(f.node, f.rule) for f in broken(model, target="8.6")] == [("cast", "type-version")]
    assert broken(model, target="10") == []


def test_fp16_below_opset_19_is_found():
    rules = {f.rule for f in broken(form_a(17))}
    assert {"fp16-opset", "types"} <= rules


def test_fp16_data_is_not_for_tensorrt_8():
    assert "fp16-data" in {f.rule for f in broken(form_a(), target="8.6")}
    assert "fp16-data" not in {f.rule for f in broken(form_b(17), target="8.6")}


def test_fp16_data_with_fp32_scales_needs_opset_23():
    nodes = [*pair("x", "xd"), *weight(), conv()]
    assert [f.node for f in broken(wide(nodes, x=TensorProto.FLOAT16))] == ["xd/Q"]
    assert broken(wide(nodes, x=TensorProto.FLOAT16, opset=23)) == []


def test_output_dtype_is_not_for_old_parsers():
    levels = {target: {f.level for f in check_onnx(form_c(), target=target) if f.rule == "output-dtype"} for target in TARGETS}
    assert levels == {"8.6": {"error"}, "10": {"note"}, "11": set(), "rtx": set()}


def test_a_computed_scale_is_no_error_for_newer_versions():
    model = conv_graph(edit=computed_scale)
    assert "scale-constant" in {f.rule for f in broken(model, target="8.6")}
    assert "scale-constant" not in {f.rule for f in broken(model, target="11")}


@pytest.mark.parametrize(
    ("opset", "target", "found"), [(17, None, True), (17, "8.6", True), (17, "10", False), (19, None, False)]
)
def test_part_of_a_shape_is_not_for_tensorrt_8(opset, target, found):
    model = wide([N("Shape", ["x"], ["s"], "shape", end=1), *pair("x", "xd"), *weight(), conv()], opset=opset)
    assert ("shape" in {f.rule for f in check_onnx(model, target=target) if f.node == "shape"}) == found


def test_a_whole_shape_is_for_tensorrt_8():
    model = wide([N("Shape", ["x"], ["s"], "shape", start=0), *pair("x", "xd"), *weight(), conv()], opset=17)
    assert "shape" not in {f.rule for f in check_onnx(model, target="8.6")}


def test_opset_ceilings():
    def notes(opset, target):
        return [f.node for f in check_onnx(conv_graph(opset=opset), target=target) if f.rule == "opset"]

    assert [notes(17, "8.6"), notes(18, "8.6")] == [[], ["graph"]]
    assert [notes(20, "10"), notes(21, "10")] == [[], ["graph"]]
    assert notes(19, None) == []


def notes(model, **target):
    return {(f.node, f.rule) for f in check_onnx(model, **target) if f.level == "note"}


def test_fp32_around_int8_is_noted_where_typing_is_strong():
    assert ("graph", "fp32") in notes(KEPT["plain"](), target="11")
    assert ("graph", "fp32") not in notes(KEPT["plain"](), target="8.6")
    assert ("graph", "fp32") not in notes(form_b(), target="11")


def test_a_graph_without_qdq_is_noted():
    assert ("graph", "no-qdq") in notes(wide([N("Relu", ["x"], ["y"], "relu")]))


def test_folded_qdq_is_a_loss():
    model = wide([conv("x", "w")], metadata={"qat.sites": '{"conv.input": ["x/Q"], "conv.weight": ["w/Q"]}'})
    assert [(f.node, f.rule, f.level) for f in broken(model)] == [("graph", "metadata", "loss")]


def test_a_missing_pair_is_noted():
    sites = '{"conv.input": ["xd/Q"], "conv.weight": ["wd/Q"], "other": ["gone/Q"]}'
    finding = next(
        f
        for f in check_onnx(wide([*pair("x", "xd"), *weight(), conv()], metadata={"qat.sites": sites}))
        if f.rule == "metadata"
    )
    assert "1 of 3" in finding.problem
    assert "gone/Q" in finding.problem


@pytest.mark.parametrize("text", ["{", "[1]", '{"a": 3}', "null"])
def test_damaged_metadata_is_noted(text):
    assert ("graph", "metadata") in notes(wide([*pair("x", "xd"), *weight(), conv()], metadata={"qat.sites": text}))


def test_concat_scales_are_compared_with_those_of_other_readers():
    def model(scale):
        nodes = [N("Relu", ["x"], ["r"], "relu"), N("Concat", ["x", "r"], ["c"], "cat", axis=1), *pair("c", "y", scale)]
        return wide([*nodes, *pair("r", "side")])

    assert ("cat", "concat") in notes(model("s2"))
    assert ("cat", "concat") not in notes(model("s"))


def test_average_pooling_between_quantized_layers_wants_a_pair():
    def model(*between, source):
        first = N("Conv", ["xd", "wd"], ["c"], "conv", pads=[1, 1, 1, 1])
        return wide([*pair("x", "xd"), *weight(), first, *between, N("GlobalAveragePool", [source], ["y"], "pool")])

    assert ("pool", "pool") in notes(model(source="c"))
    assert ("pool", "pool") not in notes(model(*pair("c", "cd"), source="cd"))
    assert ("pool", "pool-rtx") in notes(model(*pair("c", "cd"), source="cd"), target="rtx")


@needs_rtx
def test_rtx_pools_in_float(tmp_path):
    nodes = [
        *pair("x", "xd"),
        N("AveragePool", ["xd"], ["p"], "pool", kernel_shape=[2, 2]),
        *pair("p", "pd"),
        *weight(),
        conv("pd"),
    ]
    onnx.save(wide(nodes), str(tmp_path / "m.onnx"))
    pools = [kernel for kernel in compile_kernels(tmp_path / "m.onnx") if kernel.kind == "avgpool"]
    assert [kernel.operands[0] for kernel in pools] == ["Float"]


def residual(left, right):
    """conv(x) + x, each perhaps quantized."""
    nodes = [*pair("x", "xd"), *weight(), N("Conv", ["xd", "wd", "b"], ["c"], "conv", pads=[1, 1, 1, 1])]
    nodes += [*(pair("c", "cd") if left else []), *(pair("x", "rd", "s2") if right else [])]
    return wide([*nodes, N("Add", ["cd" if left else "c", "rd" if right else "x"], ["y"], "add")])


@pytest.mark.parametrize(
    ("left", "right", "rule"), [(True, True, "add-both"), (False, False, "add-float"), (False, True, None)]
)
def test_residual_adds(left, right, rule):
    assert {name for node, name in notes(residual(left, right)) if node == "add"} == ({rule} if rule else set())


@pytest.mark.parametrize(("target", "noted"), [("8.6", True), ("10", True), ("11", True), ("rtx", False)])
def test_an_add_of_two_pairs_is_a_kernel_of_its_own_but_on_rtx(target, noted):
    assert (("add", "add-both") in notes(residual(True, True), target=target)) is noted


def test_a_pair_between_convolution_and_relu_is_noted():
    first = N("Conv", ["xd", "wd", "b"], ["c"], "conv", pads=[1, 1, 1, 1])
    model = wide([*pair("x", "xd"), *weight(), first, *pair("c", "cd"), N("Relu", ["cd"], ["y"], "relu")])
    assert ("cd/Q", "fusion") in notes(model)


@pytest.mark.parametrize(
    ("c_in", "c_out", "rule"),
    [(32, 64, None), (3, 32, None), (16, 32, "channels-32"), (32, 18, "channels-4"), (6, 32, "channels-4")],
)
def test_channel_counts(c_in, c_out, rule):
    weights = {"ws": np.ones(c_out, np.float32), "wz": np.zeros(c_out, np.int8), "b": np.zeros(c_out, np.float32)}
    model = wide(
        [*pair("x", "xd"), *weight(), conv()], shape=(1, c_in, 8, 8), w=np.ones((c_out, c_in, 3, 3), np.float32), **weights
    )
    assert {name for node, name in notes(model) if node == "conv"} == ({rule} if rule else set())


@pytest.mark.parametrize(
    ("shape", "axis", "scales", "rows", "found"),
    [((64, 1), 1, 1, 6, True), ((64, 128), 1, 128, 1, True), ((64, 128), 1, 128, 6, False)],
)
def test_a_product_with_a_vector_is_noted(shape, axis, scales, rows, found):
    model = product("MatMul", shape, axis, scales)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = rows
    assert (("conv", "gemv") in notes(model)) is found


def gated(groups, c_in, gate):
    """A convolution and SiLU, averaged in INT8; the product with the average in float, in INT8, or none."""
    first = N("Conv", ["xd", "wd", "b"], ["c"], "conv", pads=[1, 1, 1, 1], group=groups)
    nodes = [*pair("x", "xd"), *weight(), first, N("Sigmoid", ["c"], ["g"], "sigmoid"), N("Mul", ["c", "g"], ["m"], "mul")]
    nodes += [*pair("m", "md"), N("GlobalAveragePool", ["md"], ["p"], "pool")]
    product = {"float": N("Mul", ["m", "p"], ["y"], "gate"), "int8": N("Mul", ["md", "p"], ["y"], "gate")}
    return wide([*nodes, product.get(gate, N("Relu", ["p"], ["y"], "relu"))], w=np.ones((32, c_in, 3, 3), np.float32))


@pytest.mark.parametrize(
    ("groups", "c_in", "gate", "noted"),
    [(32, 1, "float", True), (4, 8, "float", True), (1, 32, "float", False), (32, 1, "int8", False), (32, 1, "", False)],
)
def test_convolution_of_groups_that_something_reads_in_float(groups, c_in, gate, noted):
    assert (("conv", "groups-float") in notes(gated(groups, c_in, gate))) is noted


def test_depthwise_convolution_whose_result_is_returned():
    first = N("Conv", ["xd", "wd", "b"], ["y"], "conv", pads=[1, 1, 1, 1], group=32)
    model = wide([*pair("x", "xd"), *weight(), first], w=np.ones((32, 1, 3, 3), np.float32))
    assert ("conv", "groups-float") in notes(model)


def test_quantized_attention_products_are_noted():
    swap = N("Transpose", ["xd"], ["t"], "transpose", perm=[0, 1, 3, 2])
    model = wide([*pair("x", "xd"), swap, N("MatMul", ["xd", "t"], ["c"], "scores"), N("Softmax", ["c"], ["y"], "softmax")])
    assert ("scores", "attention") in notes(model)


def test_a_scale_that_fp16_loses_is_noted():
    assert ("xd/Q", "tiny-scale") in notes(wide([*pair("x", "xd"), *weight(), conv()], s=np.float32(1e-8)))


def test_a_default_axis_is_noted_for_the_old_parser():
    model = product("MatMul", (64, 64), None, 64)
    assert ("wd/Q", "axis-default") in notes(model, target="10")
    assert ("wd/Q", "axis-default") not in notes(model, target="11")


def test_int8_with_fp8_is_noted_for_older_versions():
    import ml_dtypes

    model = wide([*pair("x", "a"), *pair("a", "y", zero="z8")], z8=np.zeros((), ml_dtypes.float8_e4m3fn))
    assert ("graph", "mixed") in notes(model, target="10")
    assert ("graph", "mixed") not in notes(model, target="11")


def test_int4_blocks():
    import ml_dtypes

    def model(size, axis):
        shape = [512, 128]
        codes = np.ones(shape, ml_dtypes.int4)
        shape[axis] //= size
        dequantize = N("DequantizeLinear", ["w", "ws"], ["wd"], "wd/DQ", axis=axis, block_size=size)
        nodes = [dequantize, N("MatMul", ["x", "wd"], ["y"], "conv")]
        return wide(nodes, opset=21, shape=(6, 512), w=codes, ws=np.full(shape, 0.01, np.float32))

    assert [[f.rule for f in broken(model(*settings))] for settings in ((64, 0), (256, 0), (64, 1))] == [
        [],
        ["block"],
        ["block"],
    ]


# Files.


def external(folder, model=None):
    """A file with all its constants beside it."""
    path = folder / "m.onnx"
    settings = {"save_as_external_data": True, "location": "m.data", "size_threshold": 0}
    onnx.save_model(model or conv_graph(x_scale=np.float32(-1)), str(path), **settings)
    return path


def test_scales_in_external_data_are_read(tmp_path):
    assert {f.rule for f in broken(external(tmp_path))} == {"scale-positive"}


def test_large_weights_are_not_read(tmp_path):
    weights = np.ones((32, 300, 3, 3), np.float32)
    path = external(tmp_path, wide([*pair("x", "xd"), *weight(), conv()], w=weights, shape=(1, 300, 8, 8)))
    model = onnx.load(str(path), load_external_data=False)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == "w")
    # Nothing to read where its data should be.
    del tensor.external_data[:]
    tensor.external_data.add(key="location", value="empty")
    (tmp_path / "empty").touch()
    onnx.save(model, str(path))
    assert broken(path) == []


def test_shapes_in_external_data_are_read(tmp_path):
    nodes = [
        *pair("x", "xd"),
        N("Reshape", ["xd", "to"], ["r"], "reshape"),
        *weight(1),
        N("MatMul", ["r", "wd"], ["y"], "product"),
    ]
    constants = {"w": np.ones((2048, 16), np.float32), "ws": np.ones(16, np.float32), "wz": np.zeros(16, np.int8)}
    model = wide(nodes, to=integers(1, 2048), **constants)
    assert ("product", "gemv") in notes(external(tmp_path, model))


@pytest.mark.parametrize("location", ["../m.data", "/etc/hostname", "a/../../m.data", ""])
def test_external_data_outside_the_folder_is_refused(tmp_path, location):
    folder = tmp_path / "model"
    folder.mkdir()
    path = external(folder)
    (tmp_path / "m.data").write_bytes((folder / "m.data").read_bytes())
    model = onnx.load(str(path), load_external_data=False)
    model.graph.initializer[0].external_data[0].value = location
    onnx.save(model, str(path))
    with pytest.raises(QATError, match=r"outside the model's folder|no file name"):
        check_onnx(path)


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    path = external(folder)
    (folder / "m.data").rename(tmp_path / "m.data")
    (folder / "m.data").symlink_to(tmp_path / "m.data")
    with pytest.raises(QATError, match="outside the model's folder"):
        check_onnx(path)


def test_missing_and_short_external_data_are_refused(tmp_path):
    path = external(tmp_path)
    (tmp_path / "m.data").write_bytes(b"1")
    with pytest.raises(QATError, match="too short"):
        check_onnx(path)
    (tmp_path / "m.data").unlink()
    with pytest.raises(QATError, match="which is not there"):
        check_onnx(path)


@pytest.mark.parametrize("content", [b"", b"not a protobuf \xff\xff", b"\x00" * 64], ids=["empty", "text", "zeros"])
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(QATError, match="is no ONNX file"):
        check_onnx(tmp_path / "m.onnx")


def test_a_truncated_file_is_refused(tmp_path):
    whole = conv_graph().SerializeToString()
    for length in range(1, len(whole), 7):
        (tmp_path / "m.onnx").write_bytes(whole[:length])
        with pytest.raises(QATError, match=r"m\.onnx"):
            check_onnx(tmp_path / "m.onnx")


def test_names_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "m.onnx").write_bytes(conv_graph().SerializeToString().replace(b"conv", b"\xff\xfe\xfd\xfc"))
    with pytest.raises(QATError, match="a name in it is no text"):
        check_onnx(tmp_path / "m.onnx")


@pytest.mark.parametrize(
    "make", [form_b, KEPT["padding with zeros"], lambda: residual(True, True)], ids=["types", "pad", "add"]
)
def test_damaged_files_raise_nothing_else(make, tmp_path):
    rng = np.random.default_rng(0)
    whole = external(tmp_path, make()).read_bytes()
    refused = 0
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[rng.integers(0, len(whole))] = rng.integers(0, 128)
        (tmp_path / "m.onnx").write_bytes(damaged)
        try:
            check_onnx(tmp_path / "m.onnx")
        except QATError:
            refused += 1
    assert 0 < refused < 300


def test_missing_files_and_folders_are_refused(tmp_path):
    with pytest.raises(QATError, match="no such file"):
        check_onnx(tmp_path / "m.onnx")
    with pytest.raises(QATError, match="is a folder"):
        check_onnx(tmp_path)


@pytest.mark.parametrize(
    "nodes",
    [
        [N("Relu", ["b1"], ["a1"], "a"), N("Relu", ["a1"], ["b1"], "b"), N("Add", ["x", "b1"], ["y"], "c")],
        [N("Relu", ["x"], ["y"], "a"), N("Relu", ["x"], ["y"], "b")],
        [N("Relu", ["nowhere"], ["y"], "a")],
        [N("Invented", ["x"], ["y"], "a")],
        [N("QuantizeLinear", [], ["y"], "a")],
        [N("Conv", ["x"], ["y"], "a")],
    ],
    ids=["cycle", "two producers", "no producer", "unknown operator", "no inputs", "too few inputs"],
)
def test_invalid_graphs_are_refused(nodes):
    with pytest.raises(QATError, match="no valid ONNX"):
        check_onnx(wide(nodes))


def test_a_constant_that_lies_about_its_shape_is_refused():
    model = conv_graph()
    scale = next(tensor for tensor in model.graph.initializer if tensor.name == "w_scale")
    scale.dims[0] = 5
    with pytest.raises(QATError, match=r"w_scale|no valid ONNX"):
        check_onnx(model)


@pytest.mark.parametrize(
    ("arguments", "message"), [({"target": "9"}, "target='9'"), ({"sm": "SM86"}, "sm='SM86'"), ({"sm": 8}, "sm=8")]
)
def test_unknown_targets_are_refused(arguments, message):
    with pytest.raises(QATError, match=message):
        check_onnx(conv_graph(), **arguments)
