"""TensorRT's own calibrators, up to version 10, against recorded bindings: polygraphy really drives them.

The recorded builder (``fake_tensorrt``) asks for batches as TensorRT does and writes a cache of that format; no range is
computed, since that code is TensorRT's.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fake_tensorrt import FakeTensorRT, graph
from polygraphy.backend.trt import calibrator as polygraphy_calibrator
from polygraphy.backend.trt import util as polygraphy_util

from qat.errors import QATError
from qat.tensorrt import EntropyCalibrator, EntropyCalibrator2, LegacyCalibrator, MinMaxCalibrator, Runtime, build

CLASSES = {
    "IInt8MinMaxCalibrator": MinMaxCalibrator,
    "IInt8EntropyCalibrator": EntropyCalibrator,
    "IInt8EntropyCalibrator2": EntropyCalibrator2,
    "IInt8LegacyCalibrator": LegacyCalibrator,
}
RANGES = b"TRT-8601-EntropyCalibration2\nx: 3c010a14\n"


@pytest.fixture(params=["8.6.1", "10.7.0"])
def recorded(request, monkeypatch):
    """A version whose builder calibrates; ``seen`` are the batches it got, ``asked`` whether it asked for any."""
    trt = FakeTensorRT(request.param)
    trt.seen, trt.asked = [], False
    # polygraphy imports the module once by itself, and copies batches to the GPU with this function.
    monkeypatch.setattr(polygraphy_calibrator, "trt", trt)
    monkeypatch.setattr(
        polygraphy_util, "_get_array_on_gpu", lambda array, name, buffers: trt.seen.append(array) or len(trt.seen)
    )

    def calibrate(builder, network, config):
        calibrator = config.int8_calibrator
        assert {"FP16", "INT8"} <= config.flags
        if calibrator.read_calibration_cache() is None:
            trt.asked = True
            names = [tensor.name for tensor in network.entries]
            while calibrator.get_batch(names) is not None:
                pass
            calibrator.write_calibration_cache(memoryview(RANGES))
        return True

    trt.on_build = calibrate
    return trt


def batches(count: int = 3, size: int = 8) -> list[np.ndarray]:
    return [np.full((size, 4), i, np.float32) for i in range(count)]


def build_with(trt, folder, calibrator, **settings):
    return build(graph(folder, **settings), runtime=Runtime(trt), calibrator=calibrator)


@pytest.mark.parametrize("base", CLASSES)
def test_recorded_calibrator_is_of_tensorrts_class(recorded, tmp_path, base):
    build_with(recorded, tmp_path, CLASSES[base](batches()))
    assert isinstance(recorded.configs[-1].int8_calibrator, getattr(recorded, base))


@pytest.mark.parametrize("form", ["arrays", "dicts", "generator", "torch"])
def test_recorded_calibrator_gets_every_batch_once(recorded, tmp_path, form):
    data = {
        "arrays": batches(),
        "dicts": [{"x": batch} for batch in batches()],
        "generator": (batch for batch in batches()),
        "torch": [torch.from_numpy(batch) for batch in batches()],
    }[form]
    build_with(recorded, tmp_path, MinMaxCalibrator(data))
    assert len(recorded.seen) == 3
    for seen, batch in zip(recorded.seen, batches(), strict=True):
        np.testing.assert_array_equal(np.asarray(seen), batch)


def test_recorded_calibrator_makes_batches_contiguous(recorded, tmp_path):
    build_with(recorded, tmp_path, MinMaxCalibrator([np.ones((4, 8), np.float32).T]))
    assert recorded.seen[0].flags.c_contiguous


def test_recorded_dynamic_graph_calibrates_at_its_profile(recorded, tmp_path):
    build_with(recorded, tmp_path, MinMaxCalibrator(batches()))
    (profile,) = recorded.configs[-1].called("calibration_profile")
    assert profile.shapes["x"][1] == (8, 4)


def test_recorded_static_graph_needs_no_calibration_profile(recorded, tmp_path):
    build_with(recorded, tmp_path, MinMaxCalibrator(batches(size=2)), shape=(2, 4))
    assert recorded.configs[-1].called("calibration_profile") == []


def test_recorded_cache_is_written(recorded, tmp_path):
    build_with(recorded, tmp_path, EntropyCalibrator2(batches(), tmp_path / "ranges.cache"))
    assert (tmp_path / "ranges.cache").read_bytes() == RANGES
    assert {path.name for path in tmp_path.iterdir()} == {"graph.onnx", "ranges.cache"}


# The header of the legacy calibrator is a bare 0 (TensorRT 8.6).
@pytest.mark.parametrize(
    ("kind", "ranges"), [(EntropyCalibrator2, RANGES), (LegacyCalibrator, b"0\ninput: 3c010a14\nconv1: 3c8954be\n")]
)
def test_recorded_cache_spares_the_data(recorded, tmp_path, kind, ranges):
    (tmp_path / "ranges.cache").write_bytes(ranges)
    build_with(recorded, tmp_path, kind([], tmp_path / "ranges.cache"))
    assert not recorded.asked
    assert recorded.configs[-1].int8_calibrator.read_calibration_cache() == ranges


def test_recorded_cache_is_not_written_by_a_failed_build(recorded, tmp_path):
    calibrate = recorded.on_build
    recorded.on_build = lambda *arguments: calibrate(*arguments) is None
    with pytest.raises(QATError, match="could not build"):
        build_with(recorded, tmp_path, EntropyCalibrator2(batches(), tmp_path / "ranges.cache"))
    assert not (tmp_path / "ranges.cache").exists()


@pytest.mark.parametrize("content", [b"PK\x03\x04", b"", b"0", b"0123\n", b"TRT-"])
def test_file_that_is_no_cache(recorded, tmp_path, content):
    (tmp_path / "ranges.cache").write_bytes(content)
    with pytest.raises(QATError, match=r"ranges\.cache: not a calibration cache"):
        build_with(recorded, tmp_path, EntropyCalibrator2(batches(), tmp_path / "ranges.cache"))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "holds no batch"),
        (batches(2) + batches(1, size=5), r"batch 2: input 'x' has shape \[5, 4\], the build calibrates at \[8, 4\]"),
        ([batches(1)[0].astype(np.float64)], "batch 0: input 'x' is float64. Calibration takes float32"),
        ([{"image": batches(1)[0]}], "batch 0 holds image, not x"),
        ([[1.0, 2.0]], "batch 0: input 'x' is a list, not an array"),
    ],
)
def test_recorded_batches_that_do_not_fit(recorded, tmp_path, data, message):
    with pytest.raises(QATError, match=message):
        build_with(recorded, tmp_path, MinMaxCalibrator(data, tmp_path / "ranges.cache"))
    assert not (tmp_path / "ranges.cache").exists()


def test_recorded_failed_copy_is_an_error_not_a_shorter_calibration(recorded, tmp_path, monkeypatch):
    from polygraphy.exception import PolygraphyException

    def fail(array, name, buffers):
        raise PolygraphyException("CUDA Error: 2")

    monkeypatch.setattr(polygraphy_util, "_get_array_on_gpu", fail)
    with pytest.raises(QATError, match="batch 1 could not be copied to the GPU"):
        build_with(recorded, tmp_path, MinMaxCalibrator(batches()))


def test_recorded_quantized_graph_takes_no_calibrator(recorded, tmp_path):
    with pytest.raises(QATError, match="the graph holds Q/DQ, whose scales TensorRT takes"):
        build_with(recorded, tmp_path, MinMaxCalibrator(batches()), quantized=True)


def test_recorded_legacy_calibrator_passes_its_settings_on(recorded, tmp_path):
    build_with(recorded, tmp_path, LegacyCalibrator(batches(), quantile=0.9999, regression_cutoff=1.0))
    calibrator = recorded.configs[-1].int8_calibrator
    assert (calibrator.get_quantile(), calibrator.get_regression_cutoff()) == (0.9999, 1.0)


@pytest.mark.parametrize("name", ["quantile", "regression_cutoff"])
def test_legacy_settings_are_shares(name):
    with pytest.raises(QATError, match=rf"{name}=99.9: choose a number in \[0, 1\]"):
        LegacyCalibrator([], **{name: 99.9})


@pytest.mark.parametrize("base", CLASSES)
def test_recorded_11_points_to_calibrate(tmp_path, base):
    with pytest.raises(QATError, match=r"TensorRT 11\.1\.0 has no calibrators.*qat\.calibrate\(model, loader\)"):
        build_with(FakeTensorRT("11.1.0"), tmp_path, CLASSES[base](batches()))
