"""The notebooks run from their first cell, and what is saved in them is what they give."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="needs the notebooks extra: pip install -e '.[notebooks]'")
pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
QUICK = "01_quick_start"
MAX_BYTES = 400_000
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def load_runner():
    spec = importlib.util.spec_from_file_location("run_notebooks", ROOT / "notebooks" / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def saved(path):
    return nbformat.read(path, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def noise(notebook):
    """What was printed elsewhere than to the standard output: warnings, logs, progress bars."""
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    return [output.text for output in outputs if output.output_type == "stream" and output.name != "stdout"]


def results(notebook):
    """What the cell tagged ``results`` printed: one JSON object a line."""
    (cell,) = (cell for cell in code_cells(notebook) if "results" in cell.metadata.get("tags", ()))
    (output,) = cell.outputs
    found = {}
    for line in output.text.splitlines():
        found |= json.loads(line)
    return found


def leaves(value, path=()):
    """Every plain value of nested results, with the keys that lead to it."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, (*path, key))
    else:
        yield path, value


# Other processors add up in another order, so training ends elsewhere: two to three standard errors of 539 test images,
# more where INT8 has lost much and chance decides how much: on a processor without AVX-512, with PyTorch 2.14 instead of 2.15,
# the SQNR of notebook 03 was up to 3.1 dB and "seed 1" of 05 up to 19 points off, and both told the same story.
# Everything else must be what was saved.
TOLERANCES = {
    "01_quick_start": {"top1": 1.5, "size": 0.05},
    "02_where_int8_goes": {},
    "03_calibration_methods": {"ranges": 0.5, "output SQNR": 5.0, "top1": 12.0, "spoilt": 30.0},
    "04_measuring_latency": {"synchronized": 1.0},
    "05_debugging_accuracy": {"seed 1": 30.0, "mean": 8.0, "float": 1.5, "rank": 0.1},
}


def check_same(name, found, expected):
    assert dict(leaves(found)).keys() == dict(leaves(expected)).keys()
    for (path, value), (_, wanted) in zip(leaves(found), leaves(expected), strict=True):
        tolerance = next((t for start, t in TOLERANCES[name].items() if path[0].startswith(start)), None)
        assert value == (wanted if tolerance is None else pytest.approx(wanted, abs=tolerance)), path


def check_story(name, found):
    """What the text of a notebook tells, whatever the figures are to the last digit."""
    if name == "01_quick_start":
        assert all(value > 96 for key, value in found.items() if key.startswith("top1"))
        assert found["same weights"]
        assert found["within drift"]
        assert found["findings"]["error"] == found["findings"]["loss"] == 0
        assert found["size qat.onnx MB"] < 0.35 * found["size float.onnx MB"]
    elif name == "02_where_int8_goes":
        inputs = {placement: counts[2] for placement, counts in found["Q, DQ, Add inputs"].items()}
        assert inputs == {"both": [2] * 4, "both, fuse_adds": [1] * 4, "residual": [1] * 4, "none": [0] * 4}
        assert all(coverage.startswith("14 of 14 quantized convs") for _, coverage in found["engines"].values())
    elif name == "03_calibration_methods":
        accuracy = found["top1 %"]
        assert max(accuracy["ResNet-20"]["W8A8"].values()) - min(accuracy["ResNet-20"]["W8A8"].values()) < 1
        assert max(accuracy["separable"]["W8A8"].values()) - min(accuracy["separable"]["W8A8"].values()) > 3
        assert found["spoilt top1 %"]["separable"]["percentile"] > found["spoilt top1 %"]["separable"]["max"] + 10
    elif name == "05_debugging_accuracy":
        mean = found["mean top1 %"]["W8A8"]
        assert mean["PTQ"] < found["float top1 %"] - 5
        assert mean["equalized, PTQ"] > found["float top1 %"] - 1.5
        assert mean["PTQ, mixed precision"] > found["float top1 %"] - 2
        assert mean["PTQ"] < mean["QAT from PTQ"] < mean["QAT, equalized"]
        kinds = found["seed 1 top1 %"]
        assert kinds["weights only"] > kinds["activations only"] + 5


def test_there_are_five_notebooks():
    assert [path.stem for path in NOTEBOOKS] == sorted(TOLERANCES)


@each
def test_is_saved_with_clean_outputs(path):
    notebook = saved(path)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert sum(output.output_type == "display_data" for output in outputs) >= 1
    assert not [output for output in outputs if output.output_type == "error"]
    assert noise(notebook) == []
    assert path.stat().st_size < MAX_BYTES


@each
def test_is_saved_without_traces_of_a_machine(path):
    notebook = saved(path)
    assert notebook.metadata == load_runner().METADATA
    assert all(set(cell.metadata) <= {"tags"} for cell in notebook.cells)
    text = "".join(output.get("text", "") for cell in code_cells(notebook) for output in cell.outputs)
    assert not re.search(r"/(home|root|tmp|work|usr|Users)/|\x1b", text)


@each
def test_refers_to_files_that_exist(path):
    text = "\n".join(cell.source for cell in saved(path).cells if cell.cell_type == "markdown")
    links = re.findall(r"\]\(([^)#]+)", text)
    assert [link for link in links if not (path.parent / link).is_file()] == []


@each
def test_tells_the_story_of_its_saved_results(path):
    check_story(path.stem, results(saved(path)))


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, id=path.stem, marks=[] if path.stem == QUICK else pytest.mark.slow) for path in NOTEBOOKS],
)
def test_runs_and_gives_what_is_saved(path):
    notebook = load_runner().execute(path)
    found, expected = results(notebook), results(saved(path))
    check_story(path.stem, found)
    if path.stem == "02_where_int8_goes" and importlib.util.find_spec("tensorrt_rtx") is None:
        expected["engines"] = {}
    check_same(path.stem, found, expected)
    assert noise(notebook) == []
