"""verify: engines that agree, and engines that were made to disagree in one known layer.

No TensorRT here: the engines are ONNX Runtime sessions of the graph as it is, of a graph changed in one node, or of a graph
that onnxruntime's own converter made FP16.
"""

import json
import math
import subprocess
import sys
import warnings
from typing import NamedTuple

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from export_nets import images, tiny
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnxruntime.transformers.float16 import convert_float_to_float16

import qat
from qat.verify import verify
from qat.verify.reference import Reference


class Info(NamedTuple):
    name: str
    shape: tuple
    dtype: np.dtype


class Session:
    """An engine by another name."""

    def __init__(self, proto):
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        self.closed = False
        self.inputs, self.outputs = (
            [Info(v.name, tuple(d if isinstance(d, int) else -1 for d in v.shape), np.dtype(np.float32)) for v in values]
            for values in (self.session.get_inputs(), self.session.get_outputs())
        )

    def run(self, inputs):
        names = [info.name for info in self.outputs]
        return dict(zip(names, self.session.run(names, inputs), strict=True))

    def close(self):
        self.closed = True


def in_order(proto):
    """The converter appends its casts at the end."""
    known = {value.name for value in (*proto.graph.input, *proto.graph.initializer)} | {""}
    waiting, ordered = list(proto.graph.node), []
    while waiting:
        ready = [node for node in waiting if known.issuperset(node.input)]
        waiting = [node for node in waiting if not known.issuperset(node.input)]
        known.update(name for node in ready for name in node.output)
        ordered += ready
    del proto.graph.node[:]
    proto.graph.node.extend(ordered)
    return proto


def without_detours(proto):
    """Two neighbours in float32 pass float32 on; the converter casts to FP16 in between."""
    casts = {n.output[0]: n for n in proto.graph.node if n.op_type == "Cast" and n.attribute[0].i == TensorProto.FLOAT16}
    is_float = {n.output[0] for n in proto.graph.node if n.op_type != "Cast"}
    for node in proto.graph.node:
        if node.op_type == "Cast" and node.input[0] in casts and casts[node.input[0]].input[0] in is_float:
            node.input[0] = casts[node.input[0]].input[0]
    return proto


def halved(proto):
    """The graph in FP16, its Q/DQ in float32; by onnxruntime's converter."""
    with warnings.catch_warnings():
        # It says which constants it truncates.
        warnings.simplefilter("ignore")
        blocked = ["QuantizeLinear", "DequantizeLinear"]
        return in_order(convert_float_to_float16(proto, keep_io_types=True, op_block_list=blocked))


class Numpy:
    """An engine that really computes in FP16: ONNX Runtime has no FP16 kernels for CPUs and leaves the rounding out."""

    def __init__(self, proto):
        self.evaluator, self.closed = ReferenceEvaluator(proto), False
        self.inputs, self.outputs = (
            [Info(v.name, tuple(d.dim_value or -1 for d in v.type.tensor_type.shape.dim), np.dtype(np.float32)) for v in values]
            for values in (proto.graph.input, proto.graph.output)
        )

    def run(self, inputs):
        names = [info.name for info in self.outputs]
        with np.errstate(over="ignore", invalid="ignore"):
            return dict(zip(names, self.evaluator.run(names, inputs), strict=True))

    def close(self):
        self.closed = True


class Builder:
    """Like ``qat.tensorrt.build``: marks outputs, and computes in FP16 unless told not to."""

    def __init__(self, change=None, half=False, unmarked_only=False):
        self.change, self.half, self.unmarked_only = change, half, unmarked_only
        self.marked, self.engines = [], []

    def __call__(self, path, *, outputs=(), fp16=None, bf16=None, tf32=True):
        assert all(engine.closed for engine in self.engines), "two engines in GPU memory at once"
        proto = onnx.shape_inference.infer_shapes(onnx.load(path))
        if self.change and not (self.unmarked_only and outputs):
            self.change(proto.graph)
        proto.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs)
        if self.half and fp16 is not False:
            proto = halved(proto)
        self.marked.append(list(outputs))
        is_half = any(tensor.data_type == TensorProto.FLOAT16 for tensor in proto.graph.initializer)
        self.engines.append(Numpy(proto) if is_half else Session(proto))
        return self.engines[-1]

    def engine(self, path):
        """The engine that a user passes; not counted."""
        other = Builder(self.change, self.half)
        return other(path)


def scaled(name, factor):
    """A runtime whose node ``name`` gives ``factor`` times what it should."""

    def change(graph):
        i, node = next((i, node) for i, node in enumerate(graph.node) if node.name == name)
        output = node.output[0]
        node.output[0] = f"{output}/right"
        graph.initializer.append(numpy_helper.from_array(np.float32(factor), f"{output}/factor"))
        graph.node.insert(i + 1, helper.make_node("Mul", [node.output[0], f"{output}/factor"], [output], name=f"{name}/wrong"))

    return change


def graph_file(path, nodes, constants, shape=("N", 8), output="y", rank=2):
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, [None] * rank)],
        [numpy_helper.from_array(np.asarray(value, np.float32), name) for name, value in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9), str(path))
    return path


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module")
def path(model, tmp_path_factory):
    return qat.export_onnx(model, tmp_path_factory.mktemp("onnx") / "m.onnx", images(1))


@pytest.fixture(scope="module")
def names(path):
    """Nodes of the exported graph by operator."""
    found = {}
    for node in onnx.load(path).graph.node:
        found.setdefault(node.op_type, []).append(node.name)
    return found


def chain(tmp_path, length, wrong=None, seed=0):
    """A float graph of alternating products and ReLUs."""
    generator = np.random.default_rng(seed)
    nodes, constants, x = [], {}, "x"
    for i in range(length // 2):
        constants[f"w{i}"] = generator.normal(0, 0.5, (8, 8))
        y = "y" if i == length // 2 - 1 else f"r{i}"
        nodes += [helper.make_node("MatMul", [x, f"w{i}"], [f"m{i}"], name=f"matmul{i}")]
        nodes += [helper.make_node("Relu" if y != "y" else "Neg", [f"m{i}"], [y], name=f"relu{i}")]
        x = y
    return graph_file(tmp_path / "chain.onnx", nodes, constants)


def features(n=16, seed=1):
    return np.random.default_rng(seed).normal(size=(n, 8)).astype(np.float32)


# -- engines that agree ------------------------------------------------------------------------------------------------


def test_equal_sides_are_ok(model, path):
    report = verify(model, path, Builder().engine(path), images(4), build=Builder())
    assert report.ok
    assert report.exit_status == 0
    assert report.departure is None
    assert report.outputs[0].engine.top1 == report.outputs[0].end_to_end.top1 == 1.0


def test_an_fp16_engine_of_a_healthy_graph_is_ok(model, path):
    builder = Builder(half=True)
    report = verify(model, path, builder.engine(path), images(4), build=builder)
    assert report.outputs[0].engine.max_abs > 0
    assert report.ok


def test_rounding_to_fp16_explains_nothing_where_it_is_ruled_out(path):
    engine = Builder(half=True).engine(path)
    checked = {fp16: verify(None, path, engine, images(4), fp16=fp16, tolerance=0, locate=False) for fp16 in (True, False)}
    assert checked[False].outputs[0].limit > checked[True].outputs[0].limit
    assert checked[False].outputs[0].limit == checked[True].outputs[0].limit_fp32


def test_engine_error_is_that_of_numpy(path):
    engine = Builder(half=True).engine(path)
    found = verify(None, path, engine, images(4)).outputs[0].engine
    x = images(4).numpy()
    name = engine.inputs[0].name
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    expected = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]).run(None, {name: x})[0]
    noise = engine.run({name: x})["output"].astype(np.float64) - expected
    assert found.max_abs == pytest.approx(np.abs(noise).max())
    assert found.max_rel == pytest.approx(np.abs(noise).max() / np.abs(expected).max())
    assert found.sqnr == pytest.approx(10 * np.log10((expected.astype(np.float64) ** 2).sum() / (noise**2).sum()))


def test_without_an_engine_it_is_parity(model, path):
    report = verify(model, path, None, images(4))
    parity = qat.parity(model, path, images(4)).outputs[0]
    assert report.ok
    assert report.outputs[0].engine is None
    assert report.outputs[0].onnx == parity.onnx
    assert report.outputs[0].drift == parity.drift


def test_without_a_model_inputs_may_be_arrays_by_name(path):
    report = verify(None, path, Builder().engine(path), {"images": images(4).numpy()})
    assert report.ok
    assert report.outputs[0].onnx is None


def test_torch_is_not_needed_to_compare_with_an_engine(tmp_path):
    file = chain(tmp_path, 4)
    code = f"""
import sys
sys.modules["torch"] = None  # what an import finds on a machine without it
import numpy as np, onnxruntime
from collections import namedtuple
from qat.verify import verify
from qat.verify.reference import Reference
Info = namedtuple("Info", "name")
class Engine:
    session = onnxruntime.InferenceSession({str(file)!r}, providers=["CPUExecutionProvider"])
    inputs, outputs = [Info("x")], [Info("y")]
    def run(self, inputs):
        return dict(y=self.session.run(None, inputs)[0])
print(verify(None, {str(file)!r}, Engine(), np.ones((2, 8), np.float32)).ok)
"""
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout == "True\n"


# -- where they part ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("op", "index"), [("Conv", 0), ("Conv", 3), ("Conv", 5), ("Relu", 2), ("Add", 1), ("Gemm", 0)])
def test_the_changed_layer_is_named(path, names, op, index):
    wrong = names[op][index]
    builder = Builder(scaled(wrong, 1.5))
    report = verify(None, path, builder.engine(path), images(4), build=builder)
    assert not report.ok
    assert report.departure.cause == "runtime"
    assert report.departure.layer == wrong
    assert report.departure.tensor.op == op
    assert not any(check.departs for check in report.departure.before)
    assert report.departure.builds == len(builder.marked)


def test_a_wrong_site_is_named_by_its_codes(path):
    site = "block2.conv2.input_quantizer"
    name = next(n.name for n in onnx.load(path).graph.node if n.op_type == "DequantizeLinear" and n.name.startswith(site))
    builder = Builder(scaled(name, 1.3))
    departure = verify(None, path, builder.engine(path), images(4), build=builder).departure
    assert departure.layer == name
    # 1.3 times a code is another one wherever the code is at least 2.
    assert departure.tensor.codes_differing > 0.3
    assert departure.tensor.codes_max_difference > 10


def test_a_runtime_that_cannot_return_qdq_results_still_names_the_layer(path, names):
    """As TensorRT 8.6: an internal error of the builder."""

    class Refusing(Builder):
        def __call__(self, path, *, outputs=(), **options):
            if any(name.endswith("_quantizer/output") for name in outputs):
                raise qat.QATError("could not build the engine")
            return super().__call__(path, outputs=outputs, **options)

    wrong = names["Conv"][3]
    builder = Refusing(scaled(wrong, 1.5))
    departure = verify(None, path, builder.engine(path), images(4), build=builder).departure
    assert departure.layer == wrong
    assert "left out of the search, since with them: could not build the engine" in departure.detail


@pytest.mark.parametrize("wrong", ["matmul0", "relu17", "matmul31", "matmul63"])
def test_builds_are_logarithmic(tmp_path, wrong):
    file = chain(tmp_path, 128)
    builder = Builder(scaled(wrong, 1.5))
    departure = verify(None, file, builder.engine(file), features(), build=builder).departure
    assert departure.layer == wrong
    # One as it is, one in FP32, then halving; a few tensors are marked at once at the end.
    assert len(builder.marked) <= 2 + math.ceil(math.log2(128))
    assert max(map(len, builder.marked)) < 16


def test_of_two_branches_the_wrong_one_is_named(tmp_path):
    """Far in the topological order from the node that reads it."""
    constants = {f"{b}{i}": np.eye(8) * 1.1 for b in "ab" for i in range(20)}
    nodes = [
        helper.make_node("MatMul", [f"{b}m{i - 1}" if i else "x", f"{b}{i}"], [f"{b}m{i}"], name=f"{b}_{i}")
        for b in "ab"
        for i in range(20)
    ]
    nodes.append(helper.make_node("Add", ["am19", "bm19"], ["y"], name="add"))
    file = graph_file(tmp_path / "m.onnx", nodes, constants)
    builder = Builder(scaled("a_7", 1.5))
    departure = verify(None, file, builder.engine(file), features(), build=builder).departure
    assert departure.layer == "a_7"
    assert [check.node for check in departure.before] == ["a_6"]


def test_a_fusion_that_marking_prevents_is_called_that(path, names):
    builder = Builder(scaled(names["Conv"][2], 1.5), unmarked_only=True)
    departure = verify(None, path, builder.engine(path), images(4), build=builder).departure
    assert departure.cause == "fusion"
    assert "vanishes once" in departure.detail


def test_an_engine_of_older_weights_is_told_from_a_wrong_runtime(path, names):
    builder = Builder()
    stale = Builder(scaled(names["Conv"][2], 1.5)).engine(path)
    departure = verify(None, path, stale, images(4), build=builder).departure
    assert departure.cause == "engine"
    assert departure.remedies == ("build the engine anew",)
    assert builder.marked == [[]]


def test_a_file_that_differs_from_the_model_is_the_exports_fault(model, path, tmp_path):
    proto = onnx.load(path)
    weight = next(n for n in proto.graph.node if n.name == "block2.conv1.weight_quantizer/QuantizeLinear").input[0]
    tensor = next(t for t in proto.graph.initializer if t.name == weight)
    tensor.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(tensor), tensor.name))
    onnx.save(proto, str(tmp_path / "m.onnx"))
    builder = Builder()
    report = verify(model, tmp_path / "m.onnx", builder.engine(tmp_path / "m.onnx"), images(4), build=builder)
    assert not report.outputs[0].onnx_ok
    assert report.outputs[0].engine_ok
    assert (report.departure.cause, report.departure.layer) == ("export", "block2.conv1.weight_quantizer")
    assert builder.marked == []


def test_nothing_is_built_unless_asked(path, names):
    builder = Builder(scaled(names["Conv"][2], 1.5))
    report = verify(None, path, builder.engine(path), images(4), build=builder, locate=False)
    assert not report.ok
    assert report.departure is None
    assert builder.marked == []


def test_a_builder_that_fails_does_not_cost_the_report(path, names):
    def build(path, **options):
        raise qat.QATError("out of memory")

    report = verify(None, path, Builder(scaled(names["Conv"][2], 1.5)).engine(path), images(4), build=build)
    assert report.departure.cause == "unknown"
    assert "out of memory" in report.departure.detail
    assert report.outputs[0].engine.max_rel > 0.01


# -- FP16 --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def overflowing(tmp_path):
    """300 * 300 is more than 65504; the root brings it back."""
    nodes = [
        helper.make_node("Abs", ["x"], ["a"], name="abs"),
        helper.make_node("Mul", ["a", "large"], ["b"], name="large"),
        helper.make_node("Mul", ["b", "b"], ["c"], name="square"),
        helper.make_node("Sqrt", ["c"], ["d"], name="root"),
        helper.make_node("Mul", ["d", "small"], ["y"], name="small"),
    ]
    return graph_file(tmp_path / "m.onnx", nodes, {"large": 400.0, "small": 1 / 400})


@pytest.fixture
def cancelling(tmp_path):
    """At 2048 FP16 counts in steps of 2: adding it and taking it away again rounds the small values away."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], name="product"),
        helper.make_node("Add", ["a", "offset"], ["b"], name="add"),
        helper.make_node("Sub", ["b", "offset"], ["c"], name="subtract"),
        helper.make_node("MatMul", ["c", "w"], ["y"], name="last"),
    ]
    return graph_file(tmp_path / "m.onnx", nodes, {"w": np.eye(8) * 2, "offset": 3000.0})


def test_overflow_is_fp16s(overflowing):
    builder = Builder(half=True)
    report = verify(None, overflowing, builder.engine(overflowing), features() + 2, build=builder)
    assert not report.ok
    assert report.outputs[0].non_finite > 0
    assert (report.departure.cause, report.departure.layer) == ("fp16", "square")
    assert report.departure.tensor.non_finite > 0
    assert any("fp32_layers" in remedy for remedy in report.departure.remedies)


def test_lost_precision_is_fp16s(cancelling):
    builder = Builder(half=True)
    report = verify(None, cancelling, builder.engine(cancelling), features(), build=builder)
    assert (report.departure.cause, report.departure.layer) == ("fp16", "subtract")
    assert report.departure.fp32_layers[0] == "add"


@pytest.mark.parametrize("fixture", ["overflowing", "cancelling"])
def test_the_named_layers_in_fp32_cure_it(fixture, request):
    file = request.getfixturevalue(fixture)
    x = features() + 2
    builder = Builder(half=True)
    layers = verify(None, file, builder.engine(file), x, build=builder).departure.fp32_layers
    proto = onnx.shape_inference.infer_shapes(onnx.load(file))
    assert 0 < len(layers) < len(proto.graph.node)
    cured = in_order(convert_float_to_float16(proto, keep_io_types=True, node_block_list=list(layers)))
    cured = without_detours(cured)
    assert verify(None, file, Numpy(cured), x, locate=False).ok


def test_a_layer_wrong_in_every_precision_is_not_fp16s(cancelling):
    builder = Builder(scaled("product", 1.5), half=True)
    departure = verify(None, cancelling, builder.engine(cancelling), features(), build=builder).departure
    assert (departure.cause, departure.layer) == ("runtime", "product")
    assert departure.fp32_layers == ()


def test_an_fp16_file_is_compared_with_its_fp32_twin(cancelling, tmp_path):
    half = tmp_path / "half.onnx"
    onnx.save(halved(onnx.load(cancelling)), str(half))
    builder = Builder()
    report = verify(None, half, builder.engine(half), features(), fp32_onnx=cancelling, build=builder)
    assert (report.departure.cause, report.departure.layer) == ("fp16", "subtract")


def test_an_fp16_file_alone_is_its_own_reference(path, tmp_path):
    """ONNX Runtime with and without its graph optimizations: FP16 sums in other orders."""
    half = tmp_path / "half.onnx"
    onnx.save(halved(onnx.load(path)), str(half))
    assert verify(None, half, Builder().engine(half), images(4)).ok


# -- the yardsticks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 4])
def test_reversed_sums_are_the_same_sums(tmp_path, groups):
    generator = np.random.default_rng(0)
    weight = generator.normal(size=(8, 64 // groups, 3, 3))
    nodes = [helper.make_node("Conv", ["x", "w"], ["y"], name="conv", group=groups)]
    graph = Reference(graph_file(tmp_path / "m.onnx", nodes, {"w": weight}, shape=("N", 64, 9, 9), rank=4))
    feeds = {"x": generator.normal(size=(2, 64, 9, 9)).astype(np.float32)}
    expected, found = graph.run(feeds)["y"], graph.run_reversed(feeds)["y"]
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert not np.array_equal(found, expected)


def test_rounding_to_half_is_numpys(tmp_path):
    nodes = [helper.make_node("Mul", ["x", "c"], ["y"], name="mul")]
    graph = Reference(graph_file(tmp_path / "m.onnx", nodes, {"c": 1.2345678}))
    x = features()
    exact = x.astype(np.float16).astype(np.float32) * np.float32(np.float16(1.2345678))
    np.testing.assert_array_equal(graph.run_rounded({"x": x}, half=True)["y"], exact.astype(np.float16).astype(np.float32))


def test_rounding_to_fewer_bits_is_to_the_nearest(tmp_path):
    nodes = [helper.make_node("Neg", ["x"], ["y"], name="neg")]
    graph = Reference(graph_file(tmp_path / "m.onnx", nodes, {}))
    x = features()
    mantissa, exponent = np.frexp(-x.astype(np.float64))
    np.testing.assert_array_equal(
        graph.run_rounded({"x": x}, half=False)["y"], np.ldexp(np.rint(mantissa * 2**14), exponent - 14)
    )


def test_without_qdq_it_is_the_float_model(path):
    model = qat.restore(tiny())
    with torch.no_grad():
        expected = model(images(2)).numpy()
    graph = Reference(path)
    np.testing.assert_allclose(graph.run_unquantized({"images": images(2).numpy()})["output"], expected, atol=1e-5)


# -- over a data set ---------------------------------------------------------------------------------------------------


def test_agreement_counts_samples(model, path):
    batches = [(images(n, seed=n), torch.zeros(n)) for n in (4, 3, 2)]
    report = verify(model, path, Builder().engine(path), images(4), data=batches)
    assert {a.pair: a.samples for a in report.agreement} == dict.fromkeys(
        ("ONNX Runtime - PyTorch", "engine - ONNX Runtime", "engine - PyTorch"), 9
    )
    assert all(a.equal == 1.0 for a in report.agreement)


def test_agreement_is_counted_by_hand(tmp_path):
    """The engine swaps the classes of the negative half."""
    file = graph_file(tmp_path / "m.onnx", [helper.make_node("Neg", ["x"], ["y"], name="neg")], {})

    class Swapping(Session):
        def run(self, inputs):
            y = super().run(inputs)["y"]
            return {"y": np.where(inputs["x"][:, :1] < 0, y[:, ::-1], y)}

    x = features(50)
    report = verify(None, file, Swapping(onnx.load(file)), x, data=[x[:30], x[30:]], locate=False, min_top1=0.99)
    assert report.agreement[0].equal == (x[:, 0] >= 0).mean()
    assert not report.ok


def test_max_batches_ends_an_endless_loader(path):
    def endless():
        while True:
            yield images(2)

    report = verify(None, path, Builder().engine(path), images(2), data=endless(), max_batches=3)
    assert report.agreement[0].samples == 6


# -- the report --------------------------------------------------------------------------------------------------------


def test_report_prints_its_findings(cancelling):
    builder = Builder(half=True)
    text = str(verify(None, cancelling, builder.engine(cancelling), features(), build=builder, data=[features()]))
    for word in (
        "engine - ONNX Runtime",
        "DIFFERENT",
        "drift",
        "FP16",
        "subtract (Sub)",
        "before it: add",
        "Try: keep",
        "Top-1",
    ):
        assert word in text


def test_json_is_strict(overflowing):
    builder = Builder(half=True)
    report = verify(None, overflowing, builder.engine(overflowing), features() + 2, build=builder)
    loaded = json.loads(report.to_json(), parse_constant=lambda name: pytest.fail(name))
    assert loaded["ok"] is False
    assert loaded["departure"]["layer"] == "square"
    assert loaded["outputs"][0]["engine"]["max_rel"] is None


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_nothing_to_compare(path):
    with pytest.raises(qat.QATError, match="model=None and engine=None"):
        verify(None, path, None, images(1))


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(qat.QATError, match=r"no such file\. Run qat\.export_onnx"):
        verify(None, tmp_path / "none.onnx", Builder(), images(1))
    (tmp_path / "m.onnx").write_bytes(b"no graph")
    with pytest.raises(qat.QATError, match="not an ONNX file"):
        verify(None, tmp_path / "m.onnx", Builder(), images(1))


def test_external_data_outside_the_folder_is_not_read(tmp_path):
    """A file from anywhere must not make the comparison read others."""
    folder = tmp_path / "model"
    folder.mkdir()
    proto = onnx.load(chain(tmp_path, 4))
    onnx.save(proto, str(folder / "m.onnx"), save_as_external_data=True, location="m.data", size_threshold=0)
    proto = onnx.load(str(folder / "m.onnx"), load_external_data=False)
    (folder / "m.data").rename(tmp_path / "m.data")
    for tensor in proto.graph.initializer:
        tensor.external_data[0].value = "../m.data"
    onnx.save(proto, str(folder / "m.onnx"))
    with pytest.raises(qat.QATError, match="outside the model's folder"):
        verify(None, folder / "m.onnx", Builder(), features())


def test_inputs_that_do_not_fit(path):
    engine = Builder().engine(path)
    with pytest.raises(qat.QATError, match=r"inputs: images has shape \[2, 3, 20, 20\], the ONNX file wants"):
        verify(None, path, engine, images(2, size=20))
    with pytest.raises(qat.QATError, match=r"inputs: 2 arrays, the ONNX file has 1 inputs: \['images'\]"):
        verify(None, path, engine, (images(2), images(2)))
    with pytest.raises(qat.QATError, match="inputs: images is int64, the ONNX file wants float32"):
        verify(None, path, engine, np.ones((2, 3, 16, 16), np.int64))


def test_an_engine_of_another_file(path, tmp_path):
    other = chain(tmp_path, 4)
    with pytest.raises(qat.QATError, match=r"engine: built from another file\? It has the inputs \['x'\]"):
        verify(None, path, Builder().engine(other), images(1))


def test_an_engine_with_a_fixed_batch(path):
    engine = Builder().engine(path)
    engine.inputs = [Info("images", (8, 3, 16, 16), np.dtype(np.float32))]
    with pytest.raises(qat.QATError, match=r"inputs: images has shape \[4, 3, 16, 16\], the engine wants \[8, 3, 16, 16\]"):
        verify(None, path, engine, images(4))


def test_an_engine_whose_outputs_have_another_shape(path):
    class Flat(Session):
        def run(self, inputs):
            return {name: value.ravel() for name, value in super().run(inputs).items()}

    with pytest.raises(qat.QATError, match=r"output: shape \[40\] from the engine, \[4, 10\] from ONNX Runtime"):
        verify(None, path, Flat(onnx.load(path)), images(4))


def test_nan_in_the_inputs_is_told(path):
    """QuantizeLinear would make a code of it."""
    x = images(2)
    x[0, 0, 0, 0] = torch.nan
    with pytest.raises(qat.QATError, match="inputs: images holds 1 NaN"):
        verify(None, path, Builder().engine(path), x)


def test_nan_in_the_reference_is_told(tmp_path):
    file = graph_file(tmp_path / "m.onnx", [helper.make_node("Sqrt", ["x"], ["y"], name="root")], {})
    x = -np.ones((2, 8), np.float32)
    with pytest.raises(qat.QATError, match="y: 16 NaN from ONNX Runtime"):
        verify(None, file, Builder().engine(file), x)


def test_nan_in_the_engine_is_counted_and_located(tmp_path):
    file = chain(tmp_path, 12)
    builder = Builder(scaled("relu3", np.nan))
    report = verify(None, file, builder.engine(file), features(), build=builder)
    assert report.outputs[0].non_finite == 16 * 8
    assert report.departure.layer == "relu3"
    assert "128 NaN or infinite values" in str(report)


def test_data_without_batches_or_classes(path, tmp_path):
    engine = Builder().engine(path)
    with pytest.raises(qat.QATError, match="data: no batch in it"):
        verify(None, path, engine, images(2), data=[])
    nodes = [helper.make_node("Neg", ["x"], ["y"], name="neg")]
    maps = graph_file(tmp_path / "m.onnx", nodes, {}, shape=("N", 3, 4, 4), rank=4)
    x = np.ones((2, 3, 4, 4), np.float32)
    with pytest.raises(qat.QATError, match=r"data: no output of shape \(N, classes\)"):
        verify(None, maps, Builder().engine(maps), x, data=[x])


def test_negative_tolerance(path):
    with pytest.raises(qat.QATError, match="tolerance=-1"):
        verify(None, path, Builder().engine(path), images(1), tolerance=-1)
