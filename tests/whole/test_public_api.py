"""What the package offers, and what importing it costs."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import qat

# Removing a name breaks users: deprecate it in one release, remove it in the next, and only then change this list.
PUBLIC = {
    "Format",
    "INT4",
    "INT8",
    "QATCallback",
    "QATError",
    "QuantConfig",
    "Rule",
    "__version__",
    "analysis",
    "batchnorm",
    "bench",
    "calibrate",
    "calibration",
    "checkpoints",
    "compile_options",
    "correct_biases",
    "distillation",
    "equalize",
    "export",
    "export_onnx",
    "fake_quantize",
    "inputs",
    "interop",
    "load_from_checkpoint",
    "nn",
    "oscillation_penalty",
    "parity",
    "preparation",
    "prepare",
    "quantizer",
    "ranges",
    "report",
    "restore",
    "round_weights",
    "tensorrt",
    "verify",
}


def test_public_names_are_the_agreed_ones():
    assert set(qat.__all__) == PUBLIC


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_public_name_can_be_imported_and_is_listed(name):
    assert getattr(qat, name) is not None
    assert name in dir(qat)


def test_unknown_name_raises():
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        qat.quantise  # noqa: B018


def run(code):
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_import_loads_no_heavy_package():
    heavy = "{'torch', 'numpy', 'onnx', 'onnxruntime', 'lightning', 'torchvision', 'rich', 'yaml'}"
    assert run(f"import sys, qat; print({heavy} & set(sys.modules))") == "set()\n"


def test_import_takes_less_than_a_tenth_of_a_second():
    seconds = run("import time; t = time.perf_counter(); import qat; print(time.perf_counter() - t)")
    assert float(seconds) < 0.1


def test_preparing_needs_neither_lightning_nor_onnx():
    code = "import sys, qat; qat.prepare, qat.calibrate; print({'lightning', 'onnx', 'onnxruntime'} & set(sys.modules))"
    assert run(code) == "set()\n"


ROOT = Path(__file__).parents[2]
# Programs (python -m qat.recipes.resnet), and what is told by its short name.
NOT_CALLED = {"cli", "recipes", "errors", "config"}


def told():
    """Names ``qat.x`` that README, documentation and notebooks tell a user to call or import."""
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))]
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        texts += ["".join(cell["source"]) for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]]
    # Not files such as qat.onnx, nor the quotes around them.
    pattern = re.compile(r"(?<![\w./-])qat\.(?!(?:onnx|pth|ckpt|pt|plan)\b)([a-zA-Z]\w*)")
    return {name for text in texts for name in pattern.findall(text)}


@pytest.mark.parametrize("name", sorted(told() - NOT_CALLED))
def test_what_documentation_tells_to_call_is_listed(name):
    assert name in dir(qat)
