"""ONNX files from anywhere: read without their weights, refused with a plain sentence if anything is wrong with them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.descriptor import FieldDescriptor  # type: ignore[import-untyped]
from google.protobuf.message import DecodeError, Message  # type: ignore[import-untyped]
from onnx import AttributeProto, GraphProto, ModelProto, TensorProto, numpy_helper

from ..errors import QATError

# Constants up to this size are looked at (scales, shapes, axes); the rest are weights, of which only the header counts.
_SMALL = 65536
_PROTOBUF_LIMIT = 2**31


def load_model(path: str | os.PathLike[str]) -> ModelProto:
    """The model of a file with all its weights.

    Raises:
        QATError: As :func:`read_model`, or if external data cannot be read.
    """
    model = read_model(path)
    try:
        onnx.external_data_helper.load_external_data_for_model(model, str(Path(path).resolve().parent))
    except (OSError, ValueError, onnx.checker.ValidationError) as error:
        raise QATError(f"{str(path)!r}: its external data cannot be read: {error}. Copy it again") from error
    return model


def read_model(path: str | os.PathLike[str], *, needs_data: bool = True) -> ModelProto:
    """The model of a file, external data left where it is.

    Args:
        path: An ONNX file.
        needs_data: Whether external data must be there.

    Raises:
        QATError: If it is missing, no ONNX file, or names external data outside its own folder or that is not there.
    """
    file = Path(path)
    if not file.is_file():
        raise QATError(f"{str(path)!r}: {'is a folder' if file.is_dir() else 'no such file'}. Pass an ONNX file")
    try:
        size = file.stat().st_size
        if size >= _PROTOBUF_LIMIT:
            raise QATError(f"{str(path)!r} has 2 GiB or more, which no ONNX file can have. Store the weights as external data")
        # Not onnx.load by its file name: a name such as x.json would choose another format.
        model = onnx.load_model_from_string(file.read_bytes())
    except OSError as error:
        raise QATError(f"{str(path)!r} cannot be read: {error.strerror}") from error
    except DecodeError as error:
        raise QATError(f"{str(path)!r} is no ONNX file, or cut short: {error}. Export it again") from error
    if not model.HasField("graph") or not model.ir_version:
        raise QATError(f"{str(path)!r} is no ONNX file: it holds no graph. Export it again")
    if not _is_text(model):
        raise QATError(f"{str(path)!r} is no ONNX file, or damaged: a name in it is no text. Export it again")
    if needs_data:
        check_external_data(model, file)
    return model


def _is_text(message: Message) -> bool:
    """Whether every text in a message is UTF-8. Protobuf does not check it, and hands out bytes, or fails, where it is not."""
    for field in message.DESCRIPTOR.fields:
        if field.type not in (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_MESSAGE):
            continue
        try:
            value = getattr(message, field.name)
        except UnicodeDecodeError:
            return False
        if isinstance(value, str | bytes | Message):
            # An unset message may nest without end.
            items = [value] if not isinstance(value, Message) or message.HasField(field.name) else []
        else:
            items = value
        for item in items:
            if isinstance(item, bytes) or (isinstance(item, Message) and not _is_text(item)):
                return False
    return True


def check_external_data(model: ModelProto, file: Path) -> None:
    """Whether all that lies outside a model is beside its file, and nowhere else.

    Raises:
        QATError: Naming the tensor.
    """
    folder = file.resolve().parent
    for tensor in _tensors(model.graph):
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        blame = f"{str(file)!r}: the weights of {tensor.name!r} lie in {location!r}"
        # A NUL makes Path.resolve raise.
        if not location or "\0" in location:
            raise QATError(f"{blame}, which is no file name. Export it again")
        target = (folder / location).resolve()
        if not target.is_relative_to(folder):
            raise QATError(f"{blame}, outside the model's folder. Such a file is refused; move the data beside the model")
        if not target.is_file():
            raise QATError(f"{blame}, which is not there. Copy it beside the model")
        try:
            offset, length = int(entries.get("offset", 0)), int(entries.get("length", 0))
        except ValueError:
            raise QATError(f"{blame}, with an offset or length that is no number. Export it again") from None
        if offset < 0 or length < 0 or offset + length > target.stat().st_size:
            raise QATError(f"{blame}, which is too short. Copy it again")


def _tensors(graph: GraphProto) -> Iterator[TensorProto]:
    """Every stored tensor, those of subgraphs included."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            yield from _attribute_tensors(attribute)


def _attribute_tensors(attribute: AttributeProto) -> Iterator[TensorProto]:
    if attribute.HasField("t"):
        yield attribute.t
    yield from attribute.tensors
    for subgraph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
        yield from _tensors(subgraph)


def elements(tensor: TensorProto) -> int:
    """Number of elements by the header."""
    return int(np.prod(tensor.dims, dtype=np.int64))


def values(tensor: TensorProto, folder: str | None) -> np.ndarray | None:
    """The values of a small constant; ``None`` for a large one, or one that lies outside the model and nobody says where.

    Args:
        tensor: A constant.
        folder: Where external data lies.

    Raises:
        QATError: If it holds another number of values than its shape says.
    """
    if elements(tensor) > _SMALL:
        return None
    if tensor.data_location == TensorProto.EXTERNAL:
        if folder is None:
            return None
        loaded = TensorProto()
        loaded.CopyFrom(tensor)
        try:
            onnx.external_data_helper.load_external_data_for_tensor(loaded, folder)
        except (OSError, ValueError, onnx.checker.ValidationError) as error:
            raise QATError(f"constant {tensor.name!r}: its external data cannot be read: {error}") from error
        tensor = loaded
    try:
        return numpy_helper.to_array(tensor)
    except (ValueError, TypeError, KeyError) as error:
        raise QATError(f"constant {tensor.name!r}: it does not hold what its shape says: {error}. Export it again") from error


def skeleton(model: ModelProto, folder: str | None) -> ModelProto:
    """A copy without large constants, which become inputs: what the checker and the inference of types need.

    Args:
        model: The model.
        folder: Where its external data lies; ``None`` if unknown.
    """
    small = ModelProto()
    small.ir_version = model.ir_version
    small.opset_import.extend(model.opset_import)
    small.functions.extend(model.functions)
    graph = small.graph
    graph.name = model.graph.name or "graph"
    graph.node.extend(model.graph.node)
    graph.input.extend(model.graph.input)
    graph.sparse_initializer.extend(model.graph.sparse_initializer)
    for value in model.graph.output:
        graph.output.add().CopyFrom(value)
        # Those of the file may be wrong; true ones are inferred.
        if value.type.HasField("tensor_type"):
            graph.output[-1].type.tensor_type.ClearField("shape")
    given = {value.name for value in graph.input}
    for tensor in model.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL and (loaded := values(tensor, folder)) is not None:
            graph.initializer.append(numpy_helper.from_array(loaded, tensor.name))
        elif tensor.data_location == TensorProto.EXTERNAL or elements(tensor) > _SMALL:
            if tensor.name not in given:
                graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
        else:
            graph.initializer.append(tensor)
    return small


def refuse_invalid(model: ModelProto, folder: str | None) -> None:
    """Look at a model without its weights.

    Args:
        model: The model.
        folder: Where its external data lies; ``None`` if unknown.

    Raises:
        QATError: If the graph is invalid: cyclic, with a name used twice, an unknown operator or a missing input.
    """
    small = skeleton(model, folder)
    for value in small.graph.output:
        if value.type.HasField("tensor_type"):
            # The checker wants a shape, be it one of rank 0.
            value.type.tensor_type.shape.SetInParent()
    try:
        onnx.checker.check_model(small)
    # A message that quotes a damaged name cannot be decoded.
    except (onnx.checker.ValidationError, UnicodeDecodeError) as error:
        first = next(iter(str(error).strip().splitlines()), "invalid").rstrip(". ")
        raise QATError(f"the graph is no valid ONNX: {first}. Export it again") from error
