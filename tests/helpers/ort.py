"""ONNX Runtime as the reference of a file with Q/DQ nodes."""

import onnxruntime


def open_as_written(model):
    """A session on the CPU that runs Q/DQ nodes as they stand, in float.

    By default ONNX Runtime makes integer kernels of them, whose sums saturate on processors without VNNI instructions: results
    then differ by several percent from one machine to the next.
    """
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(
        model if isinstance(model, bytes) else str(model), options, providers=["CPUExecutionProvider"]
    )
