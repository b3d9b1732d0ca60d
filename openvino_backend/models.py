"""From a rewritten FX graph to a compiled OpenVINO model, its report, and its file in the cache."""

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openvino
import torch
from openvino import opset13
from openvino.frontend import FrontEndManager
from openvino.frontend.pytorch.fx_decoder import TorchFXPythonDecoder

from openvino_backend.cache import open_entry, write_entry
from openvino_backend.compression import quantize_products
from openvino_backend.errors import CacheMissError, OpenVINOBackendError, UnsupportedOperatorsError
from openvino_backend.low_rank import SideInputs, add_side_inputs
from openvino_backend.memory import release_memory
from openvino_backend.options import Options, split_device
from openvino_backend.precision import PRECISION
from openvino_backend.processors import find_processors, limit_openvino
from openvino_backend.running import TYPES, TensorRequest, share_memory
from openvino_backend.tuning import tune_for_cpu

_FILE, _WEIGHTS_FILE = "model.xml", "model.bin"
_WEIGHT = "weight:"
# How many kernels of a kind the CPU plug-in keeps, of sizes that it had before. With its own 5000 each new size of the
# demonstration model takes 2 MB more for each part. One size of SDXL's UNet needs fewer than 200.
_KERNELS = {"CPU_RUNTIME_CACHE_CAPACITY": "200"}


@dataclass(frozen=True)
class ModelReport:
    """What OpenVINO says of one compiled model; every figure is read from it, none from the configuration.

    Attributes:
        devices: where it runs.
        precision: the floating-point type of its arithmetic, as OpenVINO names it: f32, bf16, f16.
        threads: how many a call computes with on a CPU; None on other devices, and where several are named.
        operators: the number of operators it executes.
        inputs: the number of tensors passed at each call.
        quantized_convolutions, quantized_linear_layers: the number of those that it computes in 8 bits.
        constants: the number of weights and other tensors compiled in, by their type.
        loaded_from_cache: true when it came from the cache: nothing was converted, and what OpenVINO keeps compiled, of
            8-bit weights and for other devices than CPUs, was not compiled.
        seconds: the time of conversion, if any, and compilation.
    """

    devices: tuple[str, ...]
    precision: str
    threads: int | None
    operators: int
    inputs: int
    quantized_convolutions: int
    quantized_linear_layers: int
    constants: Mapping[str, int]
    loaded_from_cache: bool
    seconds: float


class CompiledModel:
    """One OpenVINO model of a graph: tensors in, new tensors out.

    Pickled, it is the model's place in the cache; `weights` must be given again before it is loaded.

    Attributes:
        key: names the model in the cache.
        properties: what it is compiled with.
        weights: the tensors compiled in, by their name in the graph.
        sources: for each of these, its name in the module that was compiled, set before pickling.
        file: the one in the cache that OpenVINO maps, with the weights that are not these.
        side_inputs: what it takes beside its inputs.
    """

    def __init__(
        self,
        key: str,
        properties: Mapping[str, Any],
        weights: Mapping[str, torch.Tensor],
        sources: Mapping[str, str] | None = None,
    ) -> None:
        self.key, self.properties, self.weights = key, properties, weights
        self.sources = dict(sources or {})
        self.file: Path | None = None
        self.side_inputs = SideInputs(())

    def __getstate__(self) -> dict[str, Any]:
        return {"key": self.key, "properties": self.properties, "sources": self.sources}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["key"], state["properties"], {}, state["sources"])  # type: ignore[misc]

    def load(
        self,
        options: Options,
        convert: Callable[[], openvino.Model] | None = None,
        *,
        ranks: Mapping[str, int],
    ) -> ModelReport:
        """Compile the model that is in the cache, or else the one that `convert` makes.

        Args:
            ranks: of side inputs, see add_side_inputs.

        Raises:
            CacheMissError: it is in no cache, and there is no `convert`.
            OpenVINOBackendError: the device computes in another precision than the properties say.
        """
        started = time.perf_counter()
        on_cpu = split_device(options.device)[1] == ["CPU"]
        is_packed = on_cpu and options.weight_compression is not None
        with open_entry(options, self.key) as folder:
            model = None if folder is None else read_model(folder, self.weights)
            is_cached = model is not None
            if model is None:
                if convert is None:
                    raise CacheMissError(f"the model {self.key} is not in the cache")
                model = convert()
                if is_packed:  # before it is written, so that the pieces of weights are in the file too
                    tune_for_cpu(model)
                if folder is not None:
                    with write_entry(folder):
                        save_model(model, folder, self.weights)
                        model = read_model(folder, self.weights) or model  # weights of its own are in a file then
            self.file = None if folder is None else folder / _WEIGHTS_FILE
            if on_cpu and not is_packed:
                tune_for_cpu(model)
            if ranks:
                self.side_inputs = add_side_inputs(model, ranks)
            quantize_products(model, options)
            blob = _keep_compiled(folder, on_cpu=on_cpu, is_packed=is_packed)
            threads = limit_openvino(find_processors(), options.device)
            kept = _KERNELS if options.device == "CPU" else {}
            properties = {**threads, **kept, **self.properties, **blob}
            with release_memory(options, (), [self.file]):  # OpenVINO reads the file to know what it has compiled
                compiled = openvino.Core().compile_model(model, options.device, properties)
        precision = _read_precision(compiled, options.device)
        if precision != str(self.properties[PRECISION]):
            raise OpenVINOBackendError(
                f"OpenVINO's {options.device} computes in {precision} here, not in {self.properties[PRECISION]}; "
                f"accept it with config: {{'{PRECISION}': '{precision}'}}"
            )
        self._request = TensorRequest(compiled)
        executed = compiled.get_runtime_model().get_ops()
        return ModelReport(
            devices=tuple(compiled.get_property("EXECUTION_DEVICES")),
            precision=precision,
            threads=compiled.get_property("INFERENCE_NUM_THREADS") if options.device == "CPU" else None,
            operators=len(executed),
            inputs=len(compiled.inputs),
            quantized_convolutions=_count_quantized(executed, "Convolution", "runtimePrecision"),
            quantized_linear_layers=_count_quantized(executed, "FullyConnected", "primitiveType"),
            constants=_count_constants(model),
            loaded_from_cache=is_cached and (not blob or bool(compiled.get_property("LOADED_FROM_CACHE"))),
            seconds=round(time.perf_counter() - started, 3),
        )

    def forward(self, *inputs: torch.Tensor) -> Any:
        """Return the results."""
        return self._request(*inputs, kept=self.side_inputs.find())


def _keep_compiled(folder: Path | None, *, on_cpu: bool, is_packed: bool) -> dict[str, str]:
    """Return the properties by which OpenVINO keeps what it has compiled in the folder, and takes it from there.

    For a CPU that is the model after OpenVINO's own changes, which take it most of its time for 8 bits. It refers to
    the file of the weights, where they are all in ours; weights in torch's memory it would hold again.
    """
    if folder is None or (on_cpu and not is_packed):
        return {}
    weights = {"CACHE_MODE": "OPTIMIZE_SIZE", "WEIGHTS_PATH": str(folder / _WEIGHTS_FILE)} if on_cpu else {}
    return {"CACHE_DIR": str(folder), **weights}


def _read_precision(compiled: openvino.CompiledModel, device: str) -> str:
    """Return the type that the model computes in; of several devices, all that differ."""
    kind, _ = split_device(device)
    several = (
        [compiled.get_property(PRECISION)]
        if kind in (None, "BATCH")
        else [properties[PRECISION] for properties in compiled.get_property("DEVICE_PROPERTIES").values()]
    )
    return "+".join(sorted({each.get_type_name() for each in several}))


def _count_quantized(executed: Iterable[openvino.Node], kind: str, told_by: str) -> int:
    """Return the number of operators of a kind whose arithmetic is in 8 bits.

    Args:
        told_by: the entry of OpenVINO's that ends with its type: of linear layers `runtimePrecision` is that of the
            weights, whatever they are computed in, and `primitiveType` names the kernel.
    """
    abouts = (node.get_rt_info() for node in executed)
    return sum(
        about["layerType"].astype(str) == kind and about[told_by].astype(str).lower().endswith(("i8", "u8"))
        for about in abouts
    )


def _count_constants(model: openvino.Model) -> dict[str, int]:
    """Return the number of constants of more than one element by type; integers only where they are weights."""
    types = [
        node.get_element_type().get_type_name()
        for node in model.get_ops()
        if node.get_type_name() == "Constant" and math.prod(node.shape) > 1
    ]
    return {name: types.count(name) for name in ("f32", "f16", "bf16", "i8", "u8") if name in types}


class _Nodes(list[torch.fx.Node]):
    """The nodes of a graph, each found at once; OpenVINO's decoder looks for each input in all, for SDXL's UNet 5 s."""

    def __init__(self, nodes: Iterable[torch.fx.Node]) -> None:
        super().__init__(nodes)
        self._places = {node: place for place, node in enumerate(self)}

    def index(self, node: Any, *_: Any) -> int:
        return self._places[node]


def convert_graph(part: torch.fx.GraphModule) -> openvino.Model:
    """Return the part as an OpenVINO model that shares its weights with torch."""
    examples = [node.meta["val"] for node in part.graph.find_nodes(op="placeholder")]
    types = [tensor.dtype for tensor in examples]
    shapes = [[size if isinstance(size, int) else -1 for size in tensor.shape] for tensor in examples]
    front_end = FrontEndManager().load_by_framework("pytorch")

    def make_decoder() -> TorchFXPythonDecoder:
        decoder = TorchFXPythonDecoder(part, input_types=types, input_shapes=shapes)
        decoder._nodes = _Nodes(decoder._nodes)
        return decoder

    decoder = make_decoder()  # the model of the front end does not keep it
    try:
        model = front_end.convert(front_end.load(decoder))
    except Exception as error:
        decoder = make_decoder()
        partial = front_end.convert_partially(front_end.load(decoder))
        left = [node for node in partial.get_ops() if node.get_type_name() == "PtFrameworkNode"]
        if not left:
            raise OpenVINOBackendError(f"OpenVINO cannot convert the graph: {error}") from error
        raise UnsupportedOperatorsError(node.get_friendly_name().rpartition("/")[2] for node in left) from error
    for port, dtype, shape in zip(model.inputs, types, shapes, strict=True):
        port.get_node().set_element_type(TYPES[dtype])
        port.get_node().set_partial_shape(openvino.PartialShape(shape))
    model.validate_nodes_and_infer_types()
    return model


def save_model(model: openvino.Model, folder: Path, weights: Mapping[str, torch.Tensor]) -> None:
    """Write the model to the folder without those constants that share the memory of the given weights.

    A weight that was converted on the way, such as a compressed one, is a constant of its own and is written.

    Raises:
        OSError: the files cannot be written.
    """
    names = {
        (tensor.data_ptr(), tuple(tensor.shape)): name
        for name, tensor in weights.items()
        if tensor.numel() and tensor.is_contiguous()  # of any other OpenVINO has a copy
    }
    parameters = []
    for node in model.get_ops():
        if node.get_type_name() == "Constant":
            name = names.get((node.data.ctypes.data, tuple(node.shape)))
            if name is not None:
                parameter = opset13.parameter(list(node.shape), node.get_element_type(), name=_WEIGHT + name)
                node.output(0).replace(parameter.output(0))
                parameters.append(parameter)
    model.add_parameters(parameters)
    try:
        openvino.serialize(model, folder / _FILE)
    except RuntimeError as error:  # of a disk that is full it says "iostream error"
        raise OSError(f"the model cannot be written: {error}") from error
    finally:
        _bind_weights(model, weights)


def read_model(folder: Path, weights: Mapping[str, torch.Tensor]) -> openvino.Model | None:
    """Return the model that save_model wrote, with the weights shared with torch, or None if there is none."""
    if not (folder / _FILE).exists():
        return None
    model = openvino.Core().read_model(folder / _FILE)
    _bind_weights(model, weights)
    return model


def _bind_weights(model: openvino.Model, weights: Mapping[str, torch.Tensor]) -> None:
    """Turn the parameters that stand for weights into constants again."""
    for parameter in model.get_parameters():
        name = parameter.get_friendly_name()
        if name.startswith(_WEIGHT):
            constant = openvino.op.Constant(share_memory(weights[name.removeprefix(_WEIGHT)]), shared_memory=True)
            parameter.output(0).replace(constant.output(0))
            model.remove_parameter(parameter)
    model.validate_nodes_and_infer_types()
