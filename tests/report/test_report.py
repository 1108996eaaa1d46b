"""The HTML report: what it says, against numpy; that nothing gets into it or is loaded by it; and that a browser shows it."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections import OrderedDict
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from analysis_nets import made, states, unchanged
from prepare_nets import Block, Net, calibrated, conv, images
from torch import nn
from torch.nn import functional as F

import qat
from qat.cli import main
from qat.core.quantizer import State, WeightQuantizer, quantizers
from qat.errors import QATError
from qat.report import ResultTable, charts, write_report
from qat.report.blocks import joined, structure
from qat.report.findings import look_at
from qat.report.flow import record_calls
from qat.report.layout import PILL_HEIGHT, PILL_WIDTH, lay_out
from qat.tensorrt import Inspection, inspect
from qat.tensorrt.inspect import Site
from qat.tensorrt.layers import EngineLayer, LayerTensor

for package, extra in (("plotly", "report"), ("jinja2", "report"), ("sklearn", "recipes")):
    pytest.importorskip(package, reason=f"{package} is not installed (pip install -e '.[{extra}]')")

RECORDED = Path(__file__).parents[1] / "recorded"
HOSTILE = '<img src=x onerror="alert(1)"></script><script>alert(2)</script>{{ 7 * 7 }}%{y}&amp;'


class Page(HTMLParser):
    """Tables by name, as rows of text; elements with their attributes; the text of scripts, styles and titles."""

    VOID = ("meta", "link", "wbr", "path", "rect", "br")

    def __init__(self, path):
        super().__init__()
        self.tables, self.elements, self.texts = {}, [], {}
        self._table = self._cell = None
        self._open = []
        self.feed(Path(path).read_text(encoding="utf-8"))
        self.data = json.loads(next(text for text in self.texts["script"] if text.startswith('{"charts"')))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.elements.append((tag, attrs))
        if tag == "table":
            self._table = self.tables.setdefault(attrs["data-table"], [])
        elif tag == "tr" and self._table is not None:
            self._table.append([])
        elif tag in ("td", "th") and self._table is not None:
            self._table[-1].append("")
            self._cell = True
        if tag not in self.VOID:
            self._open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        while self._open and self._open.pop() != tag:
            pass
        if tag == "table":
            self._table = None
        elif tag in ("td", "th"):
            self._cell = None

    def handle_data(self, data):
        if self._open:
            self.texts[self._open[-1]][-1] += data
        if self._cell:
            self._table[-1][-1] += data

    def column(self, table, name):
        head, *rows = self.tables[table]
        return [row[head.index(name)] for row in rows]

    def row(self, table, first):
        head, *rows = self.tables[table]
        return next(dict(zip(head, row, strict=True)) for row in rows if first in row)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return calibrated(Net())


@pytest.fixture(scope="module")
def page(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("report") / "net.html"
    before = {name: 2 * tensor for name, tensor in model.state_dict().items()}
    results = {"float": {"top-1 %": 98.5, "MB": 1.08}, "QAT": {"top-1 %": "98.7 ± 0.3", "ms": None}}
    engine = inspect(RECORDED / "inspector_8.6.json")
    assert write_report(model, [images(), images(1)], out, results=results, baseline_state=before, inspection=engine) == out
    return Page(out)


def acting(model, kind):
    return [
        path for path, site in quantizers(model) if site.state is State.QUANTIZING and isinstance(site, WeightQuantizer) is kind
    ]


# What it says


@pytest.mark.parametrize("table", ["errors", "sensitivity"])
def test_every_quantized_layer_is_named_once(page, table):
    # By hand: the stem, two convolutions and the Add of the block, and the pooling. The head stays in float.
    layers = ["body.conv1", "body.conv2", "body.quant_add0", "pool", "stem"]
    assert sorted(page.column(table, "layer")) == layers


def test_every_site_is_named_once(model, page):
    assert sorted(page.column("activations", "site")) == sorted(acting(model, False))
    assert sorted(page.column("weights", "site")) == sorted(acting(model, True))


def test_every_site_is_in_the_drawing(model, page):
    text = "\n".join(page.texts["title"])
    for path, _ in quantizers(model):
        assert path in text


def quantized(x, amax):
    """By numpy; ``amax`` broadcasts."""
    scale = (amax / np.float32(127)).astype(np.float32)
    return np.clip(np.round(x / scale), -128, 127) * scale


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """Two quantized linear layers and a head: inputs, weights, ranges and the pages of both rankings."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    x = torch.randn(64, 6)
    qat.prepare(net)
    qat.calibrate(net, [x], method="percentile", percentile=98.0, progress=False)
    folder = tmp_path_factory.mktemp("dense")
    exact = Page(write_report(net, [x[:40], x[40:]], folder / "exact.html", exact=True))
    estimated = Page(write_report(net, [x[:40], x[40:]], folder / "estimated.html"))
    arrays = {name: tensor.numpy() for name, tensor in net.state_dict().items()}
    return x.numpy(), arrays, exact, estimated


def dense_forward(x, arrays, on):
    """Outputs of the layers, of which those in ``on`` are quantized."""
    outputs = {}
    for layer in ("0", "2", "4"):
        weight, bias = arrays[f"{layer}.weight"], arrays[f"{layer}.bias"]
        inputs = x
        if layer in on:
            weight = quantized(weight, np.abs(weight).max(1, keepdims=True))
            inputs = quantized(x, arrays[f"{layer}.input_quantizer.amax"])
        outputs[layer] = inputs @ weight.T + bias
        x = np.maximum(outputs[layer], 0)
    return outputs


def ratio(other, reference):
    return float(((other.astype(np.float64) - reference) ** 2).sum() / (reference.astype(np.float64) ** 2).sum())


@pytest.mark.parametrize("layer", ["0", "2"])
def test_errors_are_those_of_numpy(dense, layer):
    x, arrays, page, _ = dense
    reference, alone = dense_forward(x, arrays, ()), dense_forward(x, arrays, (layer,))
    every = dense_forward(x, arrays, ("0", "2"))
    row = page.row("errors", layer)
    # One decimal is printed.
    assert float(row["SQNR alone, dB"]) == pytest.approx(-10 * np.log10(ratio(alone[layer], reference[layer])), abs=0.051)
    wanted = -10 * np.log10(ratio(every[layer], reference[layer]))
    assert float(row["SQNR, all quantized, dB"]) == pytest.approx(wanted, abs=0.051)


@pytest.mark.parametrize("layer", ["0", "2"])
def test_exact_sensitivity_is_that_of_numpy(dense, layer):
    x, arrays, page, _ = dense
    # By batches, as the metric is defined: the mean of two.
    parts = (x[:40], x[40:])
    wanted = [ratio(dense_forward(part, arrays, (layer,))["4"], dense_forward(part, arrays, ())["4"]) for part in parts]
    assert float(page.row("sensitivity", layer)["relative error"]) == pytest.approx(np.mean(wanted), rel=1e-3)
    assert "Measured" in "".join(page.texts["p"])


def test_the_estimate_is_the_default_and_says_so(dense):
    assert "Estimated to first order" in "".join(dense[3].texts["p"])


@pytest.mark.parametrize("layer", ["0", "2"])
def test_ranges_and_clip_rates_are_those_of_numpy(dense, layer):
    x, arrays, page, _ = dense
    # Sites see the quantized model.
    seen = x if layer == "0" else np.maximum(dense_forward(x, arrays, ("0",))["0"], 0)
    amax = arrays[f"{layer}.input_quantizer.amax"]
    row = page.row("activations", f"{layer}.input_quantizer")
    code = np.round(seen / (amax / np.float32(127)))
    clipped = np.mean((code > 127) | (code < -128))
    assert clipped > 0
    assert row["clipped"] == f"{clipped:.4%}"
    assert float(row["maximum"]) == pytest.approx(np.abs(seen).max(), rel=1e-3)
    assert float(row["amax"]) == pytest.approx(float(amax), rel=1e-3)


@pytest.mark.parametrize("layer", [0, 2])
def test_weight_table_is_that_of_numpy(dense, layer):
    _, arrays, page, _ = dense
    weight = arrays[f"{layer}.weight"]
    channels = np.abs(weight).max(1)
    row = page.row("weights", f"{layer}.weight_quantizer")
    assert row["shape"] == "×".join(map(str, weight.shape))
    assert float(row["smallest amax"]) == pytest.approx(channels.min(), rel=1e-3)
    assert float(row["largest amax"]) == pytest.approx(channels.max(), rel=1e-3)
    assert float(row["SQNR, dB"]) == pytest.approx(
        -10 * np.log10(ratio(quantized(weight, channels[:, None]), weight)), abs=0.051
    )


@pytest.mark.parametrize(("kind", "index"), [("activations", 0), ("weights", 1)])
def test_histograms_are_those_of_numpy(dense, kind, index):
    x, arrays, page, _ = dense
    values = np.abs(x) if kind == "activations" else arrays["2.weight"]
    found = page.data["histograms"][kind][index]
    counts = found["counts"]
    edges = found["start"] + found["width"] * np.arange(len(counts) + 1)
    # The last edge is closed, and others may be off by rounding of the edges themselves.
    wanted = np.histogram(values, edges)[0]
    assert sum(counts) == values.size
    assert np.abs(wanted - counts).sum() <= 4


def test_changes_are_those_that_were_made(page):
    # Before, everything was twice as large.
    assert page.column("changed-weights", "weight") == ["stem.weight", "body.conv1.weight", "body.conv2.weight", "fc.weight"]
    assert set(page.column("changed-weights", "change, % of the norm")) == {"50.0"}
    assert set(page.column("changed-ranges", "largest ratio")) == {"0.5000"}
    assert len(page.column("changed-ranges", "site")) == 8


def test_results_are_shown_as_given(page):
    assert page.tables["results"] == [
        ["model", "top-1 %", "MB", "ms"],
        ["float", "98.5", "1.08", "–"],
        ["QAT", "98.7 ± 0.3", "–", "–"],
    ]


def test_engine_layers_are_counted_by_type(page):
    layers = json.loads((RECORDED / "inspector_8.6.json").read_text())["Layers"]
    assert len(page.column("engine", "kind")) == len(layers)
    assert page.column("engine", "computes in").count("INT8") > 0
    text = re.search(r"compute in: ([^.]*)\.", "".join(page.texts["p"])).group(1)
    assert sum(int(count) for count in re.findall(r"\d+(?= )", text)) == len(layers)


def test_nodes_that_lost_int8_are_told_and_no_others(model, tmp_path):
    layers = (EngineLayer("a", "CaskConvolution", (LayerTensor("x", "FP16"),), time_ms=0.25),)
    lost = Site("body.conv1/Conv", "Conv", "conv", "float", 0, "no kernel <b>")
    good = Site("body.conv2/Conv", "Conv", "conv", "int8", 0, None)
    page = Page(write_report(model, [images()], tmp_path / "r.html", inspection=Inspection(layers, (lost, good))))
    assert page.tables["sites"][1:] == [["body.conv1/Conv", "Conv", "float", "no kernel <b>"]]
    assert page.column("engine", "ms") == ["0.2500"]
    assert page.texts["b"].count("1 of 2 quantized convs run in INT8") == 1


def test_what_stays_in_float_is_told(tmp_path):
    net = Net()
    placement = qat.prepare(net)
    qat.calibrate(net, [images()], progress=False)
    page = Page(write_report(net, [images()], tmp_path / "r.html", placement=placement))
    assert page.column("left", "module") == ["fc"]


def test_several_tables_of_results(model, tmp_path):
    tables = [ResultTable({"a": {"ms": 1}}, "one"), ResultTable({"b": {"MB": 2.5}}, "two", "engine")]
    page = Page(write_report(model, [images()], tmp_path / "r.html", results=tables))
    assert page.tables["results"] == [["model", "ms"], ["a", "1"], ["engine", "MB"], ["b", "2.5"]]


def test_the_model_is_left_as_it_was(tmp_path):
    net = calibrated(Net()).train()
    before, random = states(net), torch.get_rng_state()
    write_report(net, [images()], tmp_path / "r.html")
    assert unchanged(net, before)
    assert torch.equal(torch.get_rng_state(), random)


# The drawing


class Repeating(nn.Module):
    """Five blocks, of which the fourth pools."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.blocks = nn.Sequential(Block(), Block(), Block(), Pooling(), Block())
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        return self.fc(self.blocks(F.relu(self.stem(x))).mean((2, 3)))


class Pooling(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.pool = conv(), nn.BatchNorm2d(4), nn.MaxPool2d(2)

    def forward(self, x):
        return self.pool(F.relu(self.norm(self.conv(x))))


def structure_of(net, x=None, config=None):
    x = images() if x is None else x
    qat.prepare(net.eval(), config, example_inputs=x)
    qat.calibrate(net, [x], method="max", progress=False)
    return structure(net, record_calls(net, x))


def test_blocks_that_look_alike_are_drawn_once():
    found = structure_of(Repeating())
    kinds = [(kind.block.name, joined([path for path in kind.paths if path])) for kind in found.kinds]
    assert kinds == [("Stem", ""), ("Block", "blocks.0–2, blocks.4"), ("Pooling", "blocks.3"), ("Head", "")]
    assert [number for number, _ in found.order] == [0, 1, 1, 1, 2, 1, 3]


def test_blocks_with_other_sites_are_drawn_apart():
    config = qat.QuantConfig(rules=[{"match": "blocks.1.conv2", "quantize": False}])
    found = structure_of(Repeating(), config=config)
    assert [kind.paths for kind in found.kinds if kind.block.name == "Block"][:2] == [
        ("blocks.0", "blocks.2", "blocks.4"),
        ("blocks.1",),
    ]


def test_data_flow_of_a_residual_block():
    block = next(kind.block for kind in structure_of(Repeating()).kinds if kind.block.name == "Block")
    first = "blocks.0.conv1.input_quantizer"
    # conv1, ReLU, conv2, Add, ReLU; the shortcut passes the site of conv1, which reads the same tensor.
    assert [node.call.text for node in block.nodes] == ["Conv 1×1", "ReLU", "Conv 1×1", "Add", "ReLU"]
    edges = [[(edge.source, edge.site) for edge in node.inputs] for node in block.nodes]
    assert edges[0] == [(-1, first)]
    assert edges[1:3] == [[(0, None)], [(1, "blocks.0.conv2.input_quantizer")]]
    assert edges[3] == [(2, "blocks.0.quant_add0.a_quantizer"), (-1, first)]
    assert edges[4] == [(3, None)]
    assert [node.is_output for node in block.nodes] == [False] * 4 + [True]


def test_a_resnet_is_stem_kinds_of_blocks_and_head():
    found = structure_of(torchvision.models.resnet18(num_classes=4), torch.randn(1, 3, 32, 32))
    assert [(kind.block.name, joined(kind.paths)) for kind in found.kinds] == [
        ("Stem", ""),
        ("BasicBlock", "layer1.0–1, layer2.1, layer3.1, layer4.1"),
        ("BasicBlock", "layer2.0, layer3.0, layer4.0"),
        ("Head", ""),
    ]


NETWORKS = {
    "mobilenet_v3_small": 32,
    "shufflenet_v2_x0_5": 32,
    **{name: pytest.param(name, size, marks=pytest.mark.slow) for name, size in {"vit_b_16": 224, "densenet121": 32}.items()},
    **{name: pytest.param(name, size, marks=pytest.mark.slow) for name, size in {"googlenet": 64, "swin_t": 32}.items()},
}


@pytest.mark.parametrize(("name", "size"), [(k, v) if isinstance(v, int) else v for k, v in NETWORKS.items()])
def test_nothing_overlaps_and_every_site_is_drawn(name, size):
    net = torchvision.models.get_model(name, weights=None)
    found = structure_of(net, torch.randn(1, 3, size, size))
    blocks = [kind.block for kind in found.kinds]
    for block in blocks:
        drawing = lay_out(block)
        boxes = [(box.x, box.y, box.width, box.height) for box in drawing.boxes]
        boxes += [(pill.x, pill.y, PILL_WIDTH, PILL_HEIGHT) for pill in drawing.pills]
        for i, (x, y, width, height) in enumerate(boxes):
            assert x >= 0
            assert x + width <= drawing.width
            assert y + height <= drawing.height
            for left, top, wide, high in boxes[:i]:
                assert x + width <= left or left + wide <= x or y + height <= top or top + high <= y
    # A site whose block is drawn is drawn; sites of blocks that look like it are not.
    drawn = {site for block in blocks for node in block.nodes for site in node.call.sites}
    paths = tuple(f"{block.path}." for block in blocks if block.path)
    missing = [
        path
        for path, site in quantizers(net)
        if site.state is State.QUANTIZING and path.startswith(paths) and path not in drawn
    ]
    assert not missing


def test_paths_in_short():
    assert joined(["a.1", "a.2", "a.4", "b", "a.5", "c1"]) == "a.1–2, a.4, b, a.5, c1"


# What may not get in, or out


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    torch.manual_seed(0)
    name = HOSTILE.replace(".", "")
    net = nn.Sequential(
        OrderedDict([("stem", nn.Conv2d(3, 4, 1)), (name, conv()), ("pool", nn.AdaptiveAvgPool2d(1)), ("last", conv())])
    )
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    out = tmp_path_factory.mktemp("hostile") / "r.html"
    results = {HOSTILE: {HOSTILE: HOSTILE}}
    calibrated(net)
    return write_report(
        net, [images()], out, title=HOSTILE, results=results, baseline_state=before, baseline_name=HOSTILE
    ), name


def test_hostile_names_are_text(hostile):
    path, name = hostile
    page = Page(path)
    counts = [tag for tag, _ in page.elements].count
    assert (counts("img"), counts("script")) == (0, 3)
    assert not [key for _, attrs in page.elements for key in attrs if key.startswith("on")]
    assert name in page.column("errors", "layer")
    assert page.texts["h1"] == [HOSTILE]
    assert page.tables["results"][1] == [HOSTILE, HOSTILE]
    # What Plotly gets: it reads tags, entities and %{...}.
    shown = json.dumps(page.data["charts"]["errors"]["data"][0]["customdata"])
    assert "&lt;img" in shown
    assert "<" not in shown
    assert "%{" not in shown


def test_only_the_page_s_own_scripts_may_run(page):
    policy = next(attrs["content"] for tag, attrs in page.elements if tag == "meta" and "http-equiv" in attrs)
    assert "default-src 'none'" in policy
    allowed = re.search("script-src (.*)", policy).group(1).split()
    scripts = [text for text in page.texts["script"] if not text.startswith('{"charts"')]
    assert allowed == [f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in scripts]


def test_nothing_is_loaded(page):
    loading = [attrs[key] for _, attrs in page.elements for key in ("src", "href", "srcset", "action", "data") if key in attrs]
    assert all(value.startswith("#") or value == "data:," for value in loading)
    style = "".join(page.texts["style"])
    assert "@import" not in style
    assert "url(" not in style


# Wrong inputs


@pytest.mark.parametrize(
    ("batches", "options", "message"),
    [
        ([], {}, "batches: is empty"),
        (torch.zeros(2, 3, 6, 6), {}, "pass an iterable of batches"),
        ([images()], {"results": {"float": 3}}, "results: must be rows"),
        ([images()], {"results": [3]}, "results: must be rows"),
        ([images()], {"results": 3}, "results: must be rows"),
        ([images()], {"baseline_state": {}}, "no range and no weight in common"),
    ],
)
def test_wrong_arguments_are_named_and_nothing_is_written(model, tmp_path, batches, options, message):
    (tmp_path / "r.html").write_text("before")
    with pytest.raises(QATError, match=message):
        write_report(model, batches, tmp_path / "r.html", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["r.html"]
    assert (tmp_path / "r.html").read_text() == "before"


def test_a_float_model_is_refused(tmp_path):
    with pytest.raises(QATError, match="no site quantizes"):
        write_report(Net(), [images()], tmp_path / "r.html")


def test_a_model_without_gradients_needs_exact_values(tmp_path):
    net = made("changed after it was read")
    with pytest.raises(QATError, match=r"in-?place.*exact=True"):
        write_report(net, [images()], tmp_path / "r.html")
    page = Page(write_report(net, [images()], tmp_path / "r.html", exact=True))
    assert sorted(page.column("sensitivity", "layer")) == ["inner", "last", "quant_add0", "stem"]


@pytest.mark.parametrize("name", ["", "missing/r.html"])
def test_a_path_that_cannot_be_written_is_refused_before_the_work(tmp_path, name):
    with pytest.raises(QATError, match="cannot be written"):
        write_report(None, None, tmp_path / name)


@pytest.mark.parametrize("package", ["jinja2", "plotly"])
def test_a_missing_package_is_named_with_the_remedy(model, tmp_path, monkeypatch, package):
    for name in [name for name in sys.modules if name.partition(".")[0] == package] + [package]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(QATError, match=rf"{package}: is not installed.*\[report\]"):
        write_report(model, [images()], tmp_path / "r.html")


def test_importing_the_stage_needs_neither_package():
    code = "import sys, qat.report; print({'jinja2', 'plotly', 'lightning', 'onnx'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "set()\n"


# From the shell


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module of the user's, in the current folder."""
    code = """
        import qat, torch
        from torch import nn

        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))

        def pair():
            torch.manual_seed(0)
            net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
            qat.prepare(net)
            qat.calibrate(net, [x], progress=False)
            return net, [x]

        def arguments():
            model, batches = pair()
            return {"model": model, "batches": batches, "results": {"PTQ": {"ms": 0.5}}}

        def alone():
            return pair()[0]

        def misnamed():
            return {"model": pair()[0], "batches": [x], "tilte": "x"}
    """
    import textwrap

    (tmp_path / "reported.py").write_text(textwrap.dedent(code))
    monkeypatch.chdir(tmp_path)
    yield "reported"
    sys.modules.pop("reported", None)


def test_report_of_a_function_s_model(own, capsys):
    assert main(["report", "--model", f"{own}:pair"]) == 0
    assert capsys.readouterr().out.startswith("report.html: ")
    page = Page("report.html")
    assert page.texts["h1"] == [f"{own}:pair"]
    assert page.column("errors", "layer") == ["0", "2"]


def test_report_of_a_function_s_arguments_and_an_engine(own, tmp_path):
    engine = str(RECORDED / "inspector_8.6.json")
    argv = ["report", "--model", f"{own}:arguments", "--out", "a.html", "--title", "Mine", "--exact", "--engine", engine]
    assert main(argv) == 0
    page = Page("a.html")
    assert page.texts["h1"] == ["Mine"]
    assert page.tables["results"][1] == ["PTQ", "0.5"]
    assert "engine" in page.tables
    assert "Measured" in "".join(page.texts["p"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--model reported:alone", "returned a Sequential; return (model, batches)"),
        ("--model reported:misnamed", "returned a dict of model, batches, tilte; return"),
        ("--model reported:nothing", "has no function 'nothing'"),
        ("--model reported:pair --images 3", "your function chooses the batches"),
        ("--model reported:pair --onnx m.onnx", "pass --engine, too"),
        ("--model reported:pair --engine no.plan", "--engine no.plan: no such file"),
        ("--model reported:pair --out no/r.html", "no folder no"),
        ("nowhere", "metrics.json: cannot be read: No such file or directory. Pass a folder that a recipe wrote"),
        ("damaged", "metrics.json: damaged"),
        ("other", "metrics.json: has no settings and results"),
        ("listed", "metrics.json: holds no settings"),
        ("several", "holds several runs. Pass one of them, such as several/seed3"),
        ("unknown", "unknown setting 'archh'"),
        ("empty", "qat.ckpt: no such file"),
        ("empty --images 0", "images=0: must be positive"),
    ],
)
def test_what_cannot_be_reported_is_one_line_and_2(own, tmp_path, capsys, argv, message):
    contents = {
        "damaged": "{",
        "other": '{"a": 1}',
        "listed": "[]",
        "several": '{"seeds": [3, 4], "results": {}}',
        "unknown": '{"settings": {"archh": "resnet20"}, "results": {}}',
        "empty": '{"settings": {}, "results": {}}',
    }
    for name, content in contents.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").write_text(content)
    assert main(["report", *argv.split()]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert message.lower() in captured.err.lower()
    assert not list(tmp_path.rglob("*.html"))


@pytest.mark.parametrize("argv", [["report"], ["report", "runs", "--model", "a:b"]])
def test_exactly_one_model_is_reported(capsys, argv):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2


# In a browser

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
needs_browser = pytest.mark.skipif(
    BROWSER is None, reason="needs Chromium or Chrome on the PATH (Debian: apt install chromium)"
)


def browse(page, tmp_path, *options):
    """What the browser prints and logs."""
    quiet = [
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--disable-quic",
    ]
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", *quiet, f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--enable-logging=stderr", "--virtual-time-budget=10000", "--window-size=1280,3000", "--hide-scrollbars"]
    result = subprocess.run([*command, *options, page.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    return result.stdout, [line for line in result.stderr.splitlines() if "CONSOLE" in line]


@needs_browser
def test_a_browser_draws_every_plot_without_an_error(hostile, tmp_path):
    dom, errors = browse(hostile[0], tmp_path, "--dump-dom")
    assert errors == []
    assert 'data-ready="yes"' in dom
    # Errors, sensitivity, changes, and two histograms.
    parts = re.split(r'<div class="chart', dom)[1:]
    assert len(parts) == 5
    for part in parts:
        assert 'class="main-svg"' in part
        assert part.count('class="point"') + part.count('class="points"') > 0
    # Names are shown as they are, and were not taken for elements.
    assert "<img" not in dom
    assert "&lt;img src=x" in dom


@needs_browser
def test_a_screenshot_shows_bars(hostile, tmp_path):
    from PIL import Image

    browse(hostile[0], tmp_path, f"--screenshot={tmp_path / 'page.png'}")
    pixels = np.asarray(Image.open(tmp_path / "page.png").convert("RGB")).reshape(-1, 3)
    assert pixels.shape == (1280 * 3000, 3)
    # The blue of the bars of convolutions, #1f6fb2, and dark text on light ground.
    assert (pixels == [0x1F, 0x6F, 0xB2]).all(1).sum() > 10_000
    assert (pixels.sum(1) > 700).mean() > 0.7
    assert (pixels.sum(1) < 200).mean() > 0.001


@needs_browser
def test_tables_sort_and_rows_choose_the_histogram(page, model, tmp_path):
    source = write_report(model, [images()], tmp_path / "r.html").read_text(encoding="utf-8")
    script = """
        const find = (selector) => document.querySelector(selector);
        const rows = () => [...document.querySelectorAll("[data-table=errors] tbody tr")];
        const layers = () => rows().map((row) => row.cells[0].textContent);
        find("[data-table=errors] thead th:nth-child(3)").click();
        document.body.dataset.rising = layers();
        find("[data-table=errors] thead th:nth-child(3)").click();
        document.body.dataset.falling = layers();
        find("[data-chooses=activations] tbody tr:nth-child(3)").click();
        document.body.dataset.chosen = find("[data-picks=activations]").selectedOptions[0].textContent;
        find("[data-for=activations][data-step='-1']").click();
        document.body.dataset.before = find("tr.chosen").dataset.index;
        const loaded = performance.getEntriesByType("resource").map((entry) => entry.name);
        document.body.dataset.loaded = loaded.filter((name) => !name.startsWith("data:"));
    """
    # The page's policy would not let the script run.
    source = re.sub('<meta http-equiv="Content-Security-Policy"[^>]*>', "", source)
    (tmp_path / "open.html").write_text(source.replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8")
    dom, errors = browse(tmp_path / "open.html", tmp_path, "--dump-dom")
    assert errors == []
    rows = Page(tmp_path / "r.html").tables["errors"][1:]
    shown = {
        name: re.search(f'data-{name}="([^"]*)"', dom).group(1) for name in ("rising", "falling", "chosen", "before", "loaded")
    }
    ranked = [row[0] for row in sorted(rows, key=lambda row: float(row[2]))]
    assert shown["rising"].split(",") == ranked
    assert shown["falling"].split(",") == ranked[::-1]
    assert shown["chosen"] == page.column("activations", "site")[2]
    assert shown["before"] == "1"
    # Although its policy does not hinder it here.
    assert shown["loaded"] == ""


@pytest.mark.parametrize(("wrapped", "prefix"), [(True, ""), (True, "module."), (False, "module.")])
def test_the_state_before_may_be_of_the_wrapped_model_or_of_the_one_in_it(model, tmp_path, wrapped, prefix):
    expected = look_at(model, [images()], baseline_state=model.state_dict()).changes
    before = {prefix + key: value.clone() for key, value in model.state_dict().items()}
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        given = nn.parallel.DistributedDataParallel(model) if wrapped else model
        found = look_at(given, [images()], baseline_state=before).changes
    finally:
        torch.distributed.destroy_process_group()
    assert expected.ranges
    assert found == expected


def test_a_weight_that_was_zero_before_has_the_largest_bar():
    before = {name: torch.full((2, 2), value) for name, value in (("same", 1.0), ("moved", 1.0), ("zero", 0.0))}
    after = {"same": before["same"], "moved": before["moved"] * 1.1, "zero": torch.ones(2, 2)}
    bars = charts.change_chart(qat.analysis.compare(before, after))["data"][0]["y"]
    assert bars == [0.0, pytest.approx(10, rel=1e-5), pytest.approx(10, rel=1e-5)]


def test_names_with_leading_zeros_are_not_joined():
    assert joined(["conv01", "conv02", "b007", "b9", "b10", "0", "1"]) == "conv01, conv02, b007, b9–10, 0–1"
