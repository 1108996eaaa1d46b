"""export_onnx(precision=...): what becomes half, what stays float32 and why, codes that do not change, overflow by name."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from export_nets import exporter, images, quantized, tiny
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import qat
from qat.export import pairs as graphs
from qat.graph import halves, precision, retype

FLOAT, HALF, BF16, INT8 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.INT8


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    return exporter(model, tmp_path_factory.mktemp("onnx"), images(2))


def types(proto):
    """The element type of every tensor, by ONNX's own inference."""
    inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True).graph
    found = {
        value.name: value.type.tensor_type.elem_type for value in (*inferred.value_info, *inferred.input, *inferred.output)
    }
    return found | {tensor.name: tensor.data_type for tensor in proto.graph.initializer}


def int8_tensors(path, x):
    """The value of every int8 tensor and constant of the file."""
    proto = onnx.load(path)
    names = [node.output[0] for node in proto.graph.node if node.op_type == "QuantizeLinear"]
    proto.graph.output.extend(helper.make_tensor_value_info(name, INT8, None) for name in names)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    values = dict(zip(names, session.run(names, {"images": x.numpy()}), strict=True))
    stored = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer if t.name.endswith("/codes")}
    return values | stored


def useless_casts(proto):
    """Casts to the type that is there, and Casts that undo a Cast."""
    kinds = types(proto)
    producer = {output: node for node in proto.graph.node for output in node.output}
    casts = [node for node in proto.graph.node if node.op_type == "Cast"]
    return [
        node.name
        for node in casts
        if kinds[node.input[0]] == kinds[node.output[0]]
        or (node.input[0] in producer and producer[node.input[0]].op_type == "Cast")
        or node.input[0] in {t.name for t in proto.graph.initializer}
    ]


def convert(text, kind="fp16", *, half_io=True):
    """A graph in ONNX's text syntax with half precision; checked, and the types of its tensors."""
    proto = onnx.parser.parse_model(text)
    for i, node in enumerate(proto.graph.node):
        node.name = f"{node.op_type}_{i}"
    retype.apply(proto, precision.decide(proto, kind, half_io=half_io))
    graphs.drop_unused(proto.graph)
    onnx.checker.check_model(proto, full_check=True)
    assert useless_casts(proto) == []
    return proto, types(proto)


def text(body, inputs="float[N, 8, 4, 4] x", outputs="float[N, 8, 4, 4] y", opset=19, constants=""):
    constants = f"\n<{constants}>" if constants else ""
    return f'<ir_version: 9, opset_import: ["" : {opset}]>\ng ({inputs}) => ({outputs}){constants}\n{{ {body} }}'


# ---- A whole model


@pytest.mark.parametrize(("kind", "opset"), [(HALF, 19), (HALF, 23), (BF16, 22), (BF16, 23)])
def test_layers_and_their_constants_are_half(exported, kind, opset):
    proto = onnx.load(exported(precision="fp16" if kind == HALF else "bf16", opset=opset))
    kinds = types(proto)
    layers = [n for n in proto.graph.node if n.op_type in ("Conv", "BatchNormalization", "Gemm", "GlobalAveragePool")]
    assert len(layers) == 6 + 5 + 1 + 1
    assert {kinds[name] for node in layers for name in (*node.input, *node.output) if name} <= {kind, FLOAT}
    assert {kinds[name] for node in layers for name in node.input} == {kind}
    assert useless_casts(proto) == []


@pytest.mark.parametrize("options", [{}, {"opset": 23}, {"int8_weights": True}, {"precision": "bf16"}], ids=str)
def test_scales_stay_float32_and_bit_equal(exported, options):
    def scales(path):
        proto = onnx.load(path)
        read = {n.input[1] for n in proto.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")}
        return {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer if t.name in read}

    plain = {name: value for name, value in options.items() if name == "int8_weights"}
    reference, found = scales(exported(**plain)), scales(exported(**{"precision": "fp16", **options}))
    assert reference.keys() == found.keys()
    assert all(found[name].dtype == np.float32 and np.array_equal(found[name], reference[name]) for name in reference)


@pytest.mark.parametrize("options", [{}, {"opset": 23}, {"int8_weights": True}, {"half_io": False, "fuse_adds": True}], ids=str)
def test_weight_codes_and_first_activation_codes_are_those_of_the_float32_file(exported, options):
    shared = {name: value for name, value in options.items() if name in ("int8_weights", "fuse_adds")}
    x = images(2, seed=5)
    reference = int8_tensors(exported(**shared), x)
    found = int8_tensors(exported(precision="fp16", **options), x)
    names = [name for name in reference if ".weight_quantizer/" in name]
    assert len(names) == 6
    assert all(np.array_equal(reference[name], found[name]) for name in [*names, "stem.0.input_quantizer/codes"])


def test_below_opset_23_casts_surround_the_pair(exported):
    proto = onnx.load(exported(precision="fp16", opset=19))
    kinds = types(proto)
    assert {kinds[n.input[0]] for n in proto.graph.node if n.op_type == "QuantizeLinear"} == {FLOAT}
    assert {kinds[n.output[0]] for n in proto.graph.node if n.op_type == "DequantizeLinear"} == {FLOAT}


def test_from_opset_23_no_cast_is_needed_but_at_the_borders(exported):
    proto = onnx.load(exported(precision="fp16", opset=23))
    kinds = types(proto)
    # The graph input goes to its Q as it is.
    assert [n.output[0] for n in proto.graph.node if n.op_type == "Cast"] == ["output"]
    assert {kinds[n.output[0]] for n in proto.graph.node if n.op_type == "DequantizeLinear"} == {HALF}


def test_inputs_and_outputs_stay_float32(exported):
    proto = onnx.load(exported(precision="fp16"))
    assert [v.type.tensor_type.elem_type for v in (*proto.graph.input, *proto.graph.output)] == [FLOAT, FLOAT]


@pytest.mark.parametrize("opset", [19, 23])
def test_half_io(exported, opset):
    path = exported(precision="fp16", half_io=True, opset=opset)
    options = onnxruntime.SessionOptions()
    # At opset 23 its optimizer quantizes biases and takes DQ's output for the type of the scale.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    assert [value.type for value in (*session.get_inputs(), *session.get_outputs())] == ["tensor(float16)"] * 2
    assert session.run(None, {"images": images(3).half().numpy()})[0].dtype == np.float16


def test_file_says_its_precision(exported):
    metadata = {entry.key: entry.value for entry in onnx.load(exported(precision="fp16")).metadata_props}
    assert metadata["qat.precision"] == "fp16"


def test_batch_norm_keeps_its_factor_where_half_loses_its_variance(tmp_path):
    """A variance of 3e-8 is a subnormal float16 with one bit and a half."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4, eps=1e-9)
    model = quantized(nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), norm, nn.ReLU(), nn.Conv2d(4, 2, 1)), images())
    norm.running_var.fill_(4.1e-8)
    norm.running_mean.fill_(0.0)
    norm.weight.data.fill_(1e-4)
    proto = onnx.load(qat.export_onnx(model, tmp_path / "m.onnx", images(), precision="fp16"))
    node = next(n for n in proto.graph.node if n.op_type == "BatchNormalization")
    constants = {t.name: numpy_helper.to_array(t).astype(np.float64) for t in proto.graph.initializer}
    scale, _, _, variance = (constants[name] for name in node.input[1:])
    epsilon = helper.get_node_attr_value(node, "epsilon")
    assert scale / np.sqrt(variance + epsilon) == pytest.approx(1e-4 / np.sqrt(4.1e-8 + 1e-9), rel=2**-11)


# ---- Parity


@pytest.mark.parametrize("options", [{}, {"opset": 23}, {"half_io": True}, {"fuse_adds": True}], ids=str)
def test_half_file_is_as_close_as_rounding_every_result_to_half(model, exported, options):
    report = qat.parity(model, exported(precision="fp16", **options), images(4, seed=3), codes=True)
    assert report.precision == "fp16"
    assert report.within_drift(), report
    assert 1e-6 < report.outputs[0].onnx.max_rel < 0.05
    assert report.codes_equal > report.drift_codes_equal - 0.03


def test_parity_names_the_cause_of_the_drift(model, exported):
    assert "rounded to fp16" in str(qat.parity(model, exported(precision="fp16"), images(1)))


def test_parity_refuses_segments_of_a_half_file(model, exported):
    with pytest.raises(qat.QATError, match="segments=True compares codes bit by bit"):
        qat.parity(model, exported(precision="fp16"), images(1), segments=True)


def test_parity_refuses_bfloat16(model, exported):
    with pytest.raises(qat.QATError, match="bfloat16, which ONNX Runtime's CPU kernels do not"):
        qat.parity(model, exported(precision="bf16"), images(1))


# ---- FP16 scales on request


def test_half_scales_warn_and_count(model, tmp_path):
    with pytest.warns(UserWarning, match=r"half_scales=True: \d+ of \d+ codes changed .* most of \S+/QuantizeLinear"):
        path = qat.export_onnx(model, tmp_path / "m.onnx", images(2), precision="fp16", half_scales=True)
    proto = onnx.load(path)
    kinds = types(proto)
    pairs = [n for n in proto.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert {kinds[n.input[1]] for n in pairs} == {HALF}
    counted = json.loads(next(e.value for e in proto.metadata_props if e.key == "qat.changed_codes"))
    weight, site = model.block1.conv1.weight, model.block1.conv1.weight_quantizer
    scale = site.range_scale(weight).detach().numpy().reshape(-1, 1, 1, 1)
    w = weight.detach().numpy()
    exact = np.clip(np.rint(w / scale), -128, 127)
    rounded = np.clip(np.rint(w.astype(np.float16).astype(np.float32) / scale.astype(np.float16).astype(np.float32)), -128, 127)
    assert counted["changed"]["block1.conv1.weight_quantizer/QuantizeLinear"] == (exact != rounded).sum() > 0
    assert counted["total"]["block1.conv1.weight_quantizer/QuantizeLinear"] == w.size


def test_half_scale_never_becomes_zero():
    scale = np.array([1e-9, 0.5], np.float32)
    assert halves.rounded_scale(scale, HALF).tolist() == [2.0**-24, 0.5]


# ---- Overflow


def loud(factor):
    """A model whose second convolution puts out values of about ``factor``."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3))
    with torch.no_grad():
        model[2].weight.mul_(factor)
        model[4].weight.div_(factor)
    return quantized(model, images())


def test_overflow_names_node_and_value(tmp_path):
    with pytest.raises(qat.QATError, match=r"2/Conv: magnitude [\d.e+]+ on the example inputs, float16 ends at 65504"):
        qat.export_onnx(loud(1e6), tmp_path / "m.onnx", images(), precision="fp16")
    assert list(tmp_path.iterdir()) == []


def test_overflow_remedy_is_enough(tmp_path):
    model = loud(1e6)
    with pytest.raises(qat.QATError) as caught:
        qat.export_onnx(model, tmp_path / "m.onnx", images(), precision="fp16")
    names = json.loads(str(caught.value).partition("fp32_nodes=")[2].partition("]")[0].replace("'", '"') + "]")
    path = qat.export_onnx(model, tmp_path / "m.onnx", images(), precision="fp16", fp32_nodes=names)
    kinds = types(onnx.load(path))
    convs = [node for node in onnx.load(path).graph.node if node.op_type == "Conv"]
    # The last one reads the large values, dequantized.
    assert [kinds[node.output[0]] for node in convs] == [HALF, FLOAT, FLOAT]
    assert np.isfinite(qat.parity(model, path, images()).outputs[0].onnx.max_rel)


def test_bfloat16_does_not_overflow(tmp_path):
    assert qat.export_onnx(loud(1e6), tmp_path / "m.onnx", images(), precision="bf16").exists()


def test_weight_beyond_half_is_named(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 14 * 14, 4))
    model[3].bias.data[2] = 1e5
    quantized(model, images())
    with pytest.raises(qat.QATError, match=r"3/Gemm: its constant 3\.bias: magnitude 100000"):
        qat.export_onnx(model, tmp_path / "m.onnx", images(), precision="fp16")


def test_infinite_mask_is_no_overflow(tmp_path):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            scores = self.a(x)
            return self.b(scores.masked_fill(scores > 0.5, float("-inf")).softmax(-1))

    torch.manual_seed(0)
    model = quantized(Masked(), torch.randn(4, 8))
    assert qat.export_onnx(model, tmp_path / "m.onnx", torch.randn(4, 8), precision="fp16").exists()


# ---- Arguments


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "int8"}, "precision='int8': choose 'fp32', 'fp16' or 'bf16'"),
        ({"precision": "fp16", "opset": 17}, r"needs opset >= 19, got 17\. For TensorRT 8\.6 export with\s+precision='fp32'"),
        ({"precision": "bf16", "opset": 19}, "needs opset >= 22, from where Conv takes bfloat16; got 19"),
        ({"half_io": True}, "half_io=True needs precision='fp16' or 'bf16'"),
        ({"half_scales": True}, "half_scales=True needs precision"),
        ({"fp32_nodes": ["a"]}, "fp32_nodes=.* needs precision"),
        ({"precision": "fp16", "fp32_nodes": "a"}, "pass a list"),
        ({"precision": "fp16", "fp32_nodes": ["nowhere*"]}, r"no node is named 'nowhere\*'"),
    ],
    ids=str,
)
def test_refused(model, tmp_path, options, message):
    with pytest.raises(qat.QATError, match=message):
        qat.export_onnx(model, tmp_path / "m.onnx", images(1), **options)
    assert list(tmp_path.iterdir()) == []


def test_bfloat16_raises_the_default_opset(exported):
    assert next(e.version for e in onnx.load(exported(precision="bf16")).opset_import if e.domain == "") == 22


def test_pattern_keeps_nodes_in_float32(exported):
    proto = onnx.load(exported(precision="fp16", fp32_nodes=["block2.*/Conv"]))
    kinds = types(proto)
    convs = {node.name: kinds[node.output[0]] for node in proto.graph.node if node.op_type == "Conv"}
    assert convs == {name: FLOAT if name.startswith("block2.") else HALF for name in convs}
    assert len([kind for kind in convs.values() if kind == FLOAT]) == 3


# ---- Rules, on graphs of a few nodes


def test_softmax_computes_in_float32():
    _, kinds = convert(text("a = Relu(x) s = Softmax<axis = 1>(a) y = Relu(s)"))
    assert (kinds["a"], kinds["s"]) == (HALF, FLOAT)


def test_layer_normalization_takes_half_and_says_that_it_computes_in_float32():
    weight = "float[4] w = {1, 1, 1, 1}, float[4] b = {0, 0, 0, 0}"
    proto, kinds = convert(text("a = LayerNormalization<axis = -1>(x, w, b) y = Relu(a)", constants=weight))
    node = next(n for n in proto.graph.node if n.op_type == "LayerNormalization")
    assert {kinds[name] for name in node.input} == {HALF}
    assert helper.get_node_attr_value(node, "stash_type") == FLOAT


def test_normalization_spelled_out_is_one_float32_island():
    body = """
        a = Relu(x) m = ReduceMean(a, axes) d = Sub(a, m) p = Pow(d, two) v = ReduceMean(p, axes) e = Add(v, eps)
        r = Sqrt(e) q = Div(d, r) y = Mul(q, gamma)
    """
    constants = "int64[1] axes = {1}, float two = {2}, float eps = {0.000001}, float gamma = {0.5}"
    _, kinds = convert(text(body, constants=constants))
    assert [kinds[name] for name in ("a", "m", "d", "p", "v", "e", "r", "q")] == [HALF] + [FLOAT] * 7


def test_constant_that_half_loses_keeps_its_operator_in_float32():
    _, kinds = convert(text("a = Add(x, eps) b = Add(a, one) y = Relu(b)", constants="float eps = {0.000001}, float one = {1}"))
    assert (kinds["a"], kinds["b"]) == (FLOAT, HALF)


def test_mask_beyond_half_keeps_its_operator_in_float32():
    body = "a = Relu(x) c = Greater(a, one) s = Where(c, low, a) p = Softmax<axis = 1>(s) y = Relu(p)"
    _, kinds = convert(text(body, constants="float one = {1}, float low = {-1000000000}"))
    assert (kinds["a"], kinds["s"], kinds["p"]) == (HALF, FLOAT, FLOAT)


def test_scales_of_resize_stay_float32():
    constants = "float[4] scales = {1, 1, 2, 2}"
    body = 'a = Relu(x) y = Resize<mode = "nearest">(a, , scales)'
    proto, kinds = convert(text(body, outputs="float[N, 8, 8, 8] y", constants=constants))
    node = next(n for n in proto.graph.node if n.op_type == "Resize")
    assert (kinds[node.input[0]], kinds[node.input[2]]) == (HALF, FLOAT)


def test_limits_of_clip_follow_its_data():
    proto, kinds = convert(text("a = Clip(x, low, high) y = Relu(a)", constants="float low = {0}, float high = {6}"))
    assert {kinds[name] for node in proto.graph.node if node.op_type == "Clip" for name in node.input} == {HALF}


def test_constant_shared_by_half_and_float32_readers_is_there_twice():
    proto, kinds = convert(text("a = Mul(x, c) b = Pow(a, c) y = Relu(b)", constants="float c = {2}"))
    assert sorted(kinds[t.name] for t in proto.graph.initializer) == [FLOAT, HALF]


@pytest.mark.parametrize("operator", ["Cast<to = 1>(i)", "CastLike(i, x)"])
def test_numbers_made_float_are_made_half(operator):
    inputs = "float[N, 8, 4, 4] x, int64[N, 8, 4, 4] i"
    _, kinds = convert(text(f"f = {operator} y = Add(x, f)", inputs=inputs))
    assert kinds["f"] == HALF


def test_filled_tensor_is_half():
    body = "s = Shape(x) f = ConstantOfShape<value = float[1] {3}>(s) y = Add(x, f)"
    _, kinds = convert(text(body))
    assert (kinds["f"], kinds["s"]) == (HALF, TensorProto.INT64)


def test_index_arithmetic_stays_float32():
    """A size above 2048 times a factor, as interpolation by a scale factor writes it."""
    body = """
        s = Shape(x) n = Gather(s, last) f = Cast<to = 1>(n) g = Mul(f, factor) h = Floor(g) i = Cast<to = 7>(h)
        d = Unsqueeze(i, last) r = Reshape(x, d) y = Relu(r)
    """
    constants = "int64 last0 = {0}, float factor = {1.5}, int64[1] last = {0}"
    body = body.replace("Gather(s, last)", "Gather(s, last0)")
    _, kinds = convert(text(body, inputs="float[N] x", outputs="float[M] y", constants=constants))
    assert [kinds[name] for name in ("f", "g", "h", "r")] == [FLOAT, FLOAT, FLOAT, HALF]


def test_cheap_operators_between_pairs_stay_float32():
    body = """
        a = QuantizeLinear(x, s, z) b = DequantizeLinear(a, s, z) c = Add(b, b) d = Relu(c) e = QuantizeLinear(d, s, z)
        f = DequantizeLinear(e, s, z) y = Sigmoid(f)
    """
    proto, kinds = convert(text(body, constants="float s = {0.1}, int8 z = {0}"))
    assert (kinds["c"], kinds["d"]) == (FLOAT, FLOAT)
    # The graph's input to Q, and DQ to Sigmoid.
    assert len([node for node in proto.graph.node if node.op_type == "Cast"]) == 2


def test_cast_from_float_to_float_goes():
    proto, _ = convert(text("a = Relu(x) b = Cast<to = 1>(a) y = Sigmoid(b)"))
    assert [n.op_type for n in proto.graph.node] == ["Relu", "Identity", "Sigmoid"]


def test_output_that_is_read_inside_too():
    body, outputs = "y = MatMul(x, x) z = MatMul(y, x)", "float[N, 8, 4, 4] y, float[N, 8, 4, 4] z"
    proto, kinds = convert(text(body, outputs=outputs), half_io=False)
    assert (kinds["y"], kinds["z"]) == (FLOAT, FLOAT)
    assert [kinds[n.input[0]] for n in proto.graph.node if n.op_type == "MatMul"] == [HALF, HALF]


def test_preprocessing_in_front_of_the_first_pair_stays_float32():
    """Its codes are then those of the float32 file."""
    body = "a = Sub(x, mean) b = QuantizeLinear(a, s, z) c = DequantizeLinear(b, s, z) y = MatMul(c, c)"
    _, kinds = convert(text(body, constants="float mean = {0.5}, float s = {0.1}, int8 z = {0}"), half_io=False)
    assert kinds["a"] == FLOAT


def test_control_flow_is_refused():
    body = """
        y = If (c) <then_branch = g1 () => (float[N, 8, 4, 4] t) { t = Relu(x) },
                    else_branch = g2 () => (float[N, 8, 4, 4] e) { e = Sigmoid(x) }>
    """
    with pytest.raises(qat.QATError, match=r"If_0 \(If\): control flow cannot be typed"):
        convert(text(body, inputs="float[N, 8, 4, 4] x, bool c"))


def test_operator_of_another_domain_is_refused():
    source = text("y = strange.Thing(x)").replace('"" : 19', '"" : 19, "strange" : 1')
    with pytest.raises(qat.QATError, match="Thing_0: strange::Thing is no ONNX operator"):
        convert(source)


def test_bfloat16_falls_back_to_float32_where_the_schema_has_no_bfloat16():
    """Acosh takes bfloat16 from opset 22 on."""
    _, kinds = convert(text("a = Acosh(x) y = Relu(a)", opset=19), "bf16")
    assert kinds["a"] == FLOAT
    _, kinds = convert(text("a = Acosh(x) y = Relu(a)", opset=22), "bf16")
    assert kinds["a"] == BF16
