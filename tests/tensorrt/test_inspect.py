"""What ``qat.tensorrt.inspect`` tells of engines: TensorRT-RTX's really built, enterprise TensorRT's from recorded formats."""

import io
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from export_nets import images, quantized, tiny
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console
from rtx import needs_rtx, not_int8
from torch import nn
from zoo import ZOO

import qat
from qat.errors import QATError
from qat.tensorrt import InspectedNode, Inspection, inspect
from qat.tensorrt.layers import read_json, read_log
from qat.tensorrt.names import name_parts

RECORDED = Path(__file__).parents[1] / "recorded"


def engine_layers(name):
    text = (RECORDED / name).read_text(encoding="utf-8")
    return (read_json(text) if name.endswith(".json") else read_log([text])).layers


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("inspect")


@pytest.fixture(scope="module")
def tiny_onnx(folder):
    return qat.export_onnx(tiny(), folder / "tiny.onnx", images(1))


@pytest.fixture(scope="module")
def tiny_inspection(tiny_onnx):
    return inspect(tiny_onnx)


def changed(path, name, change):
    """A copy of the file whose graph went through ``change``."""
    proto = onnx.load(path)
    change(proto.graph)
    target = path.with_name(f"{name}.onnx")
    onnx.save(proto, target)
    return target


def reason(inspection, node):
    site = next(site for site in inspection.sites if site.node == node)
    assert site.state != "int8"
    return site.reason


def bypass(graph, dequantize):
    """Let the readers of a DequantizeLinear read what its QuantizeLinear reads."""
    producer = {output: node for node in graph.node for output in node.output}
    pair = next(node for node in graph.node if node.name == dequantize)
    for node in graph.node:
        for i, name in enumerate(node.input):
            if name == pair.output[0]:
                node.input[i] = producer[pair.input[0]].input[0]


# Really built


@needs_rtx
def test_resnet18_is_int8_throughout_and_its_counts_are_those_of_the_graph(folder):
    torch.manual_seed(0)
    path = qat.export_onnx(quantized(ZOO["resnet18"].make(), images(2, size=64)), folder / "r18.onnx", images(1, size=64))
    operators = [node.op_type for node in onnx.load(path).graph.node]
    found = inspect(path)
    assert operators.count("Conv") == 20
    assert operators.count("Add") == 8
    assert found.coverage.startswith("20 of 20 quantized convs run in INT8, 8 of 8 Adds fused")
    assert found.lost == ()
    assert sum(layer.kind == "correlation" for layer in found.layers) == operators.count("Conv")


@needs_rtx
def test_linear_layers_are_counted_apart(folder):
    torch.manual_seed(0)
    model = quantized(
        nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64), nn.GELU(), nn.Linear(64, 8)), torch.randn(6, 64)
    )
    found = inspect(qat.export_onnx(model, folder / "linear.onnx", torch.randn(6, 64)))
    assert found.coverage == "2 of 2 quantized linears run in INT8"


@needs_rtx
def test_every_node_of_the_graph_that_multiplies_is_found_in_one_layer(tiny_onnx, tiny_inspection):
    wanted = {node.name for node in onnx.load(tiny_onnx).graph.node if node.op_type in ("Conv", "Gemm")}
    carried = [name for layer in tiny_inspection.layers if layer.is_mac for name in layer.onnx_nodes if name in wanted]
    assert sorted(carried) == sorted(wanted)


@needs_rtx
def test_events_and_host_computations_are_no_layers(tiny_inspection):
    assert {"signal", "wait", "shape_call"}.isdisjoint(layer.kind for layer in tiny_inspection.layers)


@needs_rtx
def test_inputs_and_outputs_are_known(tiny_onnx, tiny_inspection):
    graph = onnx.load(tiny_onnx).graph
    assert tiny_inspection.io == {value.name for value in (*graph.input, *graph.output)}


@needs_rtx
def test_the_head_is_no_lost_site(tiny_inspection):
    assert "fc/Gemm" not in {site.node for site in tiny_inspection.sites}


@needs_rtx
def test_activation_scale_of_rank_1_is_named(tiny_onnx):
    def rank_1(graph):
        for tensor in graph.initializer:
            if tensor.name.startswith("block1.conv2.input_quantizer/"):
                tensor.CopyFrom(numpy_helper.from_array(np.atleast_1d(numpy_helper.to_array(tensor)), tensor.name))

    path = changed(tiny_onnx, "rank1", rank_1)
    found = inspect(path)
    assert [site.node for site in found.lost] == not_int8(path) == ["block1.conv2/Conv"]
    assert "shape [1]: use a scale of rank 0" in reason(found, "block1.conv2/Conv")
    assert "5 of 6 quantized convs" in found.coverage


@needs_rtx
def test_wrong_weight_axis_is_named(tiny_onnx):
    def axis_1(graph):
        # Its weight is square in the channels, so that 16 scales fit both axes.
        for node in graph.node:
            if node.name.startswith("block1.conv2.weight_quantizer/"):
                next(a for a in node.attribute if a.name == "axis").i = 1

    path = changed(tiny_onnx, "axis", axis_1)
    found = inspect(path)
    assert [site.node for site in found.lost] == not_int8(path) == ["block1.conv2/Conv"]
    assert "along axis 1" in reason(found, "block1.conv2/Conv")


@needs_rtx
@pytest.mark.parametrize(("side", "word"), [("input", "data"), ("weight", "weight")])
def test_missing_pair_on_one_operand_is_named(tiny_onnx, side, word):
    name = f"block1.conv2.{side}_quantizer/DequantizeLinear"
    found = inspect(changed(tiny_onnx, side, lambda graph: bypass(graph, name)))
    # Without any pair on its data, that pair's Q and DQ are gone; without one on its weight, the data's pair serves nobody.
    assert [site.node for site in found.lost] == ["block1.conv2/Conv"]
    assert reason(found, "block1.conv2/Conv") == f"its {word} has no Q/DQ: quantize both operands or none"


@needs_rtx
def test_transposed_convolution_is_named(folder):
    """A graph written by hand: ``prepare`` leaves transposed convolutions alone."""
    path = folder / "deconv.onnx"
    onnx.save(quantized_product("ConvTranspose", (16, 16, 3, 3)), path)
    found = inspect(path)
    assert "transposed" in reason(found, "product")


@needs_rtx
def test_old_gpu_is_named(folder):
    torch.manual_seed(0)
    # No linear layer: TensorRT-RTX has no float32 one for this GPU.
    model = quantized(nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 2, 1)), images())
    found = inspect(qat.export_onnx(model, folder / "old.onnx", images(1)), target="SM75")
    assert "SM75 is too old" in reason(found, "0/Conv")


@needs_rtx
def test_pooling_without_pairs_is_named(folder):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.Sigmoid(), nn.AvgPool2d(2), nn.Sigmoid(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 2, 1)
    )
    found = inspect(qat.export_onnx(quantized(model, images(), pool_inputs=False), folder / "pool.onnx", images(1)))
    pool = next(site for site in found.sites if site.group == "pool")
    assert (pool.state, pool.reason) == ("float", "no Q/DQ around it: quantize its input")


@needs_rtx
def test_times_are_put_to_their_layers(tiny_onnx, tiny_inspection):
    times = {layer.name: 0.25 * i for i, layer in enumerate(tiny_inspection.layers)}
    found = inspect(qat.tensorrt.build(tiny_onnx), times=times)
    assert [layer.time_ms for layer in found.layers] == list(times.values())


@needs_rtx
def test_times_of_another_engine_are_refused(tiny_onnx):
    with pytest.raises(QATError, match="no layer has a time; the first name is 'x'"):
        inspect(tiny_onnx, times={"x": 1.0})


@needs_rtx
def test_an_engine_without_its_file_lists_layers_alone(tiny_onnx):
    found = inspect(qat.tensorrt.build(tiny_onnx.read_bytes()))
    assert found.sites is None
    assert found.coverage.startswith("6 of 7 kernels that multiply run in INT8")


@needs_rtx
def test_an_engine_without_a_verbose_log_says_what_to_do(tiny_onnx):
    with pytest.raises(QATError, match="verbose"):
        inspect(qat.tensorrt.build(tiny_onnx, verbose_log=False))


@needs_rtx
@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the layers of a loaded engine can be read")
def test_a_loaded_engine_without_its_gpu_says_what_to_do(tiny_onnx, tmp_path):
    qat.tensorrt.build(tiny_onnx).save(tmp_path / "tiny.engine")
    with pytest.raises(QATError, match=r"loaded, not built here.*Inspect the ONNX"):
        inspect(tmp_path / "tiny.engine")


@needs_rtx
def test_a_model_in_memory_is_built_as_well_as_its_file(tiny_onnx, tiny_inspection):
    assert inspect(onnx.load(tiny_onnx)).sites == tiny_inspection.sites


@needs_rtx
def test_rich_prints_names_as_they_are(tiny_inspection):
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(tiny_inspection)
    text = console.export_text()
    assert tiny_inspection.coverage in text
    assert "block1.quant_add0/Add" in text


@needs_rtx
def test_json_round_trip_holds_every_layer(tiny_inspection):
    read = json.loads(tiny_inspection.to_json())
    assert [layer["name"] for layer in read["layers"]] == [layer.name for layer in tiny_inspection.layers]
    assert read["coverage"] == tiny_inspection.coverage


@needs_rtx
def test_text_has_a_line_a_layer_and_the_coverage(tiny_inspection):
    lines = str(tiny_inspection).splitlines()
    assert sum(line.split()[0].isdigit() for line in lines if line.strip()) >= len(tiny_inspection.layers)
    assert tiny_inspection.coverage in lines


@needs_rtx
@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_picture_is_written(tiny_inspection, tmp_path, suffix):
    path = tiny_inspection.to_png(tmp_path / f"engine{suffix}")
    assert path.read_bytes().startswith((b"\x89PNG", b"<?xml"))
    assert list(tmp_path.iterdir()) == [path]


@needs_rtx
def test_picture_of_unknown_format_is_refused(tiny_inspection, tmp_path):
    with pytest.raises(QATError, match=r"no picture format '\.xyz'"):
        tiny_inspection.to_png(tmp_path / "engine.xyz")
    assert list(tmp_path.iterdir()) == []


# A real engine: ResNet-50 with fused Adds, batch 32, built by TensorRT 8.6.1 on an H100.


def test_real_engine_of_8_6_runs_all_convolutions_in_int8():
    layers = engine_layers("tensorrt-8.6.1-resnet50-int8.json")
    convolutions = [layer for layer in layers if any(node.endswith("/Conv") for node in layer.onnx_nodes)]
    # Counted in He et al. 2015, table 1: 49 in the blocks and the stem, and 4 downsampling ones.
    assert len(convolutions) == 53
    assert all(layer.is_int8 for layer in convolutions)


def test_real_engine_of_8_6_fuses_each_add_with_a_convolution():
    layers = engine_layers("tensorrt-8.6.1-resnet50-int8.json")
    adds = [layer for layer in layers if any("quant_add" in node and node.endswith("/Add") for node in layer.onnx_nodes)]
    assert len(adds) == 16
    assert all(any(node.endswith("/Conv") for node in layer.onnx_nodes) for layer in adds)


# Recorded formats of enterprise TensorRT: nothing here ran on it. The files in tests/recorded were written for these tests,
# after the descriptions of the formats (keys, sentences, separators), for the graph that ``residual_graph`` makes.


def pair(name, tensor, scale, weight=False):
    zero = numpy_helper.from_array(np.zeros(np.shape(scale), np.int8), f"{name}.zero")
    scales = numpy_helper.from_array(np.asarray(scale, np.float32), f"{name}.scale")
    inputs, axis = [scales.name, zero.name], {"axis": 0} if weight else {}
    nodes = [
        helper.make_node("QuantizeLinear", [tensor, *inputs], [f"{name}.q"], f"{name}/QuantizeLinear", **axis),
        helper.make_node("DequantizeLinear", [f"{name}.q", *inputs], [f"{name}.dq"], f"{name}/DequantizeLinear", **axis),
    ]
    return nodes, [scales, zero], f"{name}.dq"


def quantized_product(op, shape):
    """``op`` on quantized data and weight; the node is called "product"."""
    weight = numpy_helper.from_array(np.ones(shape, np.float32), "w")
    nodes, constants, data = pair("in", "x", 0.1)
    more, scales, dequantized = pair("weight", "w", [0.1] * shape[0], weight=True)
    nodes += [*more, helper.make_node(op, [data, dequantized], ["y"], "product")]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "g",
        [value("x", TensorProto.FLOAT, [1, shape[1], 8, 8])],
        [value("y", TensorProto.FLOAT, [1, shape[0], None, None])],
        [weight, *constants, *scales],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def residual_graph(both):
    """conv1, relu, conv2 + x, relu, a linear layer; both inputs of the Add quantized, or the identity alone."""
    nodes, constants = [], []

    def quantize(name, tensor, scale=0.1, weight=False):
        more, scales, output = pair(name, tensor, scale, weight)
        nodes.extend(more)
        constants.extend(scales)
        return output

    def product(op, name, tensor, shape, **attributes):
        constants.append(numpy_helper.from_array(np.ones(shape, np.float32), f"{name}.weight"))
        weight = quantize(f"{name}.weight_quantizer", f"{name}.weight", [0.1] * shape[0], weight=True)
        nodes.append(helper.make_node(op, [tensor, weight], [f"{name}.out"], f"{name}/{op}", **attributes))
        return f"{name}.out"

    data = quantize("conv1.input_quantizer", "x")
    hidden = product("Conv", "conv1", data, (32, 32, 3, 3), pads=[1] * 4)
    nodes.append(helper.make_node("Relu", [hidden], ["relu.out"], "relu/Relu"))
    out = product("Conv", "conv2", quantize("conv2.input_quantizer", "relu.out"), (32, 32, 3, 3), pads=[1] * 4)
    nodes.append(helper.make_node("Add", [quantize("add.a_quantizer", out) if both else out, data], ["sum"], "add/Add"))
    nodes.append(helper.make_node("Relu", ["sum"], ["relu1.out"], "relu/Relu_1"))
    nodes.append(
        helper.make_node("GlobalAveragePool", [quantize("pool.input_quantizer", "relu1.out")], ["pool.out"], "pool/Pool")
    )
    nodes.append(helper.make_node("Flatten", ["pool.out"], ["flat"], "flatten/Flatten"))
    head = product("Gemm", "fc", quantize("fc.input_quantizer", "flat"), (10, 32), transB=1)
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "g", [value("x", TensorProto.FLOAT, [1, 32, 8, 8])], [value(head, TensorProto.FLOAT, [1, 10])], constants
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize("name", ["log_8.6.log", "inspector_8.6.json", "inspector_11.json"])
def test_recorded_residual_engine_is_int8_with_its_add_fused(name):
    found = inspect(RECORDED / name, onnx=residual_graph(both=False))
    assert found.coverage == (
        "2 of 2 quantized convs run in INT8, 1 of 1 quantized linears run in INT8, 1 of 1 Adds fused, "
        "1 of 1 poolings in INT8 or fused"
    )


@pytest.mark.parametrize("name", ["log_8.6.log", "inspector_8.6.json", "inspector_11.json"])
def test_recorded_conv_carries_its_nodes(name):
    layer = next(layer for layer in engine_layers(name) if "conv2/Conv" in layer.onnx_nodes and layer.is_mac)
    nodes = [node for node in layer.onnx_nodes if node.endswith(("Conv", "Add", "Relu", "Relu_1"))]
    assert nodes == ["conv2/Conv", "add/Add", "relu/Relu_1"]


@pytest.mark.parametrize(("name", "count"), [("log_8.6.log", 2), ("inspector_8.6.json", 2), ("inspector_11.json", 1)])
def test_recorded_reformats_are_counted(name, count):
    assert sum(layer.is_reformat for layer in engine_layers(name)) == count


def test_recorded_log_8_6_names_tactics():
    layer = next(layer for layer in engine_layers("log_8.6.log") if "conv1/Conv" in layer.onnx_nodes)
    assert layer.tactic == "sm80_xmma_fprop_implicit_gemm_i8i8_i8i32_f32_relu"


def test_recorded_add_of_its_own_tells_to_fuse_adds():
    found = inspect(RECORDED / "log_8.6_both.log", onnx=residual_graph(both=True))
    assert "0 of 1 Adds fused" in found.coverage
    assert "fuse_adds=True" in next(site.reason for site in found.sites if site.group == "add")


def test_recorded_quantized_conv_with_float_output_is_counted():
    found = inspect(RECORDED / "log_8.6_both.log")
    assert [layer.onnx_nodes[-1] for layer in found.float_outputs] == ["conv1/Conv"]


def test_recorded_region_hides_its_nodes():
    found = inspect(RECORDED / "log_8.6_region.log", onnx=residual_graph(both=False))
    site = next(site for site in found.sites if site.node == "fc/Gemm")
    assert site.state == "unknown"
    assert "inside a Myelin region, {ForeignNode[pool.input_quantizer/QuantizeLinear...fc/Gemm]}" in site.reason
    assert "0 of 1 quantized linears run in INT8 (1 unknown)" in found.coverage


def test_region_with_metadata_lists_its_nodes():
    entry = {
        "Name": "{ForeignNode[a...c]}",
        "LayerType": "Myelin",
        "Metadata": "[ONNX Layer: a]\x1e[ONNX Layer: b]\x1f[ONNX Layer: c]",
    }
    layer = read_json(json.dumps({"Layers": [entry]})).layers[0]
    assert layer.is_region
    assert layer.onnx_nodes == ("a", "b", "c")


def log_of_float_conv(tmp_path):
    text = (RECORDED / "log_8.6.log").read_text(encoding="utf-8")
    (tmp_path / "build.log").write_text(
        text.replace("conv2.input_quantizer.q (Int8[1,32:32", "conv2.input_quantizer.q (Half[1,32:8")
    )


def test_recorded_float_conv_names_what_reads_its_result_in_float(tmp_path):
    log_of_float_conv(tmp_path)
    model = residual_graph(both=False)
    model.graph.node.append(helper.make_node("Sub", ["conv2.out", "x"], ["difference"], "extra/Sub"))
    assert "extra/Sub reads its result in float" in reason(inspect(tmp_path / "build.log", onnx=model), "conv2/Conv")


def test_recorded_float_conv_behind_pairs_gets_its_size_and_type(tmp_path):
    log_of_float_conv(tmp_path)
    found = inspect(tmp_path / "build.log", onnx=residual_graph(both=False))
    why = "its kernel reads FP16 though the graph allows INT8: this GPU has no INT8 kernel of that size, or a slower one"
    assert reason(found, "conv2/Conv") == f"{why} (32 -> 32 channels, 3x3)"
    assert found.rules == json.loads(found.to_json())["rules"] == [{"match": "conv2", "quantize": False}]
    assert (
        "1 quantized layer runs in float here: for rules that leave them so, see Inspection.rules or qat inspect --rules"
        in str(found)
    )
    config = qat.QuantConfig(rules=found.rules)
    assert config.site("conv2").quantize is False
    assert config.site("conv1").quantize is None


def test_rules_name_their_layer_only():
    lost = InspectedNode("blocks.a[0]/Conv", "Conv", "conv", "float", 0, "no kernel")
    config = qat.QuantConfig(rules=Inspection((), (lost,)).rules)
    assert config.site("blocks.a[0]").quantize is False
    assert config.site("blocks.a0").quantize is None


def test_engine_that_lost_nothing_suggests_no_rules():
    assert inspect(RECORDED / "log_8.6.log", onnx=residual_graph(both=False)).rules == []
    # What is unknown is not left in float on suspicion.
    assert inspect(RECORDED / "log_8.6_region.log", onnx=residual_graph(both=False)).rules == []
    assert inspect(RECORDED / "log_8.6.log").rules == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no JSON"),
        ("[]", "has no 'Layers'"),
        ('{"Layers": []}', "has no 'Layers'"),
        ('{"Layers": ["conv1", "conv2"]}', "names alone"),
    ],
)
def test_layer_information_without_layers_is_refused(text, message):
    with pytest.raises(QATError, match=message):
        read_json(text)


@pytest.mark.parametrize(
    ("sentence", "dtype"),
    [
        ("Thirty-two wide channel vectorized row major Int8 format", "INT8"),
        ("Row major linear FP32", "FP32"),
        ("Channel major FP16 format where channel % 8 == 0", "FP16"),
        ("Row major linear BF16 format", "BF16"),
    ],
)
def test_format_sentences(sentence, dtype):
    entry = {"Name": "l", "LayerType": "NoOp", "Outputs": [{"Name": "t", "Format/Datatype": sentence}]}
    assert read_json(json.dumps({"Layers": [entry]})).layers[0].output_precision == dtype


def test_layers_without_types_are_refused():
    """What the inspector tells of open dimensions while it has no execution context."""
    entry = {"Name": "l", "LayerType": "NoOp", "Outputs": [{"Name": "t", "Format/Datatype": "N/A due to dynamic shapes"}]}
    with pytest.raises(QATError, match="tells no types"):
        read_json(json.dumps({"Layers": [entry]}))


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        (
            "conv.weight + /conv1/QuantizeLinear + node_conv2d + PWN(PWN(sig), mul)",
            ["conv.weight", "/conv1/QuantizeLinear", "node_conv2d", "sig", "mul"],
        ),
        ("left/Conv || right/Conv", ["left/Conv", "right/Conv"]),
        ("Reformatting CopyNode for Input Tensor 0 to conv1 + relu", []),
        ("conv + (Unnamed Layer* 3) [Shuffle]", ["conv"]),
        ("reshape_before_fc/Gemm + fc/Gemm", ["fc/Gemm"]),
        ("reshape_after_fc/Gemm", []),
        ("PWN(a + b)_2", ["a", "b"]),
    ],
)
def test_parts_of_names(name, parts):
    assert name_parts(name) == parts


def test_oldest_log_form_has_brackets_around_the_shape_only():
    line = "Layer(CaskConvolution): Conv_0 + PWN(Clip_3), Tactic: 12, a, b[Int8(1,3,8,8)], r[Half(1,8)] -> 395[Int8(1,32,4,4)]"
    layer = read_log(["Engine Layer Information:\n" + line]).layers[0]
    assert [tensor[:2] for tensor in (*layer.inputs, *layer.outputs)] == [("a, b", "INT8"), ("r", "FP16"), ("395", "INT8")]
    assert layer.onnx_nodes == ("Conv_0", "Clip_3")


def test_nodes_out_of_order_are_refused():
    """A cycle would be searched for ever."""
    nodes = [helper.make_node("Identity", [a], [b], a) for a, b in (("p", "q"), ("q", "p"))]
    model = helper.make_model(helper.make_graph(nodes, "g", [], []))
    with pytest.raises(QATError, match="p: the ONNX nodes are not in the order"):
        inspect(RECORDED / "log_8.6.log", onnx=model)
