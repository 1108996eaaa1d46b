"""The layers of an engine, read from what each TensorRT tells about them.

Sources: TensorRT-RTX's verbose build log (``Layers:``), the verbose build log of TensorRT 8 to 10
(``Engine Layer Information:``) and the JSON of the engine inspector (``trtexec --exportLayerInfo`` writes the same).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..errors import QATError
from .names import name_parts

_TYPES = {
    "float": "FP32", "fp32": "FP32", "float32": "FP32", "half": "FP16", "fp16": "FP16", "float16": "FP16",
    "bf16": "BF16", "bfloat16": "BF16", "int8": "INT8", "uint8": "UINT8", "int4": "INT4", "int32": "INT32",
    "int64": "INT64", "fp8": "FP8", "fp4": "FP4", "e8m0": "E8M0", "bool": "BOOL",
}  # fmt: skip
_TYPE_WORD = re.compile(rf"\b({'|'.join(_TYPES)})\b", re.IGNORECASE)
# Kinds of layers that multiply and accumulate: correlation, CaskConvolution, CaskConvActPool, CaskJitConv, deconv,
# CublasConvolution, gemm, CaskGemmMatrixMultiply, MatrixMultiply, FullyConnected, ...
_MAC = re.compile(r"conv|correlation|gemm|matrixmultiply|matmul|fullyconnected|\Aruntime_fusion\Z", re.IGNORECASE)
# Entries that order streams or compute shapes on the host: no kernels.
_NO_KERNEL = {"signal", "wait", "shape_call"}
# What a generated kernel does is in its name, four letters an operation. These move values; Repl with Conc pads.
_MOVES = {"Move", "Cast", "Tran", "Resh", "Repl"}
_GENERATED = re.compile(r"\A__myl_((?:[A-Z][a-z]+)+?)(?:_myl|_0x|\Z)")
_TACTIC = re.compile(r"Set Tactic Name: (\S+) Tactic: (0x[0-9a-fA-F]+)")
_TAG = re.compile(r"\[ONNX Layer: (.*?)\](?=[\x1e\x1f]|\Z)")


class LayerTensor(NamedTuple):
    """A tensor that a layer reads or writes: its type (``"INT8"``, ``"FP16"``, ``""`` if unknown) and memory format."""

    name: str
    dtype: str
    format: str = ""


@dataclass(frozen=True)
class EngineLayer:
    """One layer of an engine, a kernel as a rule.

    Attributes:
        name: As the engine's profiler and inspector call it.
        kind: The engine's word: ``"CaskConvolution"``, ``"correlation"``, ``"kgen"``, ``"Reformat"``, ...
        inputs: Activations it reads. A weight that was dequantized first is among them, too.
        outputs: What it writes.
        constants: Types of its constants, the weight first, where they are listed.
        weights: Type of the weight, ``None`` if it isn't listed.
        tactic: Name of the kernel, or its hash.
        onnx_nodes: Names of the ONNX nodes that it computes: those its metadata lists, or else those in its name.
        fused: Parts that its name joins.
        is_reformat: Whether it only copies, converts or pads.
        is_region: Whether it stands for a part of the graph whose inner kernels are not listed (Myelin).
        time_ms: Time in milliseconds, ``None`` without a profile.
    """

    name: str
    kind: str
    inputs: tuple[LayerTensor, ...] = ()
    outputs: tuple[LayerTensor, ...] = ()
    constants: tuple[str, ...] = ()
    weights: str | None = None
    tactic: str = ""
    onnx_nodes: tuple[str, ...] = ()
    fused: tuple[str, ...] = ()
    is_reformat: bool = False
    is_region: bool = False
    time_ms: float | None = None

    @property
    def is_mac(self) -> bool:
        """Whether it multiplies and accumulates: a convolution or matrix product."""
        return not self.is_region and not self.is_reformat and _MAC.search(self.kind) is not None

    @property
    def is_int8(self) -> bool:
        """Whether it multiplies INT8 by INT8.

        A ``runtime_fusion`` of TensorRT-RTX never does: it dequantizes an INT8 weight and multiplies in float.
        """
        if not self.is_mac or self.kind == "runtime_fusion" or not self.inputs or self.inputs[0].dtype != "INT8":
            return False
        return self._second_operand in ("INT8", None)

    @property
    def dequantizes_weight(self) -> bool:
        """Whether it reads an INT8 weight and still multiplies in float."""
        return self.is_mac and not self.is_int8 and self._second_operand == "INT8"

    @property
    def precision(self) -> str:
        """The type it computes in; for anything but a convolution or matrix product, the widest that it reads."""
        if self.is_int8:
            return "INT8"
        types = [tensor.dtype for tensor in self.inputs or self.outputs if tensor.dtype]
        if self.is_mac:
            types = [dtype for dtype in (*types[:1], self._second_operand) if dtype and dtype != "INT8"] or [
                tensor.dtype for tensor in self.outputs
            ]
        order = ("FP32", "FP16", "BF16", "FP8", "INT8")
        return min(types, key=lambda dtype: order.index(dtype) if dtype in order else len(order), default="")

    @property
    def output_precision(self) -> str:
        """The type of its first output, ``""`` if unknown."""
        return self.outputs[0].dtype if self.outputs else ""

    @property
    def _second_operand(self) -> str | None:
        if self.constants:
            # Of two activations, or else the weight, which is then the first constant.
            return (*(tensor.dtype for tensor in self.inputs), *self.constants)[1]
        if self.weights is not None:
            return self.weights
        # Older logs list no weights; a second input is then the residual of a fused Add, which may have any type.
        is_product = re.search(r"gemm|matrixmultiply|matmul|runtime_fusion", self.kind, re.IGNORECASE)
        return self.inputs[1].dtype if is_product and len(self.inputs) > 1 else None


@dataclass(frozen=True)
class Listing:
    """The layers of an engine in the order in which they run, and the names of the engine's inputs and outputs."""

    layers: tuple[EngineLayer, ...]
    io: frozenset[str] = frozenset()


def read_log(messages: Iterable[str]) -> Listing:
    """Read the layers from the messages of a verbose build, of any TensorRT.

    Args:
        messages: What the build logged, one entry a message; a message may have many lines.

    Raises:
        QATError: If none of them lists layers.

    Example:
        >>> line = "Layer(CaskConvolution): w + conv1 + relu1, Tactic: 0x1f, x (Int8[1,8:4,9,9]) -> y (Half[1,8,9,9])"
        >>> layer = read_log(["Engine Layer Information:", line]).layers[0]
        >>> layer.is_int8, layer.output_precision, layer.onnx_nodes
        (True, 'FP16', ('w', 'conv1', 'relu1'))
    """
    layers: list[EngineLayer] = []
    io: set[str] = set()
    tactics: dict[str, str] = {}
    section = ""
    for message in messages:
        # Not splitlines(): the separators in the metadata would end a line.
        for line in message.split("\n"):
            if line.endswith("Engine Layer Information:") or line == "Layers:":
                section = "layers"
                # A log of several builds: the last one counts.
                layers, io = [], set()
            elif line == "I/O Tensors:":
                section = "io"
            elif section == "layers" and (layer := _from_line(line)) is not None:
                layers.append(layer)
            elif section == "io" and (match := re.match(r" ?Name: (.*?), IOMode: ", line)):
                io.add(match[1])
            elif "Set Tactic Name: " in line and (match := _TACTIC.search(line)):
                tactics[match[2]] = match[1]
    if not layers:
        raise QATError(
            "the build log lists no layers. Build with a verbose log and detailed profiling verbosity "
            "(qat.tensorrt.build does, unless verbose_log=False)"
        )
    named = (_replace(layer, tactic=tactics.get(layer.tactic, layer.tactic)) for layer in layers)
    return Listing(tuple(layer for layer in named if layer.kind not in _NO_KERNEL), frozenset(io))


def read_json(text: str | bytes) -> Listing:
    """Read the layers from the JSON of the engine inspector, of any TensorRT.

    Raises:
        QATError: If the text is no such JSON, or holds names alone, or no types.
    """
    try:
        # TensorRT 8.6 separates the ONNX layers of "Metadata" by a bare control character.
        document = json.loads(text, strict=False)
    except ValueError as error:
        raise QATError(f"the layer information is no JSON: {error}. Pass what the engine inspector or trtexec wrote") from error
    entries = document.get("Layers") if isinstance(document, dict) else None
    if not isinstance(entries, list) or not entries:
        raise QATError("the layer information has no 'Layers'. Pass what the engine inspector or trtexec wrote")
    if not all(isinstance(entry, dict) for entry in entries):
        raise QATError(
            "the layer information holds names alone. Build with detailed profiling verbosity "
            "(qat.tensorrt.build does; trtexec --profilingVerbosity=detailed)"
        )
    # Bindings up to 10, I/O Tensors from 11.
    io = document.get("Bindings") or document.get("I/O Tensors") or []
    names = frozenset(str(entry.get("Name", "")) if isinstance(entry, dict) else str(entry) for entry in io)
    layers = tuple(_from_fields(entry) for entry in entries)
    tensors = [tensor for layer in layers for tensor in (*layer.inputs, *layer.outputs)]
    if tensors and not any(tensor.dtype for tensor in tensors):
        raise QATError(
            "the layer information tells no types, as that of an engine with open dimensions does unless the inspector has an "
            "execution context with shapes (qat.tensorrt.inspect gives it one)"
        )
    return Listing(tuple(layer for layer in layers if layer.kind not in _NO_KERNEL), names)


def with_times(layers: Iterable[EngineLayer], times: Mapping[str, float]) -> tuple[EngineLayer, ...]:
    """The layers with their times.

    Args:
        layers: Layers of an engine.
        times: Milliseconds by layer name, as a profiler reports them. Layers without an entry take no time.

    Raises:
        QATError: If no name fits.
    """
    layers = tuple(layers)
    if not any(layer.name in times for layer in layers):
        example = next(iter(times), "none")
        raise QATError(f"times: no layer has a time; the first name is {example!r}. Use the profile of this very engine")
    return tuple(_replace(layer, time_ms=float(times.get(layer.name, 0.0))) for layer in layers)


def _replace(layer: EngineLayer, **changes: Any) -> EngineLayer:
    return EngineLayer(**{**layer.__dict__, **changes})


def _from_line(line: str) -> EngineLayer | None:
    if match := re.search(r"\bLayer\((\w+)\): ", line):
        return _from_short_line(match[1], line[match.end() :])
    if match := re.match(r"Name: (.*?), LayerType: (\w+), ", line):
        return _from_long_line(match[1], match[2], line)
    return None


# The two ways of TensorRT 8 to write a tensor: ``x[Int8(1,3,8,8)]`` and, from 8.5 on, ``x (Int8[1,3:4,8,8])``.
_SHORT_TENSOR = re.compile(r"(.+?)(?:\[(\w+)\([^()]*\)\]| \((\w+)\[([^\]]*)\]\))(?:, |\Z)")


def _from_short_line(kind: str, rest: str) -> EngineLayer:
    """``<name>, Tactic: <hash>, <inputs> -> <outputs>``; the oldest logs have no tactic."""
    match = re.match(r"(.*?), Tactic: ([^,\s]+),\s*(.*)\Z", rest)
    if match is not None:
        name, tactic, tensors = match[1], match[2], match[3]
    else:
        end = _first_comma(rest)
        name, tactic, tensors = rest[:end], "", rest[end + 2 :]
    before, _, after = tensors.rpartition("->")
    return _layer(name, kind, _short_tensors(before.strip()), _short_tensors(after.strip()), tactic=tactic)


def _short_tensors(text: str) -> tuple[LayerTensor, ...]:
    found = []
    for name, old, new, shape in _SHORT_TENSOR.findall(text):
        # A colon in the shape is the width of a channel vector.
        vector = re.search(r":(\d+)", shape)
        found.append(LayerTensor(name, _dtype(old or new), f"{vector[1]}-wide channel vectors" if vector else ""))
    return tuple(found)


def _first_comma(text: str) -> int:
    """Position of the first comma outside brackets, the end if there is none."""
    depth = 0
    for i, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if depth == 0 and text.startswith(", ", i):
            return i
    return len(text)


_LIST = re.compile(r"\b(Inputs|Constants|Outputs): \[(?:\]|( .*?)\}\])(?=, |\Z)")
_LONG_TENSOR = re.compile(r"\{ Name: (.*?), (?:Location: |Dimensions: )(.*?)(?=\}, \{|\Z)")


def _from_long_line(name: str, kind: str, line: str) -> EngineLayer:
    lists: dict[str, tuple[LayerTensor, ...]] = {}
    for match in _LIST.finditer(line):
        lists.setdefault(match[1], tuple(_long_tensor(*found) for found in _LONG_TENSOR.findall(match[2] or "")))
    tactic = re.search(r", TacticName: (.*?), (?:TacticValue|StreamId|Metadata): ", line)
    weights = re.search(r'Weights: \{"?Type"?: "?(\w+)"?', line)
    return _layer(
        name,
        kind,
        lists.get("Inputs", ()),
        lists.get("Outputs", ()),
        constants=tuple(tensor.dtype for tensor in lists.get("Constants", ())),
        weights=_dtype(weights[1]) if weights else None,
        tactic=tactic[1] if tactic else "",
        metadata=line.rpartition("Metadata: ")[2] if "Metadata: " in line else "",
    )


def _long_tensor(name: str, rest: str) -> LayerTensor:
    joint = re.search(r"Format/Datatype: (.*?) ?\Z", rest)
    if joint:
        return LayerTensor(name, _dtype(joint[1]), joint[1])
    dtype = re.search(r"\bData[tT]ype: (\w+)", rest)
    layout = re.search(r", Format: (.*?) ?\Z", rest)
    return LayerTensor(name, _dtype(dtype[1]) if dtype else "", layout[1] if layout else "")


def _from_fields(entry: Mapping[str, Any]) -> EngineLayer:
    weight = next((entry[key] for key in ("Weights", "ConvWeights") if isinstance(entry.get(key), dict)), None)
    return _layer(
        str(entry.get("Name", "")),
        str(entry.get("LayerType", "")),
        tuple(_json_tensors(entry.get("Inputs"))),
        tuple(_json_tensors(entry.get("Outputs"))),
        constants=tuple(tensor.dtype for tensor in _json_tensors(entry.get("Constants"))),
        weights=_dtype(str(weight.get("Type", ""))) or None if weight else None,
        tactic=str(entry.get("TacticName") or entry.get("TacticValue") or ""),
        metadata=str(entry.get("Metadata") or ""),
    )


def _json_tensors(entries: Any) -> Iterator[LayerTensor]:
    for entry in entries if isinstance(entries, list) else ():
        if isinstance(entry, dict):
            # One sentence up to 10; two fields from 11.
            layout = str(entry.get("Format/Datatype") or entry.get("Format") or "")
            dtype = str(entry.get("Datatype") or entry.get("DataType") or layout)
            yield LayerTensor(str(entry.get("Name", "")), _dtype(dtype), layout)


def _dtype(text: str) -> str:
    """The type that a word or sentence names, such as "Thirty-two wide channel vectorized row major Int8 format"."""
    match = _TYPE_WORD.search(text)
    return _TYPES[match[1].lower()] if match else ""


def _layer(
    name: str,
    kind: str,
    inputs: tuple[LayerTensor, ...],
    outputs: tuple[LayerTensor, ...],
    *,
    constants: tuple[str, ...] = (),
    weights: str | None = None,
    tactic: str = "",
    metadata: str = "",
) -> EngineLayer:
    fused = tuple(name_parts(name))
    return EngineLayer(
        name,
        kind,
        inputs,
        outputs,
        constants,
        weights or (constants[0] if constants and len(inputs) == 1 and _MAC.search(kind) else None),
        tactic,
        tuple(dict.fromkeys(_TAG.findall(metadata))) or fused,
        fused,
        is_reformat=kind == "Reformat" or _only_moves(name, kind),
        is_region=kind == "Myelin" or name.startswith("{ForeignNode["),
    )


def _only_moves(name: str, kind: str) -> bool:
    match = _GENERATED.match(name) if kind == "kgen" else None
    if match is None:
        return False
    operations = set(re.findall("[A-Z][a-z]+", match[1]))
    return operations <= _MOVES or (operations <= {*_MOVES, "Conc"} and "Repl" in operations)
