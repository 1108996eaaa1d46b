"""Write models and be killed at every step: ``python write_run.py OLD-NEW ...`` makes a folder for each pair.

OLD and NEW say where the weights of the models are: ``inside``, ``beside``, or ``none`` for no model of before. For each step
there is a folder, ``OLD-NEW/0``, ``OLD-NEW/1``, ...; in the last one nobody was killed. A process is a fork: it ends without
any clean-up, as a killed one does.
"""

import os
import sys
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from qat.graph.writing import model_draft

SIZE = 512


def make_model(value):
    """``y = x + w + b``: ``w`` is 10 times ``value`` and goes beside the file, ``b`` is ``value`` and stays inside."""
    constants = {"w": np.full(SIZE, 10 * value, np.float32), "b": np.array(value, np.float32)}
    nodes = [helper.make_node("Add", ["x", "w"], ["z"]), helper.make_node("Add", ["z", "b"], ["y"])]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [SIZE]) for name in ("x", "y")]
    tensors = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)])
    model.ir_version = 9
    return model


def write(value, place, path):
    with model_draft(make_model(value), path, external_data=place == "beside"):
        pass


def kill_at(step):
    """End the process in front of the call number ``step`` that changes names of files; how many there were is the status."""
    count = 0

    def counted(call):
        def wrapped(*args, **kwargs):
            nonlocal count
            if count == step:
                os._exit(0)
            count += 1
            return call(*args, **kwargs)

        return wrapped

    Path.replace, Path.unlink = counted(Path.replace), counted(Path.unlink)


def main(old, new):
    step, ended = 0, False
    while not ended:
        folder = Path(f"{old}-{new}", str(step))
        folder.mkdir(parents=True)
        if old != "none":
            write(1, old, folder / "m.onnx")
        child = os.fork()
        if not child:
            kill_at(step)
            write(2, new, folder / "m.onnx")
            os._exit(7)
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        step += 1


if __name__ == "__main__":
    for pair in sys.argv[1:]:
        main(*pair.split("-"))
