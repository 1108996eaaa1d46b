"""The ``qat`` command: exit status, messages, and that each subcommand hands its options on."""

import json
import subprocess
import sys
from pathlib import Path

import export_nets
import numpy as np
import onnx
import pytest
from export_nets import images, tiny
from onnx import TensorProto, helper, numpy_helper
from rtx import needs_rtx

import qat
from qat import tensorrt
from qat.cli import main, make_parser
from qat.errors import QATError

COMMANDS = ("check", "simplify", "build", "run", "bench", "inspect", "verify", "report")


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module")
def path(model, tmp_path_factory):
    return str(qat.export_onnx(model, tmp_path_factory.mktemp("model") / "model.onnx", images(1)))


@pytest.fixture
def broken(path, tmp_path):
    proto = onnx.load(path)
    scale = next(tensor for tensor in proto.graph.initializer if tensor.name.endswith("/scale") and not tensor.dims)
    scale.CopyFrom(numpy_helper.from_array(np.float32(-1), scale.name))
    onnx.save(proto, str(tmp_path / "broken.onnx"))
    return str(tmp_path / "broken.onnx")


@pytest.fixture
def batch(tmp_path):
    np.save(tmp_path / "x.npy", images(2).numpy())
    return str(tmp_path / "x.npy")


def run(capsys, *argv):
    """Exit status, stdout and stderr."""
    status = main([str(item) for item in argv])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_help_imports_nothing_heavy():
    heavy = ("torch", "onnx", "onnxruntime", "onnxslim", "tensorrt", "tensorrt_rtx", "polygraphy", "numpy", "rich")
    code = (
        "import sys; from qat.cli import main\n"
        "try: main(['build', '--help'])\n"
        f"except SystemExit: pass\nprint([name for name in {heavy} if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_examples(capsys, command):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"  qat {command} " in capsys.readouterr().out.partition("examples:")[2]


def test_the_commands_are_complete():
    text = make_parser().format_help()
    assert all(f"\n    {command} " in text for command in COMMANDS)


@pytest.mark.parametrize("argv", [[], ["polish"], ["check"], ["check", "m.onnx", "--target", "9"], ["build", "m.onnx"]])
def test_wrong_usage_exits_with_2(capsys, argv):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert "usage: qat" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--batch", "1,2"),
        ("--batch", "a"),
        ("--shapes", "x"),
        ("--shapes", "x=1xa"),
        ("--shapes", "x=1:2"),
        ("--shapes", "=1x2"),
        ("--workspace", "4Q"),
        ("--opt-level", "6"),
    ],
)
def test_bad_option_values_name_the_option(capsys, option, value):
    with pytest.raises(SystemExit):
        main(["build", "m.onnx", "-o", "m.plan", option, value])
    assert f"argument {option}: invalid" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command", ["check {}", "simplify {}", "inspect {}", "build {} -o out.plan", "verify {} --engine e.plan"]
)
def test_a_missing_file_is_one_line_and_2(capsys, tmp_path, command):
    status, out, err = run(capsys, *command.format(tmp_path / "no.onnx").split())
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert "no.onnx" in err
    assert err.count("\n") == 1


# check


def test_check_of_a_good_file(capsys, path):
    status, out, _ = run(capsys, "check", path)
    assert status == 0
    assert "0 errors, 0 losses of INT8" in out


def test_check_of_a_broken_file(capsys, broken):
    status, out, _ = run(capsys, "check", broken)
    assert status == 1
    assert out.startswith("error: ")
    assert "2 errors" in out


def test_check_as_json(capsys, broken):
    status, out, _ = run(capsys, "check", broken, "--json")
    findings = json.loads(out)
    assert status == 1
    assert [f["rule"] for f in findings if f["level"] == "error"] == ["scale-positive"] * 2
    assert {"node", "problem", "remedy", "level", "rule"} == set(findings[0])


def test_strict_check_counts_notes(capsys, path):
    assert run(capsys, "check", path, "--strict")[0] == 1


def test_check_target(capsys, path):
    assert "TensorRT 8.6 reads up to 17" in run(capsys, "check", path, "--target", "8.6")[1]
    assert "TensorRT 8.6" not in run(capsys, "check", path, "--target", "11", "--sm", "SM86")[1]


def test_check_lists_few_of_many_nodes(capsys, path):
    short, whole = run(capsys, "check", path, "--strict")[1], run(capsys, "check", path, "--all")[1]
    assert len(short.splitlines()) <= len(whole.splitlines())
    assert "more nodes like these" not in whole


def test_check_of_no_onnx(capsys, tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"\xff\xfe")
    status, _, err = run(capsys, "check", tmp_path / "m.onnx")
    assert status == 2
    assert "is no ONNX file" in err


# simplify


def test_simplify(capsys, path, tmp_path):
    status, out, _ = run(capsys, "simplify", path, tmp_path / "small.onnx")
    assert status == 0
    assert "QuantizeLinear" in out
    assert (tmp_path / "small.onnx").is_file()


def test_simplify_on_given_inputs(capsys, path, batch, tmp_path):
    assert run(capsys, "simplify", path, "--inputs", batch)[0] == 0
    np.savez(tmp_path / "x.npz", other=np.zeros(1))
    status, _, err = run(capsys, "simplify", path, "--inputs", tmp_path / "x.npz")
    assert status == 2
    assert "arrays ['other'], the inputs are ['images']" in err


# build, inspect: TensorRT-RTX really; the hand-over of options by a stand-in


@needs_rtx
def test_build_and_inspect(capsys, path, tmp_path):
    plan = tmp_path / "m.plan"
    status, out, _ = run(capsys, "build", path, "-o", plan, "--batch", "1,2,4", "--target", "SM89")
    assert status == 0
    assert "6 of 6 quantized convs run in INT8" in out
    assert plan.stat().st_size > 10_000
    status, out, _ = run(capsys, "inspect", path, "--json", "--png", tmp_path / "m.png")
    assert status == 0
    assert json.loads(out)["coverage"].startswith("6 of 6")
    assert (tmp_path / "m.png").read_bytes()[:4] == b"\x89PNG"


@needs_rtx
def test_lost_int8_is_exit_status_1(capsys, path, tmp_path):
    proto = onnx.load(path)
    node = next(node for node in proto.graph.node if node.name == "block1.conv1/Conv")
    pair = next(n for n in proto.graph.node if node.input[1] in n.output)
    quantize = next(n for n in proto.graph.node if pair.input[0] in n.output)
    for name in quantize.input[1:]:
        tensor = next(tensor for tensor in proto.graph.initializer if tensor.name == name)
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor)[:16], name))
    for half in (quantize, pair):
        next(a for a in half.attribute if a.name == "axis").i = 1
    onnx.save(proto, str(tmp_path / "m.onnx"))
    assert run(capsys, "check", tmp_path / "m.onnx")[0] == 1
    status, out, _ = run(capsys, "inspect", tmp_path / "m.onnx", "--rules", tmp_path / "rules.yaml")
    assert status == 1
    assert "5 of 6 quantized convs" in out
    assert qat.QuantConfig.from_yaml(tmp_path / "rules.yaml").rules == (qat.core.config.Rule("block1.conv1", quantize=False),)
    status, _, error = run(capsys, "inspect", tmp_path / "m.onnx", "--rules", tmp_path / "missing" / "rules.yaml")
    assert status == 2
    assert "rules.yaml: cannot be written" in error


@needs_rtx
def test_build_refuses_a_broken_file(capsys, broken, tmp_path):
    status, out, err = run(capsys, "build", broken, "-o", tmp_path / "m.plan")
    assert (status, out) == (2, "")
    assert "not positive" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "m.plan").exists()


class _Stop(Exception):
    """The stand-in was reached."""


def options_of(monkeypatch, owner, name, argv):
    """The arguments that a command calls ``owner.name`` with."""
    given = {}

    def record(*args, **kwargs):
        given.update(kwargs, args=args)
        raise _Stop

    monkeypatch.setattr(owner, name, record)
    with pytest.raises(_Stop):
        main(argv)
    return given


def test_build_options(monkeypatch):
    argv = (
        "build m.onnx -o m.plan --no-fp16 --int8 --batch 1,8,32 --workspace 1.5G --timing-cache t.bin --opt-level 5 --no-tf32 "
        "--timing-iterations 8 "
        "--shapes a=1x3x8x8:2x3x8x8:4x3x8x8,b=5 --shapes c:0=1x2 --target SM86 --target SM89 --fp32-layer conv --mark t "
        "--version-compatible --hardware-compatibility ampere_plus --no-check --runtime tensorrt"
    )
    given = options_of(monkeypatch, tensorrt, "build", argv.split())
    assert given["args"] == ("m.onnx",)
    assert given["shapes"] == {
        "a": ((1, 3, 8, 8), (2, 3, 8, 8), (4, 3, 8, 8)),
        "b": ((5,), (5,), (5,)),
        "c:0": ((1, 2), (1, 2), (1, 2)),
    }
    wanted = {
        "fp16": False,
        "bf16": None,
        "int8": True,
        "tf32": False,
        "batch": (1, 8, 32),
        "workspace": 3 * 2**29,
        "timing_cache": "t.bin",
        "timing_iterations": 8,
        "optimization_level": 5,
        "targets": ["SM86", "SM89"],
        "fp32_layers": ["conv"],
        "outputs": ["t"],
        "version_compatible": True,
        "hardware_compatibility": "ampere_plus",
        "check": False,
        "runtime": "tensorrt",
    }
    assert {name: given[name] for name in wanted} == wanted


def test_build_leaves_defaults_to_the_library(monkeypatch):
    given = options_of(monkeypatch, tensorrt, "build", ["build", "m.onnx", "-o", "m.plan"])
    assert "targets" not in given
    assert [given[name] for name in ("fp16", "int8", "shapes", "workspace", "runtime")] == [None] * 5


def test_interrupted(capsys, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(tensorrt, "build", interrupt)
    status, _, err = run(capsys, "build", "m.onnx", "-o", "m.plan")
    assert status == 130
    assert "interrupted" in err


def test_a_missing_package_is_named(capsys, monkeypatch):
    def fail(*args, **kwargs):
        raise ModuleNotFoundError("No module named 'polygraphy'", name="polygraphy")

    monkeypatch.setattr(tensorrt, "build", fail)
    status, _, err = run(capsys, "build", "m.onnx", "-o", "m.plan")
    assert status == 2
    assert err == "error: this command needs polygraphy, which is not installed here\n"


def test_a_message_of_several_lines_becomes_one(capsys, monkeypatch):
    def fail(*args, **kwargs):
        raise QATError("refused:\n  one\n  two")

    monkeypatch.setattr(tensorrt, "build", fail)
    assert run(capsys, "build", "m.onnx", "-o", "m.plan")[2] == "error: refused: one two\n"


# run


def test_run_of_an_onnx_file(capsys, path, batch, tmp_path):
    import onnxruntime

    status, out, _ = run(capsys, "run", path, "--inputs", batch, "-o", tmp_path / "out.npz")
    assert status == 0
    assert out == "output: float32 [2, 10]\n"
    with np.load(tmp_path / "out.npz", allow_pickle=False) as outputs:
        expected = onnxruntime.InferenceSession(path).run(["output"], {"images": images(2).numpy()})[0]
        np.testing.assert_array_equal(outputs["output"], expected)


def test_an_output_may_have_any_name(capsys, tmp_path):
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in ("x", "file")]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["file"], "relu")], "g", value[:1], value[1:])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(proto, str(tmp_path / "m.onnx"))
    np.save(tmp_path / "x.npy", np.array([-1, 2], np.float32))
    assert run(capsys, "run", tmp_path / "m.onnx", "--inputs", tmp_path / "x.npy", "-o", tmp_path / "out.npz")[0] == 0
    with np.load(tmp_path / "out.npz") as outputs:
        assert outputs["file"].tolist() == [0, 2]


class Evil:
    def __reduce__(self):
        return print, ("executed",)


def test_pickles_are_refused(capsys, path, tmp_path):
    np.save(tmp_path / "x.npy", np.array([Evil()], dtype=object), allow_pickle=True)
    status, out, err = run(capsys, "run", path, "--inputs", tmp_path / "x.npy", "-o", tmp_path / "out.npz")
    assert status == 2
    assert "plain arrays" in err
    assert "executed" not in out


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 damaged", b"\x93NUMPY\x01\x00"])
def test_damaged_inputs_are_refused(capsys, path, tmp_path, content):
    (tmp_path / "x.npz").write_bytes(content)
    status, _, err = run(capsys, "run", path, "--inputs", tmp_path / "x.npz", "-o", tmp_path / "out.npz")
    assert status == 2
    assert "--inputs" in err
    assert not (tmp_path / "out.npz").exists()


def test_inputs_that_do_not_fit_are_refused(capsys, path, tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((1, 7, 16, 16), np.float32))
    status, _, err = run(capsys, "run", path, "--inputs", tmp_path / "x.npy", "-o", tmp_path / "out.npz")
    assert status == 2
    assert "images float32 [1, 7, 16, 16]" in err


@needs_rtx
@pytest.mark.skipif(tensorrt.cuda.has_gpu(), reason="shows what happens without a GPU")
def test_running_a_plan_without_a_gpu_is_an_error(capsys, path, batch, tmp_path):
    plan = tmp_path / "m.plan"
    run(capsys, "build", path, "-o", plan)
    status, _, err = run(capsys, "run", plan, "--inputs", batch, "-o", tmp_path / "out.npz")
    assert status == 2
    assert "no CUDA device" in err


# bench

SHORT = ("--duration", "0.02", "--warm-up", "0", "--min-runs", "2")


def test_bench_of_an_onnx_file(capsys, path, tmp_path):
    status, out, _ = run(capsys, "bench", path, "--batch", "1", *SHORT, "--json", tmp_path / "l.json")
    assert status == 0
    assert "throughput" in out
    assert json.loads((tmp_path / "l.json").read_text())["batch"] == 1


def test_bench_of_several_batches(capsys, path, tmp_path):
    status, out, _ = run(capsys, "bench", path, "--batch", "1,2", *SHORT, "--json", tmp_path / "l.json")
    assert status == 0
    assert "items per second" in out
    assert [row["batch"] for row in json.loads((tmp_path / "l.json").read_text())["rows"]] == [1, 2]


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    """A module of the user's in the current folder, which can make the model of these tests."""
    (tmp_path / "users_models.py").write_text(
        "import sys, pathlib\n"
        f"sys.path.insert(0, {str(Path(export_nets.__file__).parent)!r})\n"
        "from export_nets import images, tiny\n"
        "def quantized(): return tiny()\n"
        "def with_inputs(): return tiny(), images(1)\n"
        "def broken(): raise KeyError('the user knows')\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield "users_models"
    sys.modules.pop("users_models", None)


def test_bench_of_a_pytorch_model(capsys, user_module):
    status, out, _ = run(capsys, "bench", f"{user_module}:with_inputs", *SHORT)
    assert status == 0
    assert "TinyResNet" in out


# verify


def test_verify_a_pytorch_model(capsys, path, batch, user_module):
    argv = ["verify", path, "--model", f"{user_module}:quantized", "--inputs", batch]
    status, out, _ = run(capsys, *argv)
    assert status == 0
    assert "equal within rounding" in out
    assert json.loads(run(capsys, *argv, "--json")[1])["ok"] is True


def test_verify_finds_a_difference(capsys, path, batch, user_module, tmp_path):
    proto = onnx.load(path)
    bias = next(tensor for tensor in proto.graph.initializer if tensor.name == "fc.bias")
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + np.float32(5), bias.name))
    onnx.save(proto, str(tmp_path / "other.onnx"))
    argv = ["verify", tmp_path / "other.onnx", "--model", f"{user_module}:quantized", "--inputs", batch, "--no-locate"]
    status, out, _ = run(capsys, *argv)
    assert status == 1
    assert "DIFFERENT" in out


def test_verify_needs_something_to_compare(capsys, path):
    status, _, err = run(capsys, "verify", path)
    assert status == 2
    assert "pass --engine, --model or both" in err


@pytest.mark.parametrize(("name", "message"), [("nowhere:f", "no module 'nowhere'"), ("users_models:f", "has no function 'f'")])
def test_unknown_factories_are_refused(capsys, path, batch, user_module, name, message):
    status, _, err = run(capsys, "verify", path, "--model", name, "--inputs", batch)
    assert status == 2
    assert message in err


def test_errors_of_the_users_code_are_not_hidden(path, batch, user_module):
    with pytest.raises(KeyError, match="the user knows"):
        main(["verify", path, "--model", f"{user_module}:broken", "--inputs", batch])


def test_verify_says_that_it_runs_code(capsys):
    with pytest.raises(SystemExit):
        main(["verify", "--help"])
    assert "THIS RUNS YOUR CODE" in " ".join(capsys.readouterr().out.split())


class _Engine:
    """Answers with what ONNX Runtime computes, ``offset`` added."""

    def __init__(self, path, offset):
        import onnxruntime

        self._session = onnxruntime.InferenceSession(path)
        self._offset = np.float32(offset)
        kinds = (self._session.get_inputs(), self._session.get_outputs())
        self.inputs, self.outputs = (
            tuple(tensorrt.TensorInfo(v.name, np.dtype("f4"), (-1, *v.shape[1:])) for v in kind) for kind in kinds
        )

    def __enter__(self):
        return self

    def __exit__(self, *args):
        pass

    def run(self, inputs):
        return {"output": self._session.run(None, dict(inputs))[0] + self._offset}


@pytest.mark.parametrize(("offset", "status"), [(0, 0), (5, 1)])
def test_verify_an_engine_on_random_inputs(capsys, monkeypatch, path, offset, status):
    monkeypatch.setattr(tensorrt, "load", lambda plan, runtime=None: _Engine(path, offset))
    assert run(capsys, "verify", path, "--engine", "m.plan", "--no-locate")[0] == status


def test_times_need_an_engine(tmp_path, capsys):
    (tmp_path / "model.onnx").write_bytes(b"")
    assert main(["inspect", str(tmp_path / "model.onnx"), "--times"]) == 2
    assert "is no engine" in capsys.readouterr().err
