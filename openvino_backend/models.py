"""Compile a rewritten FX graph to an OpenVINO model, report on it, and cache it."""

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
# How many kernels of a kind the CPU plug-in keeps for earlier sizes. With its default of 5000, each new size of the
# demonstration model takes 2 MB more for each part. One size of SDXL's UNet needs fewer than 200.
_KERNELS = {"CPU_RUNTIME_CACHE_CAPACITY": "200"}


@dataclass(frozen=True)
class ModelReport:
    """OpenVINO's report of one compiled model. Every figure is read from it, none from the configuration.

    Attributes:
        devices: where it runs.
        precision: the floating-point type of its arithmetic, as OpenVINO names it: f32, bf16, f16.
        threads: the threads of a call on a CPU. None for other devices, or several.
        operators: the number of executed operators.
        inputs: the number of tensors passed at each call.
        quantized_convolutions, quantized_linear_layers: how many it computes in 8 bits.
        constants: the number of weights and other tensors compiled in, by type.
        loaded_from_cache: true when it came from the cache, without conversion. OpenVINO keeps models in 8 bits, or for
            devices other than CPUs, compiled: these were not compiled again.
        seconds: the time of compilation, and of conversion if any.
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

    Its pickle holds its place in the cache, without weights. Set `weights` again before `load`.

    Attributes:
        key: the model's key in the cache.
        properties: the OpenVINO properties of its compilation.
        weights: the tensors compiled in, by name in the graph.
        sources: the name of each weight in the compiled module, set before pickling.
        file: the cache file that OpenVINO maps, with weights that are not in `weights`.
        side_inputs: its further inputs, see low_rank.py.
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
        """Compile the model from the cache, or else from `convert`.

        Args:
            ranks: the side inputs' ranks, see add_side_inputs.

        Raises:
            CacheMissError: it is not in the cache, and there is no `convert`.
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
                        model = read_model(folder, self.weights) or model  # its own weights are then in a file
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
            with release_memory(options, (), [self.file]):  # OpenVINO reads the file to identify the model
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
    """Return properties that let OpenVINO keep its compiled model in the folder, and load it from there.

    For a CPU this is the model after OpenVINO's own changes, which take most of the time for 8 bits. It refers to our
    file of weights if all weights are there. Weights in torch's memory would be stored again.
    """
    if folder is None or (on_cpu and not is_packed):
        return {}
    weights = {"CACHE_MODE": "OPTIMIZE_SIZE", "WEIGHTS_PATH": str(folder / _WEIGHTS_FILE)} if on_cpu else {}
    return {"CACHE_DIR": str(folder), **weights}


def _read_precision(compiled: openvino.CompiledModel, device: str) -> str:
    """Return the type that the model computes in; for several devices, each different type."""
    kind, _ = split_device(device)
    several = (
        [compiled.get_property(PRECISION)]
        if kind in (None, "BATCH")
        else [properties[PRECISION] for properties in compiled.get_property("DEVICE_PROPERTIES").values()]
    )
    return "+".join(sorted({each.get_type_name() for each in several}))


def _count_quantized(executed: Iterable[openvino.Node], kind: str, told_by: str) -> int:
    """Return the number of operators of a kind that compute in 8 bits.

    Args:
        told_by: the entry of OpenVINO's report that ends with the type. For linear layers `runtimePrecision` is the
            weights' type, whatever they compute in. There `primitiveType` names the kernel.
    """
    abouts = (node.get_rt_info() for node in executed)
    return sum(
        about["layerType"].astype(str) == kind and about[told_by].astype(str).lower().endswith(("i8", "u8"))
        for about in abouts
    )


def _count_constants(model: openvino.Model) -> dict[str, int]:
    """Return the number of constants of more than one element, by type. Integers count as weights only."""
    types = [
        node.get_element_type().get_type_name()
        for node in model.get_ops()
        if node.get_type_name() == "Constant" and math.prod(node.shape) > 1
    ]
    return {name: types.count(name) for name in ("f32", "f16", "bf16", "i8", "u8") if name in types}


class _Nodes(list[torch.fx.Node]):
    """A graph's nodes with fast look-up. OpenVINO's decoder searches them all for each input: 5 s for SDXL's UNet."""

    def __init__(self, nodes: Iterable[torch.fx.Node]) -> None:
        super().__init__(nodes)
        self._places = {node: place for place, node in enumerate(self)}

    def index(self, node: Any, *_: Any) -> int:
        return self._places[node]


def convert_graph(part: torch.fx.GraphModule) -> openvino.Model:
    """Convert the part to an OpenVINO model that shares its weights with torch."""
    examples = [node.meta["val"] for node in part.graph.find_nodes(op="placeholder")]
    types = [tensor.dtype for tensor in examples]
    shapes = [[size if isinstance(size, int) else -1 for size in tensor.shape] for tensor in examples]
    front_end = FrontEndManager().load_by_framework("pytorch")

    def make_decoder() -> TorchFXPythonDecoder:
        decoder = TorchFXPythonDecoder(part, input_types=types, input_shapes=shapes)
        decoder._nodes = _Nodes(decoder._nodes)
        return decoder

    decoder = make_decoder()  # the front end's model does not keep it
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
    """Write the model to the folder, without the constants that share memory with the given weights.

    A converted weight, such as a compressed one, is a constant of its own and is written.

    Raises:
        OSError: the files cannot be written.
    """
    names = {
        (tensor.data_ptr(), tuple(tensor.shape)): name
        for name, tensor in weights.items()
        if tensor.numel() and tensor.is_contiguous()  # OpenVINO copies all others
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
    except RuntimeError as error:  # for a full disk OpenVINO says "iostream error"
        raise OSError(f"the model cannot be written: {error}") from error
    finally:
        _bind_weights(model, weights)


def read_model(folder: Path, weights: Mapping[str, torch.Tensor]) -> openvino.Model | None:
    """Return the model that save_model wrote, or None without one. It shares its weights with torch."""
    if not (folder / _FILE).exists():
        return None
    model = openvino.Core().read_model(folder / _FILE)
    _bind_weights(model, weights)
    return model


def _bind_weights(model: openvino.Model, weights: Mapping[str, torch.Tensor]) -> None:
    """Turn the parameters of weights back into constants."""
    for parameter in model.get_parameters():
        name = parameter.get_friendly_name()
        if name.startswith(_WEIGHT):
            constant = openvino.op.Constant(share_memory(weights[name.removeprefix(_WEIGHT)]), shared_memory=True)
            parameter.output(0).replace(constant.output(0))
            model.remove_parameter(parameter)
    model.validate_nodes_and_infer_types()
