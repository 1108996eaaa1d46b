"""export_onnx: the graph it writes, the files it leaves, the errors it gives, the model it leaves alone."""

import collections
import copy
import json

import numpy as np
import onnx
import pytest
import torch
from export_nets import Recurrent, TinyResNet, TwoHeads, exporter, images, quantized, tiny
from onnx import TensorProto, numpy_helper
from ort import open_as_written
from torch import nn

import qat
from qat.core.quantizer import State, quantizers
from qat.export import BackboneAndHead
from qat.graph.opset import downgrade

# TinyResNet by hand. Weights: 6 convolutions. Activations: the inputs of stem, block1.conv1 (the identity shares it),
# block1.conv2, block2.conv1 (the downsampling shares it), block2.conv2: 5; the branch of block1's Add; both inputs of
# block2's Add; the pooling.
WEIGHT_PAIRS = 6
ACTIVATION_PAIRS = 5 + 1 + 2 + 1


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    return exporter(model, tmp_path_factory.mktemp("onnx"), images(1))


@pytest.fixture(scope="module")
def graph(exported):
    return onnx.load(exported()).graph


def ops(graph):
    return collections.Counter(node.op_type for node in graph.node)


def constants(graph):
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}


def qdq(graph):
    return [node for node in graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]


def run(path, x):
    session = open_as_written(path)
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})


def snapshot(model):
    """Everything an export could leave behind."""
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sites = {name: (site.state, site.observer, list(site._buffers)) for name, site in quantizers(model)}
    modules = {name: (module.training, dict(vars(module)).keys()) for name, module in model.named_modules()}
    fuse = {name: module.fuse for name, module in model.named_modules() if hasattr(module, "fuse")}
    return tensors, sites, modules, fuse


def assert_same(before, after):
    assert before[0].keys() == after[0].keys()
    assert all(torch.equal(before[0][name], after[0][name]) for name in before[0])
    assert before[1:] == after[1:]


# --- the graph -------------------------------------------------------------------------------------------------------


def test_pairs_as_counted_by_hand(graph):
    assert ops(graph)["QuantizeLinear"] == ops(graph)["DequantizeLinear"] == WEIGHT_PAIRS + ACTIVATION_PAIRS


def test_float_operators_are_those_of_the_model(graph):
    counted = ops(graph)
    assert (counted["Conv"], counted["BatchNormalization"], counted["Relu"], counted["Add"]) == (6, 5, 5, 2)
    assert counted["Identity"] == 0


def test_activation_scales_have_rank_0_and_no_axis(graph):
    stored = constants(graph)
    activations = [node for node in qdq(graph) if "weight_quantizer" not in node.name]
    assert len(activations) == 2 * ACTIVATION_PAIRS
    for node in activations:
        assert stored[node.input[1]].shape == ()
        assert not node.attribute


def test_weight_scales_are_per_output_channel(graph, model):
    stored = constants(graph)
    node = next(node for node in graph.node if node.name == "block2.conv1.weight_quantizer/QuantizeLinear")
    weight = model.block2.conv1.weight.detach().numpy()
    assert [(a.name, a.i) for a in node.attribute] == [("axis", 0)]
    np.testing.assert_array_equal(stored[node.input[0]], weight)
    np.testing.assert_array_equal(stored[node.input[1]], np.abs(weight).max((1, 2, 3)) / np.float32(127))


def test_zero_points_are_int8_zeros_and_scales_positive(graph):
    stored = constants(graph)
    for node in qdq(graph):
        assert stored[node.input[2]].dtype == np.int8
        assert not stored[node.input[2]].any()
        assert stored[node.input[2]].shape == stored[node.input[1]].shape
        assert stored[node.input[1]].dtype == np.float32
        assert (stored[node.input[1]] > 0).all()


def test_every_node_has_a_name_of_its_own(graph):
    names = [node.name for node in graph.node]
    assert all(names)
    assert len(set(names)) == len(names)
    assert {"stem.0.input_quantizer/QuantizeLinear", "block1.conv2/Conv", "block1.quant_add0/Add"} <= set(names)


def test_biases_and_head_have_no_pair(graph):
    outputs = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    for node in graph.node:
        if node.op_type in ("Conv", "Gemm"):
            assert node.op_type == "Conv" or not outputs.intersection(node.input)
            assert not outputs.intersection(node.input[2:])


def test_readers_of_one_tensor_share_one_pair(graph):
    readers = collections.Counter(node.input[0] for node in graph.node if node.op_type == "QuantizeLinear")
    assert set(readers.values()) == {1}
    shared = "block1.conv1.input_quantizer/output"
    assert sorted(node.op_type for node in graph.node if shared in node.input) == ["Add", "Conv"]


@pytest.mark.parametrize("opset", [17, 19])
def test_no_constant_is_unused(exported, opset):
    graph = onnx.load(exported(opset=opset)).graph
    read = {name for node in graph.node for name in node.input}
    assert {tensor.name for tensor in graph.initializer} <= read


def test_no_source_paths_in_the_file(exported):
    assert b".py" not in exported().read_bytes()


def test_site_called_twice_has_two_pairs_in_order(tmp_path):
    model = quantized(Recurrent(), images(2, channels=4))
    proto = onnx.load(qat.export_onnx(model, tmp_path / "m.onnx", images(2, channels=4)))
    sites = json.loads(next(entry.value for entry in proto.metadata_props if entry.key == "qat.sites"))
    assert sites["conv.input_quantizer"] == ["conv.input_quantizer/QuantizeLinear", "conv.input_quantizer.1/QuantizeLinear"]
    # The weight is one tensor with one scale: one pair, for both calls.
    assert sites["conv.weight_quantizer"] == ["conv.weight_quantizer/QuantizeLinear"] * 2
    first, second = (next(n for n in proto.graph.node if n.name == name) for name in sites["conv.input_quantizer"])
    assert first.input[0] == proto.graph.input[0].name
    assert second.input[0] != first.input[0]


def test_two_modules_with_one_weight_share_its_pair(tmp_path):
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))
    model[2].weight = model[0].weight
    quantized(model, images(2, channels=4))
    graph = onnx.load(qat.export_onnx(model, tmp_path / "m.onnx", images(2, channels=4))).graph
    assert len([n for n in qdq(graph) if "weight" in n.name and n.op_type == "QuantizeLinear"]) == 1


def test_weight_computed_by_the_forward_becomes_a_constant(tmp_path):
    class Standardized(nn.Conv2d):
        def forward(self, x):
            weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
            return nn.functional.conv2d(x, weight, self.bias, self.stride, self.padding)

    torch.manual_seed(0)
    model = quantized(nn.Sequential(Standardized(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1)), images(2))
    graph = onnx.load(qat.export_onnx(model, tmp_path / "m.onnx", images(2))).graph
    node = next(node for node in graph.node if node.name == "0.weight_quantizer/QuantizeLinear")
    weight = model[0].weight.detach().numpy()
    np.testing.assert_allclose(constants(graph)[node.input[0]], weight - weight.mean((1, 2, 3), keepdims=True), atol=1e-7)


def test_linear_weight_axis(tmp_path):
    model = quantized(
        nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(6, 8)
    )
    graph = onnx.load(qat.export_onnx(model, tmp_path / "m.onnx", torch.randn(6, 8))).graph
    gemm = next(node for node in graph.node if node.name == "0/Gemm")
    assert next(a.i for a in gemm.attribute if a.name == "transB") == 1
    node = next(node for node in graph.node if node.name == "0.weight_quantizer/DequantizeLinear")
    assert next(a.i for a in node.attribute if a.name == "axis") == 0


# --- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("opset", [17, 18, 23])
def test_opset_is_the_declared_one(exported, opset):
    path = exported(opset=opset)
    assert [(entry.domain, entry.version) for entry in onnx.load(path).opset_import] == [("", opset)]
    onnx.checker.check_model(str(path), full_check=True)


def test_opset_17_computes_the_same(exported):
    old, new = (run(exported(opset=opset), images(2))[0] for opset in (17, 23))
    np.testing.assert_array_equal(old, new)


class ClassToken(nn.Module):
    """Reads the batch size from a shape, as vision transformers do for their class token."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)
        self.token = nn.Parameter(torch.randn(1, 1, 4))

    def forward(self, x):
        y = self.conv(x).flatten(2).transpose(1, 2)
        return self.head(torch.cat([self.token.expand(y.shape[0], -1, -1), y], 1)[:, 0] + y.mean(1))


def test_opset_17_slices_whole_shapes(tmp_path):
    """TensorRT 8.6 ignores the start and end that Shape has since opset 15."""
    model = quantized(ClassToken(), images(2))
    path = qat.export_onnx(model, tmp_path / "m.onnx", images(2), opset=17)
    shapes = [node for node in onnx.load(path).graph.node if node.op_type == "Shape"]
    assert shapes
    assert not any(node.attribute for node in shapes)
    for batch in (1, 5):
        with torch.no_grad():
            np.testing.assert_allclose(run(path, images(batch))[0], model(images(batch)).numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ({}, [2, 3, 4, 5]),
        ({"start": 0}, [2, 3, 4, 5]),
        ({"end": 1}, [2]),
        ({"end": 99}, [2, 3, 4, 5]),
        ({"start": 1, "end": 3}, [3, 4]),
        ({"start": -1}, [5]),
        ({"start": -9, "end": -2}, [2, 3]),
        ({"start": 3, "end": 1}, []),
    ],
)
def test_a_slice_of_a_shape_is_what_shape_says(attributes, expected):
    node = onnx.helper.make_node("Shape", ["x"], ["y"], "shape", **attributes)
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [2, 3, 4, 5])
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.INT64, [len(expected)])
    opset = onnx.helper.make_opsetid("", 18)
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "g", [x], [y]), opset_imports=[opset])
    downgrade(model)
    onnx.checker.check_model(model, full_check=True)
    assert not any(node.attribute for node in model.graph.node)
    session = open_as_written(model.SerializeToString())
    assert session.run(None, {"x": np.zeros((2, 3, 4, 5), np.float32)})[0].tolist() == expected


def test_operator_without_an_opset_17_form_is_named(tmp_path):
    class Mish(nn.Sequential):
        def forward(self, x):
            return super().forward(nn.functional.mish(x))

    model = quantized(Mish(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)), images(2))
    ops_18 = ops(onnx.load(qat.export_onnx(model, tmp_path / "m.onnx", images(2), opset=18)).graph)
    if "Mish" not in ops_18:
        pytest.skip("this exporter writes mish without the operator Mish")
    with pytest.raises(qat.QATError, match=r"Mish.*opset 17 cannot express"):
        qat.export_onnx(model, tmp_path / "n.onnx", images(2), opset=17)
    assert not (tmp_path / "n.onnx").exists()


@pytest.mark.parametrize("batch", [1, 5])
def test_dynamic_batch_runs_at_other_sizes(model, exported, batch):
    path = exported()
    assert onnx.load(path).graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    with torch.no_grad():
        expected = model(images(batch, seed=3))
    # Two implementations round differently, and one code is about 1 % of the range.
    np.testing.assert_allclose(run(path, images(batch, seed=3))[0], expected.numpy(), atol=0.05 * expected.abs().max().item())


def test_static_batch_is_fixed(model, tmp_path):
    path = qat.export_onnx(model, tmp_path / "m.onnx", images(3), dynamic_batch=False)
    assert [d.dim_value for d in onnx.load(path).graph.input[0].type.tensor_type.shape.dim] == [3, 3, 16, 16]


def test_int8_weights_hold_the_codes_of_quantize_linear(model, exported):
    stored = constants(onnx.load(exported(int8_weights=True)).graph)
    weight = model.block1.conv1.weight.detach().numpy()
    scale = (np.abs(weight).max((1, 2, 3)) / np.float32(127)).reshape(-1, 1, 1, 1)
    codes = stored["block1.conv1.weight_quantizer/codes"]
    assert codes.dtype == np.int8
    np.testing.assert_array_equal(codes, np.clip(np.rint(weight / scale), -128, 127).astype(np.int8))


def test_int8_weights_compute_the_same(exported):
    as_float, as_int8 = (run(exported(int8_weights=flag), images(2))[0] for flag in (False, True))
    np.testing.assert_allclose(as_int8, as_float, rtol=1e-5, atol=1e-6)


def test_int8_weights_quarter_the_file(tmp_path):
    model = nn.Sequential(*(nn.Conv2d(128, 128, 3, bias=False) for _ in range(3)), nn.Conv2d(128, 2, 1))
    quantized(model, images(1, channels=128))
    sizes = [
        qat.export_onnx(model, tmp_path / f"{flag}.onnx", images(1, channels=128), int8_weights=flag).stat().st_size
        for flag in (True, False)
    ]
    assert sizes[0] / sizes[1] == pytest.approx(0.25, abs=0.02)


def test_external_data_computes_the_same(model, exported, tmp_path):
    inside, outside = exported(), qat.export_onnx(model, tmp_path / "b.onnx", images(2), external_data=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b.onnx", "b.onnx.data"]
    assert outside.stat().st_size < inside.stat().st_size
    np.testing.assert_array_equal(run(inside, images(2))[0], run(outside, images(2))[0])


def test_fuse_adds_leaves_out_the_convolution_fed_inputs_only(graph, exported):
    fused = onnx.load(exported(fuse_adds=True)).graph
    gone = {n.name for n in graph.node} - {n.name for n in fused.node}
    # block1: the branch. block2, where convolutions feed both: the longer branch.
    assert gone == {f"block{i}.quant_add0.a_quantizer/{op}" for i in (1, 2) for op in ("QuantizeLinear", "DequantizeLinear")}
    assert {n.name for n in fused.node} <= {n.name for n in graph.node}


def test_dict_output_names_the_graph_outputs(tmp_path):
    torch.manual_seed(0)
    model = quantized(TwoHeads(), images(2))
    path = qat.export_onnx(model, tmp_path / "m.onnx", images(2))
    with torch.no_grad():
        expected = model(images(2))
    session = open_as_written(path)
    assert [o.name for o in session.get_outputs()] == ["out", "aux.0", "aux.1"]
    found = session.run(["aux.0"], {"x": images(2).numpy()})[0]
    np.testing.assert_allclose(found, expected["aux"][0].detach().numpy(), atol=0.05)


def test_given_names_are_used(exported):
    graph = onnx.load(exported(input_names=["pixels"], output_names=["logits"])).graph
    assert ([v.name for v in graph.input], [v.name for v in graph.output]) == (["pixels"], ["logits"])


def test_keyword_inputs(model, tmp_path):
    path = qat.export_onnx(model, tmp_path / "m.onnx", {"images": images(2)})
    assert [v.name for v in onnx.load(path).graph.input] == ["images"]


def test_two_inputs_share_the_batch(tmp_path):
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, padding=1)
            self.head = nn.Conv2d(4, 2, 1)

        def forward(self, left, right, gain):
            return self.head(torch.relu(self.conv(left - right)) * gain)

    model = Pair()
    inputs = (images(2), images(2, seed=1), torch.ones(4, 1, 1))
    qat.prepare(model, example_inputs=inputs)
    qat.calibrate(model, lambda m: m(*inputs), progress=False)
    graph = onnx.load(qat.export_onnx(model, tmp_path / "m.onnx", inputs)).graph
    first = [v.type.tensor_type.shape.dim[0] for v in graph.input]
    assert [d.dim_param for d in first] == ["batch", "batch", ""]
    assert first[2].dim_value == 4


def test_backbone_and_head_exports_raw_outputs(tmp_path):
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.logits = nn.Conv2d(8, 4, 1)
            self.boxes = nn.Conv2d(8, 4, 1)

        def forward(self, features):
            return {"cls_logits": self.logits(features[0]), "bbox_regression": self.boxes(features[0])}

    model = quantized(BackboneAndHead(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)), Head()), images(2))
    graph = onnx.load(qat.export_onnx(model, tmp_path / "m.onnx", images(2))).graph
    assert [v.name for v in graph.output] == ["cls_logits", "bbox_regression"]
    assert any(node.name == "backbone.2.input_quantizer/QuantizeLinear" for node in graph.node)


# --- the model is left alone -----------------------------------------------------------------------------------------


def test_model_is_untouched(tmp_path):
    model = tiny().train()
    model.block1.bn1.eval()
    before = snapshot(model)
    qat.export_onnx(model, tmp_path / "m.onnx", images(2), fuse_adds=True)
    assert_same(before, snapshot(model))


def test_model_is_untouched_by_a_failure_in_the_exporter(tmp_path):
    class Untraceable(TinyResNet):
        def forward(self, images):
            return super().forward(images) * (1.0 if images.sum().item() > 0 else -1.0)

    torch.manual_seed(0)
    model = Untraceable()
    qat.prepare(model, qat.QuantConfig(head=("fc",)), example_inputs=(images(),))
    qat.calibrate(model, [images()], progress=False)
    before = snapshot(model)
    with pytest.raises(qat.QATError, match="cannot trace it"):
        qat.export_onnx(model, tmp_path / "m.onnx", images(2))
    assert_same(before, snapshot(model))
    assert list(tmp_path.iterdir()) == []


def test_model_is_untouched_by_a_wrong_example(tmp_path):
    model = tiny()
    before = snapshot(model)
    with pytest.raises(qat.QATError, match="example_inputs"):
        qat.export_onnx(model, tmp_path / "m.onnx", images(2, channels=5))
    assert_same(before, snapshot(model))


def test_sites_that_eval_mode_does_not_reach_need_no_range(tmp_path):
    class Auxiliary(TinyResNet):
        def __init__(self):
            super().__init__()
            self.aux = nn.Sequential(nn.Conv2d(32, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1))

        def forward(self, images):
            features = self.block2(self.block1(self.stem(images)))
            out = self.fc(torch.flatten(self.pool(features), 1))
            return (out, self.aux(features)) if self.training else out

    model = Auxiliary()
    qat.prepare(model, qat.QuantConfig(head=("fc",)), example_inputs=(images(),))
    qat.calibrate(model, [images()], progress=False)
    graph = onnx.load(qat.export_onnx(model, tmp_path / "m.onnx", images(2))).graph
    assert not [node for node in graph.node if node.name.startswith("aux")]


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argument", ["int8_weights", "fuse_adds", "half_scales"])
def test_arguments_about_quantization_need_a_prepared_model(tmp_path, argument):
    with pytest.raises(qat.QATError, match=rf"{argument}=True: is about quantized layers.*qat\.prepare"):
        qat.export_onnx(TinyResNet(), tmp_path / "m.onnx", images(1), precision="fp16", **{argument: True})
    assert list(tmp_path.iterdir()) == []


def test_not_calibrated_lists_the_sites(tmp_path):
    model = TinyResNet()
    qat.prepare(model)
    with pytest.raises(qat.QATError, match=r"block1\.conv2\.input_quantizer: no data seen(.|\n)*qat\.calibrate"):
        qat.export_onnx(model, tmp_path / "m.onnx", images(1))
    assert list(tmp_path.iterdir()) == []


def test_one_site_without_range(tmp_path):
    model = tiny()
    model.block2.conv2.input_quantizer.amax.zero_()
    with pytest.raises(qat.QATError, match=r"^block2\.conv2\.input_quantizer: no data seen[^\n]*\nRun qat\.calibrate"):
        qat.export_onnx(model, tmp_path / "m.onnx", images(1))


def test_one_site_switched_off(tmp_path):
    model = tiny()
    model.block2.conv2.input_quantizer.set_state(State.OFF)
    with pytest.raises(qat.QATError, match=r"^block2\.conv2\.input_quantizer: switched off"):
        qat.export_onnx(model, tmp_path / "m.onnx", images(1))


def test_int4_names_the_sites(tmp_path):
    model = tiny(rules=[{"match": "block1.conv1", "weight_format": "int4"}])
    with pytest.raises(qat.QATError, match=r"^block1\.conv1\.weight_quantizer: its number format"):
        qat.export_onnx(model, tmp_path / "m.onnx", images(1))


def test_half_precision_model(tmp_path):
    model = copy.deepcopy(tiny())
    model.fc.half()
    with pytest.raises(qat.QATError, match=r"fc\.weight: torch\.float16.*model\.float\(\)"):
        qat.export_onnx(model, tmp_path / "m.onnx", images(1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"opset": 16}, "opset=16: choose one from 17 to 24"),
        ({"opset": 17, "int8_weights": True}, "int8_weights=True needs opset"),
        ({"input_names": ["a", "b"]}, "input_names=.*pass 1 different names"),
        ({"output_names": ["images"]}, "'images' occurs twice"),
        ({"output_names": "logits"}, "output_names='logits'"),
    ],
)
def test_bad_arguments(model, tmp_path, arguments, message):
    with pytest.raises(qat.QATError, match=message):
        qat.export_onnx(model, tmp_path / "m.onnx", images(1), **arguments)
    assert list(tmp_path.iterdir()) == []


def test_example_without_tensor(model, tmp_path):
    with pytest.raises(qat.QATError, match="example_inputs: no tensor"):
        qat.export_onnx(model, tmp_path / "m.onnx", ())


def test_example_without_samples(model, tmp_path):
    with pytest.raises(qat.QATError, match="example_inputs: a batch without samples"):
        qat.export_onnx(model, tmp_path / "m.onnx", images(1)[:0])


def test_unwritable_paths(model, tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "missing" / "m.onnx", tmp_path / "file" / "m.onnx"):
        with pytest.raises(qat.QATError, match=r"cannot be written.*Choose a writable folder"):
            qat.export_onnx(model, path, images(1))
    with pytest.raises(qat.QATError, match="is a folder"):
        qat.export_onnx(model, tmp_path, images(1))
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_failed_export_keeps_the_old_file(model, tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(b"old")
    with pytest.raises(qat.QATError, match="example_inputs"):
        qat.export_onnx(model, path, images(1, channels=1))
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def test_fixed_batch_is_told(tmp_path):
    class Fixed(nn.Sequential):
        def forward(self, x):
            return super().forward(x).reshape(2, -1)

    model = quantized(Fixed(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)), images(2), head=("2",))
    with pytest.raises(qat.QATError, match="dynamic_batch=False"):
        qat.export_onnx(model, tmp_path / "open.onnx", images(2))
    assert qat.export_onnx(model, tmp_path / "fixed.onnx", images(2), dynamic_batch=False).exists()


def test_types_of_the_graph_are_float(graph):
    kinds = {v.type.tensor_type.elem_type for v in (*graph.input, *graph.output)}
    assert kinds == {TensorProto.FLOAT}


class Means(nn.Module):
    """A quantized global pooling beside means that are none."""

    def __init__(self):
        super().__init__()
        self.conv, self.other = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)
        self.pool, self.rows = nn.AdaptiveAvgPool2d(1), nn.AvgPool2d(2)

    def forward(self, x):
        y = self.other(self.conv(x))
        return self.pool(y), y.mean(1, keepdim=True), self.rows(y), y.mean((2, 3))


@pytest.mark.parametrize("opset", [17, 19])
def test_quantized_global_mean_is_a_pooling_and_other_means_stay(opset, tmp_path):
    model = Means().eval()
    qat.prepare(model, qat.QuantConfig(head=()))
    qat.calibrate(model, [images(2)], method="max", progress=False)
    path = qat.export_onnx(model, tmp_path / "means.onnx", images(2), opset=opset)
    graph = onnx.load(path).graph
    producer = {output: node.op_type for node in graph.node for output in node.output}
    pools = [node for node in graph.node if node.op_type == "GlobalAveragePool"]
    assert [producer[node.input[0]] for node in pools] == ["DequantizeLinear"]
    assert ops(graph)["ReduceMean"] == 2  # over channels; over the image, dropping the axes
    session = open_as_written(path)
    actual = session.run(None, {session.get_inputs()[0].name: images(2).numpy()})
    with torch.no_grad():
        expected = model(images(2))
    # The runtimes may put a value on a tie to different sides; at this width that is at most one code, in a mean of 36.
    tolerance = 2 * model.pool.input_quantizer.scale.item() / 36
    np.testing.assert_allclose(actual[0], expected[0].numpy(), atol=tolerance)
