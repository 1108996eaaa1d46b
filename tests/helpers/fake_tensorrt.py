"""TensorRT 8.6, 10 and 11 as far as their Python bindings were recorded, for tests where they are not installed.

Each fake has the names of its version and no others, so that using a removed or future one fails as it would there. Nothing
is compiled: an engine holds the ONNX graph, and ONNX's reference evaluator computes it in "GPU" memory that is the host's.
"""

from __future__ import annotations

import base64
import ctypes
import enum
import json
import weakref
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
from onnx import shape_inference
from onnx.reference import ReferenceEvaluator

_NAMES = {onnx.TensorProto.FLOAT: "FLOAT", onnx.TensorProto.FLOAT16: "HALF", onnx.TensorProto.BFLOAT16: "BF16"}
_NAMES |= {onnx.TensorProto.INT8: "INT8", onnx.TensorProto.INT32: "INT32", onnx.TensorProto.INT64: "INT64"}
_NUMPY = {"FLOAT": "float32", "HALF": "float16", "INT8": "int8", "INT32": "int32", "INT64": "int64"}

VERSIONS = ("8.6.1", "10.7.0", "11.1.0")

# Values differ between versions on purpose: code that used a number instead of a name would set another flag.
_BUILDER_FLAGS = {
    8: {"FP16": 0, "INT8": 1, "REFIT": 5, "TF32": 7, "OBEY_PRECISION_CONSTRAINTS": 10, "VERSION_COMPATIBLE": 15},
    10: {"FP16": 0, "INT8": 1, "REFIT": 4, "TF32": 6, "OBEY_PRECISION_CONSTRAINTS": 9, "VERSION_COMPATIBLE": 13, "BF16": 16},
    11: {"REFIT": 4, "TF32": 6, "VERSION_COMPATIBLE": 12},
}
_BUILDER_FLAGS[8]["PREFER_PRECISION_CONSTRAINTS"] = 11
_BUILDER_FLAGS[10]["PREFER_PRECISION_CONSTRAINTS"] = 10
# Types of layers by ONNX operator, as 8.6.1 parsed exported models.
_LAYERS = {"Conv": "CONVOLUTION", "QuantizeLinear": "QUANTIZE", "DequantizeLinear": "DEQUANTIZE", "Constant": "CONSTANT"}
_LAYERS |= {"MatMul": "MATRIX_MULTIPLY", "Softmax": "SOFTMAX", "Reshape": "SHUFFLE", "Transpose": "SHUFFLE", "Slice": "SLICE"}
_LAYERS |= {"Split": "SLICE", "Gather": "GATHER"}
_NETWORK_FLAGS = {8: {"EXPLICIT_BATCH": 0}, 10: {"EXPLICIT_BATCH": 0, "STRONGLY_TYPED": 1}, 11: {"STRONGLY_TYPED": 0}}
_TACTICS = {
    8: {"CUBLAS": 0, "CUBLAS_LT": 1, "CUDNN": 2, "EDGE_MASK_CONVOLUTIONS": 3, "JIT_CONVOLUTIONS": 4},
    10: {"CUBLAS": 0, "CUBLAS_LT": 1, "CUDNN": 2, "EDGE_MASK_CONVOLUTIONS": 3, "JIT_CONVOLUTIONS": 4},
    11: {"EDGE_MASK_CONVOLUTIONS": 0, "JIT_CONVOLUTIONS": 1},
}
_LEVELS = {8: ("NONE", "AMPERE_PLUS")}
_CALIBRATORS = ("IInt8Calibrator", "IInt8LegacyCalibrator", "IInt8EntropyCalibrator", "IInt8EntropyCalibrator2")
_CALIBRATORS += ("IInt8MinMaxCalibrator",)


class Strict:
    """An object that takes no attributes but its own, as objects of a native module do."""

    _names: tuple[str, ...] = ()

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self._names and not name.startswith("_"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        object.__setattr__(self, name, value)


class FakeTensorRT(ModuleType):
    """One version's module.

    Attributes:
        configs: Configuration of each build.
        network_flags: Argument of each ``create_network``.
        layer_time: Called by a profiled run with a layer's name; its time in ms.
        on_build: Called inside each build with (builder, network, config); may log and return None to fail it.
    """

    def __init__(self, version: str) -> None:
        super().__init__("tensorrt")
        self.__version__ = version
        self.major = int(version.partition(".")[0])
        self.configs: list[Any] = []
        self.network_flags: list[int] = []
        self.on_build: Any = lambda builder, network, config: True
        self.fail_context = False
        self.layer_time: Any = lambda name: 1.0
        _add_enumerations(self)
        _add_classes(self)


def _add_enumerations(trt: Any) -> None:
    trt.BuilderFlag = enum.IntEnum("BuilderFlag", _BUILDER_FLAGS[trt.major])
    trt.NetworkDefinitionCreationFlag = enum.IntEnum("NetworkDefinitionCreationFlag", _NETWORK_FLAGS[trt.major])
    trt.TacticSource = enum.IntEnum("TacticSource", _TACTICS[trt.major])
    levels = _LEVELS.get(trt.major, ("NONE", "AMPERE_PLUS", "SAME_COMPUTE_CAPABILITY"))
    trt.HardwareCompatibilityLevel = enum.Enum("HardwareCompatibilityLevel", levels)
    trt.ProfilingVerbosity = enum.Enum("ProfilingVerbosity", ("LAYER_NAMES_ONLY", "NONE", "DETAILED"))
    trt.MemoryPoolType = enum.Enum("MemoryPoolType", ("WORKSPACE", "DLA_MANAGED_SRAM"))
    trt.LayerType = enum.Enum("LayerType", (*dict.fromkeys(_LAYERS.values()), "ELEMENTWISE"))
    trt.ElementWiseOperation = enum.Enum("ElementWiseOperation", ("SUM", "PROD", "DIV"))
    if trt.major < 11:
        trt.PreviewFeature = enum.Enum("PreviewFeature", ("PROFILE_SHARING_0806",))
    trt.TensorIOMode = enum.Enum("TensorIOMode", ("NONE", "INPUT", "OUTPUT"))
    trt.LayerInformationFormat = enum.Enum("LayerInformationFormat", ("ONELINE", "JSON"))
    names = ["FLOAT", "HALF", "INT8", "INT32", "BOOL", "UINT8", "FP8", *(["BF16", "INT64", "INT4"] if trt.major > 8 else [])]
    trt.DataType = enum.Enum("DataType", names)


def _add_classes(trt: Any) -> None:
    class ILogger:
        def __init__(self) -> None:
            pass

    for i, name in enumerate(("INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE")):
        setattr(ILogger, name, f"severity {i}")
    trt.ILogger = ILogger
    trt.IElementWiseLayer = ElementWise
    trt.IProfiler = type("IProfiler", (), {"__init__": lambda self: None})
    trt.Builder = lambda logger: Builder(trt, logger)
    trt.OnnxParser = lambda network, logger: Parser(trt, network, logger)
    trt.Runtime = lambda logger: Runtime(trt, logger)
    names = ["profiling_verbosity", "builder_optimization_level", "hardware_compatibility_level", "avg_timing_iterations"]
    if trt.major < 11:
        names.append("int8_calibrator")
        for name in _CALIBRATORS:
            setattr(trt, name, type(name, (), {"__init__": lambda self: None}))
    if trt.major > 8:
        names.append("progress_monitor")
        trt.IProgressMonitor = type("IProgressMonitor", (), {"__init__": lambda self: None})
    trt.IBuilderConfig = type("IBuilderConfig", (_Config,), {"_names": tuple(names), "_trt": trt})
    if trt.major < 11:
        trt.IBuilderConfig.set_calibration_profile = lambda self, profile: self._calls.append(("calibration_profile", profile))


class _Config(Strict):
    _trt: Any

    def __init__(self) -> None:
        self._flags = {self._trt.BuilderFlag.TF32}
        self._calls: list[tuple[str, Any]] = []
        self._profiles: list[Any] = []
        self._cache: Any = None

    def set_flag(self, flag: Any) -> None:
        assert isinstance(flag, self._trt.BuilderFlag)
        self._flags.add(flag)

    def clear_flag(self, flag: Any) -> None:
        assert isinstance(flag, self._trt.BuilderFlag)
        self._flags.discard(flag)

    def set_preview_feature(self, feature: Any, on: bool) -> None:
        assert isinstance(feature, self._trt.PreviewFeature)
        self._calls.append(("preview", (feature.name, on)))

    def set_memory_pool_limit(self, pool: Any, size: int) -> None:
        self._calls.append(("memory", (pool.name, size)))

    def set_tactic_sources(self, mask: int) -> bool:
        self._calls.append(("tactic_sources", mask))
        return True

    def add_optimization_profile(self, profile: Any) -> int:
        self._profiles.append(profile)
        return len(self._profiles) - 1

    def create_timing_cache(self, content: bytes) -> Any:
        return _TimingCache(content)

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        if cache.content and not cache.content.startswith(self._trt.__version__.encode()):
            return False
        self._cache = cache
        return True

    def get_timing_cache(self) -> Any:
        return self._cache

    @property
    def flags(self) -> set[str]:
        return {flag.name for flag in self._flags}

    def called(self, name: str) -> list[Any]:
        return [value for key, value in self._calls if key == name]


class _TimingCache:
    def __init__(self, content: bytes) -> None:
        self.content = content

    def serialize(self) -> bytearray:
        return bytearray(self.content)


class Builder:
    def __init__(self, trt: Any, logger: Any) -> None:
        self.trt, self.logger = trt, logger

    def create_network(self, flags: int) -> Network:
        self.trt.network_flags.append(flags)
        return Network(self.trt)

    def create_builder_config(self) -> Any:
        config = self.trt.IBuilderConfig()
        self.trt.configs.append(config)
        return config

    def create_optimization_profile(self) -> dict[str, Any]:
        return Profile()

    def build_serialized_network(self, network: Network, config: Any) -> bytearray | None:
        self.logger.log(self.trt.ILogger.VERBOSE, "Engine Layer Information: none")
        dequantized = [t for layer in network.layers if layer.type.name == "DEQUANTIZE" for t in layer._tensors]
        if self.trt.major == 8 and any(tensor in dequantized for tensor in network.marked):
            # Seen in 8.6.1.
            self.logger.log(self.trt.ILogger.INTERNAL_ERROR, "Assertion static_cast<size_t>(c) < mSet.size() failed.")
            return None
        if not self.trt.on_build(self, network, config):
            return None
        if config.get_timing_cache() is not None:
            config.get_timing_cache().content = self.trt.__version__.encode() + b" tactics"
        profile = config._profiles[0].shapes if config._profiles else {}
        plan = {"version": self.trt.__version__, "graph": base64.b64encode(network.proto.SerializeToString()).decode()}
        plan["outputs"] = [t.name for t in network.marked]
        # Since 10, contexts share a profile without being told to.
        plan["sharing"] = self.trt.major > 8 or ("PROFILE_SHARING_0806", True) in config.called("preview")
        plan["profile"] = {t.name: profile.get(t.name, [t.shape] * 3) for t in network.entries}
        return bytearray(json.dumps(plan).encode())


class Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, tuple[Any, ...]] = {}

    def set_shape(self, name: str, low: Any, opt: Any, high: Any) -> None:
        self.shapes[name] = (tuple(low), tuple(opt), tuple(high))


class Tensor(Strict):
    _names = ("name",)

    def __init__(self, trt: Any, name: str, dtype: str, shape: tuple[int, ...]) -> None:
        self.name, self._dtype, self._shape = name, trt.DataType[dtype], shape

    dtype = property(lambda self: self._dtype)
    shape = property(lambda self: self._shape)
    is_shape_tensor = property(lambda self: False)


class Layer(Strict):
    def __init__(self, trt: Any, node: onnx.NodeProto, tensors: list[Tensor], inputs: list[Tensor] | None = None) -> None:
        # 11 has neither precision nor set_output_type.
        self._names = ("precision",) if trt.major < 11 else ()
        self._trt, self._node, self._tensors, self._inputs, self._types = trt, node, tensors, inputs or [], {}

    name = property(lambda self: self._node.name)
    num_inputs = property(lambda self: len(self._inputs))
    num_outputs = property(lambda self: len(self._tensors))

    @property
    def type(self) -> Any:
        return self._trt.LayerType[_LAYERS.get(self._node.op_type, "ELEMENTWISE")]

    def get_input(self, i: int) -> Tensor:
        return self._inputs[i]

    def get_output(self, i: int) -> Tensor:
        return self._tensors[i]

    def set_output_type(self, i: int, dtype: Any) -> None:
        assert self._trt.major < 11
        self._types[i] = dtype


class ElementWise(Layer):
    """What ``get_layer`` hands out is a plain layer; it becomes one of these by assigning its class."""

    @property
    def op(self) -> Any:
        return self._trt.ElementWiseOperation[{"Mul": "PROD", "Div": "DIV"}.get(self._node.op_type, "SUM")]


class Network:
    def __init__(self, trt: Any) -> None:
        self.trt = trt
        self.entries: list[Tensor] = []
        self.marked: list[Tensor] = []
        self.layers: list[Layer] = []

    num_inputs = property(lambda self: len(self.entries))
    num_outputs = property(lambda self: len(self.marked))
    num_layers = property(lambda self: len(self.layers))

    def get_input(self, i: int) -> Tensor:
        return self.entries[i]

    def get_output(self, i: int) -> Tensor:
        return self.marked[i]

    def get_layer(self, i: int) -> Layer:
        return self.layers[i]

    def mark_output(self, tensor: Tensor) -> None:
        self.marked.append(tensor)

    def add_identity(self, tensor: Tensor) -> Layer:
        copied = Tensor(self.trt, "", tensor.dtype.name, tensor.shape)
        node = onnx.helper.make_node("Identity", [tensor.name], [""], name=f"(Unnamed Layer* {self.num_layers}) [Identity]")
        self.layers.append(Layer(self.trt, node, [copied]))
        return self.layers[-1]

    def read(self, proto: onnx.ModelProto) -> None:
        self.proto = proto
        graph = shape_inference.infer_shapes(proto).graph
        known = {value.name: self._tensor(value) for value in (*graph.input, *graph.value_info, *graph.output)}
        self.entries = [known[value.name] for value in graph.input]
        self.marked = [known[value.name] for value in graph.output]
        constants = {}
        for weight in graph.initializer:
            kind = _NAMES[weight.data_type]
            kind = kind if kind in self.trt.DataType.__members__ else "INT32"  # 8.6 has no INT64
            constants[weight.name] = Tensor(self.trt, weight.name, kind, tuple(weight.dims))
        known |= constants
        self.layers = []
        for node in graph.node:
            inputs = [known[name] for name in node.input if name]
            # Weights are layers, scales and biases of layers that have such are not.
            own = node.input if node.op_type in ("MatMul", "Mul", "Add", "Div") else node.input[:1]
            for name in own:
                if name in constants:
                    weight = onnx.helper.make_node("Constant", [], [name], name=name)
                    self.layers.append(Layer(self.trt, weight, [constants[name]]))
            self.layers.append(Layer(self.trt, node, [known[name] for name in node.output], inputs))

    def _tensor(self, value: onnx.ValueInfoProto) -> Tensor:
        kind = value.type.tensor_type
        shape = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in kind.shape.dim)
        return Tensor(self.trt, value.name, _NAMES[kind.elem_type], shape)


class Parser:
    def __init__(self, trt: Any, network: Network, logger: Any) -> None:
        self.trt, self.network, self.errors = trt, network, []

    num_errors = property(lambda self: len(self.errors))

    def get_error(self, i: int) -> Any:
        return self.errors[i]

    def parse(self, content: bytes) -> bool:
        return self._read(onnx.load_from_string(content))

    def parse_from_file(self, path: str) -> bool:
        return self._read(onnx.load(path))

    def _read(self, proto: onnx.ModelProto) -> bool:
        unknown = [i for i, node in enumerate(proto.graph.node) if node.domain not in ("", "ai.onnx")]
        if unknown:
            self.errors = [ParserError(self.trt, i, proto.graph.node[i]) for i in unknown]
            return False
        self.network.read(proto)
        return True


class ParserError:
    def __init__(self, trt: Any, index: int, node: onnx.NodeProto) -> None:
        self._index = index
        if trt.major > 8:
            self.node_name, self.node_operator = lambda: node.name, lambda: node.op_type

    def node(self) -> int:
        return self._index

    def desc(self) -> str:
        return "Plugin not found"


class Runtime(Strict):
    _names = ("engine_host_code_allowed",)

    def __init__(self, trt: Any, logger: Any) -> None:
        self._trt, self._logger = trt, logger

    def deserialize_cuda_engine(self, plan: bytes) -> Engine | None:
        error = self._trt.ILogger.ERROR
        try:
            content = json.loads(plan)
        except ValueError:
            self._logger.log(error, "Error Code 1: Serialization (magicTag assertion failed)")
            return None
        if content["version"] != self._trt.__version__:
            self._logger.log(error, f"expecting library version {self._trt.__version__} got {content['version']}")
            return None
        return Engine(self._trt, content, self._logger)


class Engine:
    def __init__(self, trt: Any, plan: dict[str, Any], logger: Any) -> None:
        self.trt, self.plan, self.logger = trt, plan, logger
        self.alive: weakref.WeakSet[Context] = weakref.WeakSet()
        self.network = Network(trt)
        self.network.read(onnx.load_from_string(base64.b64decode(plan["graph"])))
        known = {tensor.name: tensor for layer in self.network.layers for tensor in layer._tensors}
        self.tensors = {t.name: t for t in (*self.network.entries, *(known[name] for name in plan["outputs"]))}

    num_io_tensors = property(lambda self: len(self.tensors))

    def get_tensor_name(self, i: int) -> str:
        return list(self.tensors)[i]

    def get_tensor_mode(self, name: str) -> Any:
        return self.trt.TensorIOMode.INPUT if name in self.plan["profile"] else self.trt.TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return self.tensors[name].dtype

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        assert profile == 0
        return [tuple(shape) for shape in self.plan["profile"][name]]

    def create_execution_context(self) -> Context | None:
        if self.trt.fail_context:
            self.logger.log(self.trt.ILogger.ERROR, "Error Code 2: OutOfMemory (no further information)")
            return None
        return Context(self)

    def create_engine_inspector(self) -> Any:
        return Inspector(self)


class Inspector(Strict):
    """Tells layers by name and type; of open dimensions no types, until it has a context that knows their sizes.

    Like the real one it does not keep the context alive.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._context: Any = None

    @property
    def execution_context(self) -> Context | None:
        if self._context is None:
            return None
        context = self._context()
        assert context is not None, "the process would crash: the context is gone"
        return context

    @execution_context.setter
    def execution_context(self, context: Context) -> None:
        self._context = weakref.ref(context)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "execution_context":
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def get_engine_information(self, form: Any) -> str:
        assert form.name == "JSON"
        inputs = [self._engine.tensors[name] for name in self._engine.plan["profile"]]
        shapes = self.execution_context.shapes if self.execution_context is not None else {}
        known = all(-1 not in shapes.get(tensor.name, tensor.shape) for tensor in inputs)
        layers = []
        for layer in self._engine.network.layers:
            outputs = [layer.get_output(i) for i in range(layer.num_outputs)]
            kind = {"FLOAT": "Row major linear FP32", "INT8": "Row major Int8 format"}
            formats = [kind[tensor.dtype.name] if known else "N/A due to dynamic shapes" for tensor in outputs]
            described = [{"Name": t.name, "Format/Datatype": f} for t, f in zip(outputs, formats, strict=True)]
            layers.append({"Name": layer.name, "LayerType": layer.type.name, "Inputs": [], "Outputs": described})
        return json.dumps({"Layers": layers, "Bindings": [tensor.name for tensor in inputs]})


class Context:
    """Computes the outputs in the memory at the addresses given, with the shapes given."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        # Seen in 8.6.1: a second context takes shapes, but runs only if they are fixed. That it says -1 then, too, is the worst
        # that the documentation allows.
        taken = any(other.active_optimization_profile == 0 for other in engine.alive)
        self.active_optimization_profile = -1 if taken and not engine.plan["sharing"] else 0
        engine.alive.add(self)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.streams: list[int] = []
        self.profiler: Any = None

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = tuple(shape)
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._evaluate({k: np.zeros(s, self._dtype(k)) for k, s in self.shapes.items()})[name].shape)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return address != 0

    def execute_async_v3(self, stream: int) -> bool:
        self.streams.append(stream)
        ranges = any(low != high for low, _, high in self.engine.plan["profile"].values())
        if self.active_optimization_profile < 0 and ranges:
            message = "2:  Error Code 2: Internal Error (Assertion mOptimizationProfile >= 0 failed. )"
            self.engine.logger.log(self.engine.trt.ILogger.ERROR, message)
            return False
        inputs = {name: self._view(name, shape) for name, shape in self.shapes.items()}
        for name, value in self._evaluate(inputs).items():
            self._view(name, value.shape)[...] = value
        # ``enqueue_emits_profile`` is on by default.
        if self.profiler is not None:
            for layer in self.engine.network.layers:
                self.profiler.report_layer_time(layer.name, self.engine.trt.layer_time(layer.name))
        return True

    def _dtype(self, name: str) -> np.dtype[Any]:
        return np.dtype(_NUMPY[self.engine.tensors[name].dtype.name])

    def _view(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        size = int(np.prod(shape)) * self._dtype(name).itemsize
        raw = (ctypes.c_uint8 * size).from_address(self.addresses[name])
        return np.frombuffer(raw, self._dtype(name)).reshape(shape)

    def _evaluate(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        names = self.engine.plan["outputs"]
        return dict(zip(names, ReferenceEvaluator(self.engine.network.proto).run(names, inputs), strict=True))


class FakeCudaLibrary:
    """The functions of libcudart that are used, on host memory.

    Attributes:
        memory: Blocks that are allocated, by address.
        limit: Bytes there are.
        events: Calls on streams and events, in order.
    """

    def __init__(self, devices: int = 1, limit: int = 1 << 20) -> None:
        self.count, self.limit, self.device = devices, limit, 0
        self.memory: dict[int, Any] = {}
        self.events: list[tuple[Any, ...]] = []
        self.handles = 100
        self.cudaGetErrorString = lambda status: {2: b"out of memory", 35: b"driver version is insufficient"}[status]

    @property
    def allocated(self) -> int:
        return sum(ctypes.sizeof(block) for block in self.memory.values())

    def cudaGetLastError(self) -> int:
        return 0

    def cudaGetDeviceCount(self, count: Any) -> int:
        count._obj.value = self.count
        return 0 if self.count else 35

    def cudaGetDevice(self, device: Any) -> int:
        device._obj.value = self.device
        return 0

    def cudaDeviceGetAttribute(self, value: Any, attribute: Any, device: Any) -> int:
        # Numbered as in cuda_runtime_api.h: 75 and 76 are the compute capability.
        value._obj.value = {75: 8, 76: 9}[attribute.value]
        assert device.value == self.device
        return 0

    def cudaMalloc(self, pointer: Any, size: Any) -> int:
        if self.allocated + size.value > self.limit:
            return 2
        block = (ctypes.c_uint8 * size.value)()
        pointer._obj.value = ctypes.addressof(block)
        self.memory[ctypes.addressof(block)] = block
        return 0

    def cudaFree(self, pointer: Any) -> int:
        del self.memory[pointer.value]
        return 0

    def cudaMemcpyAsync(self, to: Any, source: Any, size: Any, kind: Any, stream: Any) -> int:
        device = to if kind.value == 1 else source
        block = self.memory[device.value]
        assert size.value <= ctypes.sizeof(block), "copy beyond the buffer"
        ctypes.memmove(to.value, source.value, size.value)
        return 0

    def _handle(self, what: str, pointer: Any) -> int:
        self.handles += 1
        pointer._obj.value = self.handles
        self.events.append((what, self.handles))
        return 0

    def cudaStreamCreate(self, pointer: Any) -> int:
        return self._handle("create stream", pointer)

    def cudaStreamSynchronize(self, stream: Any) -> int:
        self.events.append(("synchronize", stream.value))
        return 0

    def cudaStreamDestroy(self, stream: Any) -> int:
        self.events.append(("destroy stream", stream.value))
        return 0

    def cudaEventCreateWithFlags(self, pointer: Any, flags: Any) -> int:
        return self._handle("create event", pointer)

    def cudaEventRecord(self, event: Any, stream: Any) -> int:
        self.events.append(("record", event.value, stream.value))
        return 0

    def cudaStreamWaitEvent(self, stream: Any, event: Any, flags: Any) -> int:
        self.events.append(("wait", stream.value, event.value))
        return 0

    def cudaEventSynchronize(self, event: Any) -> int:
        self.events.append(("synchronize event", event.value))
        return 0

    def cudaEventDestroy(self, event: Any) -> int:
        self.events.append(("destroy event", event.value))
        return 0


def graph(
    folder: Path, *, quantized: bool = False, dtype: str = "FLOAT", shape: tuple[Any, ...] = ("n", 4), ops: str = ""
) -> Path:
    """A file with y = x + x, behind a Q/DQ pair if asked; input ``x``, output ``y``, the intermediate tensor ``middle``."""
    kind = getattr(onnx.TensorProto, dtype)
    nodes = []
    if quantized:
        nodes.append(onnx.helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["codes"], "quantize"))
        nodes.append(onnx.helper.make_node("DequantizeLinear", ["codes", "scale", "zero"], ["middle"], "dequantize"))
    else:
        nodes.append(onnx.helper.make_node("Neg", ["x"], ["middle"], "negate"))
    nodes.append(onnx.helper.make_node("Add", ["middle", "middle"], ["y"], "sum"))
    if ops:
        nodes[-1] = onnx.helper.make_node(ops, ["middle"], ["y"], "odd", domain="somewhere")
    constants = [
        onnx.numpy_helper.from_array(np.array(0.5, np.float32), "scale"),
        onnx.numpy_helper.from_array(np.array(0, np.int8), "zero"),
    ]
    values = [onnx.helper.make_tensor_value_info(name, kind, shape) for name in ("x", "y")]
    imports = [onnx.helper.make_opsetid("", 17), *([onnx.helper.make_opsetid("somewhere", 1)] if ops else [])]
    proto = onnx.helper.make_graph(nodes, "graph", values[:1], values[1:], constants if quantized else [])
    path = folder / "graph.onnx"
    onnx.save(onnx.helper.make_model(proto, opset_imports=imports, ir_version=8), path)
    return path
