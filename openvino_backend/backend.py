"""From the FX graph of torch.compile to compiled OpenVINO models."""

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openvino
import torch
from openvino.frontend import FrontEndManager
from openvino.frontend.pytorch.fx_decoder import TorchFXPythonDecoder
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx.passes.split_module import split_module

from openvino_backend.options import Options

logger = logging.getLogger(__name__)

# Angles reach 1,000 in a diffusion model's time embedding, where bfloat16 is exact to 4: their sines would be noise.
_NEEDS_FLOAT32 = (torch.ops.aten.sin.default, torch.ops.aten.cos.default)
_PRECISION = "INFERENCE_PRECISION_HINT"
_TYPES = {
    torch.float32: openvino.Type.f32,
    torch.float16: openvino.Type.f16,
    torch.bfloat16: openvino.Type.bf16,
    torch.int64: openvino.Type.i64,
    torch.int32: openvino.Type.i32,
    torch.int16: openvino.Type.i16,
    torch.int8: openvino.Type.i8,
    torch.uint8: openvino.Type.u8,
    torch.bool: openvino.Type.boolean,
    torch.float64: openvino.Type.f64,
}


class OpenVINOBackendError(RuntimeError):
    """A graph that cannot run on OpenVINO; the message says what stands in the way."""


@dataclass(frozen=True)
class GraphReport:
    """What OpenVINO says of one compiled model; every figure is read from it, none from the configuration.

    Attributes:
        devices: where it runs.
        precision: the floating-point type of its arithmetic, as OpenVINO names it: f32, bf16, f16.
        operators: the number of operators it executes.
        inputs: the number of tensors passed at each call.
        constants: the number of weights and other tensors compiled in.
        loaded_from_cache: true when it came from the cache instead of being compiled.
        seconds: the time of conversion and compilation.
    """

    devices: tuple[str, ...]
    precision: str
    operators: int
    inputs: int
    constants: int
    loaded_from_cache: bool
    seconds: float


class OpenVINOBackend:
    """The `backend=` of one torch.compile call.

    The weights are compiled in: a later change of the module's parameters has no effect on the compiled graph.

    Attributes:
        reports: one entry per compiled model. A graph becomes two models where part of it needs float32.

    Raises:
        OptionsError: wrong options.
    """

    def __init__(self, options: Mapping[str, Any] | None = None) -> None:
        self.options = Options.parse(options)
        self.reports: list[GraphReport] = []

    def __call__(self, graph: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """Compile a graph of dynamo's; called by torch.compile."""
        constants = {
            index: value.detach()
            for index, (node, value) in enumerate(
                zip(graph.graph.find_nodes(op="placeholder"), example_inputs, strict=True)
            )
            if "_dynamo_static_input_type" in (node.meta.get("tensor_dict") or {})
        }

        def compile_inference(aten: torch.fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
            with unset_fake_temporarily():  # the weights are real
                return self._compile_aten(aten, constants)

        compiler = aot_autograd(fw_compiler=_refuse_training, inference_compiler=compile_inference)
        return compiler(graph, example_inputs)

    def _compile_aten(self, graph: torch.fx.GraphModule, constants: Mapping[int, torch.Tensor]) -> Callable[..., Any]:
        placeholders = graph.graph.find_nodes(op="placeholder")
        for node in placeholders:
            if isinstance(node.meta["val"], torch.SymInt):
                raise OpenVINOBackendError("the graph has dynamic shapes; compile with dynamic=False")
        values = {placeholders[index].name: value for index, value in constants.items()}
        sensitive = _find_sensitive(graph.graph)
        split = split_module(graph, graph, lambda node: int(node not in sensitive), keep_original_order=True)
        for node in split.graph.find_nodes(op="call_module"):
            part = split.get_submodule(node.target)
            is_sensitive = node.target == "submod_0" and bool(sensitive)
            node.args = _bind_constants(part, node.args, values)
            split.set_submodule(node.target, self._compile_part(part, in_float32=is_sensitive))
        split.recompile()

        def run(arguments: list[Any]) -> Any:
            with torch.no_grad():
                return split(*arguments)

        run._boxed_call = True  # type: ignore[attr-defined]  # aot_autograd then passes its arguments as one list
        return run

    def _compile_part(self, part: torch.fx.GraphModule, *, in_float32: bool) -> "_CompiledPart":
        started = time.perf_counter()
        model, constants = _convert_graph(part)
        core = openvino.Core()
        properties = {_PRECISION: _name_precision(part), **self.options.config}
        if in_float32:
            properties[_PRECISION] = "f32"
        if self.options.model_caching:
            properties.setdefault("CACHE_DIR", str(_make_cache_dir(self.options.cache_dir)))
        compiled = core.compile_model(model, self.options.device, properties)
        report = GraphReport(
            devices=tuple(compiled.get_property("EXECUTION_DEVICES")),
            precision=compiled.get_property(_PRECISION).get_type_name(),
            operators=len(compiled.get_runtime_model().get_ops()),
            inputs=len(compiled.inputs),
            constants=constants,
            loaded_from_cache=bool(compiled.get_property("LOADED_FROM_CACHE")),
            seconds=round(time.perf_counter() - started, 3),
        )
        if report.precision != str(properties[_PRECISION]):
            raise OpenVINOBackendError(
                f"OpenVINO's {self.options.device} computes in {report.precision} here, not in "
                f"{properties[_PRECISION]}; accept it with config: {{'{_PRECISION}': '{report.precision}'}}"
            )
        logger.info("OpenVINO runs a graph: %s", report)
        self.reports.append(report)
        return _CompiledPart(compiled)


class _CompiledPart(torch.nn.Module):
    """A compiled OpenVINO model as a module: tensors in, new tensors out, one call at a time."""

    def __init__(self, compiled: openvino.CompiledModel) -> None:
        super().__init__()
        dtypes = {openvino_type: dtype for dtype, openvino_type in _TYPES.items()}
        self._request = compiled.create_infer_request()
        self._outputs = [(tuple(port.shape), dtypes[port.element_type]) for port in compiled.outputs]
        self._lock = threading.Lock()

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        inputs = tuple(tensor.contiguous() for tensor in inputs)
        outputs = tuple(torch.empty(shape, dtype=dtype) for shape, dtype in self._outputs)
        with self._lock:
            for index, tensor in enumerate(inputs):
                self._request.set_input_tensor(index, _share_memory(tensor))
            for index, tensor in enumerate(outputs):
                self._request.set_output_tensor(index, _share_memory(tensor))
            self._request.infer()
        return outputs[0] if len(outputs) == 1 else outputs


def compile_graph(
    graph: torch.fx.GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """Compile a graph; registered with dynamo as `openvino_backend`. OpenVINOBackend also keeps the reports."""
    return OpenVINOBackend(options)(graph, example_inputs)


def _refuse_training(*_: Any) -> Callable[..., Any]:
    raise OpenVINOBackendError("OpenVINO runs inference only; call the module under torch.no_grad()")


def _find_sensitive(graph: torch.fx.Graph) -> set[torch.fx.Node]:
    """Return the nodes that must run in float32: sines and cosines with all they are computed from."""
    pending = [node for node in graph.nodes if node.target in _NEEDS_FLOAT32]
    found: set[torch.fx.Node] = set()
    while pending:
        node = pending.pop()
        if node.op == "call_function" and node not in found:
            found.add(node)
            pending.extend(node.all_input_nodes)
    return found


def _bind_constants(
    part: torch.fx.GraphModule, arguments: Sequence[torch.fx.Node], values: Mapping[str, torch.Tensor]
) -> tuple[torch.fx.Node, ...]:
    """Turn the part's inputs that have a known value into constants; return the arguments that remain."""
    remaining = []
    for placeholder, argument in zip(part.graph.find_nodes(op="placeholder"), arguments, strict=True):
        if argument.name not in values:
            remaining.append(argument)
            continue
        part.register_buffer(placeholder.name, values[argument.name])
        with part.graph.inserting_before(placeholder):
            constant = part.graph.get_attr(placeholder.name)
        constant.meta = placeholder.meta
        placeholder.replace_all_uses_with(constant)
        part.graph.erase_node(placeholder)
    part.recompile()
    return tuple(remaining)


def _convert_graph(part: torch.fx.GraphModule) -> tuple[openvino.Model, int]:
    """Return the part as an OpenVINO model, its weights shared with torch, and the number of its constants."""
    examples = [node.meta["val"] for node in part.graph.find_nodes(op="placeholder")]
    front_end = FrontEndManager().load_by_framework("pytorch")
    decoder = TorchFXPythonDecoder(
        part, input_shapes=[tensor.shape for tensor in examples], input_types=[tensor.dtype for tensor in examples]
    )
    try:
        model = front_end.convert(front_end.load(decoder))
    except Exception as error:
        raise OpenVINOBackendError(f"OpenVINO cannot convert the graph: {error}") from error
    for port, tensor in zip(model.inputs, examples, strict=True):
        port.get_node().set_element_type(_TYPES[tensor.dtype])
        port.get_node().set_partial_shape(openvino.PartialShape(list(tensor.shape)))
    model.validate_nodes_and_infer_types()
    return model, len(part.graph.find_nodes(op="get_attr"))


def _name_precision(part: torch.fx.GraphModule) -> str:
    """Return the type that most weights have, or else the inputs, by OpenVINO's name."""
    tensors = [*part.buffers(), *(node.meta["val"] for node in part.graph.find_nodes(op="placeholder"))]
    sizes = {torch.float32: 0, torch.bfloat16: 0, torch.float16: 0}
    for tensor in tensors:
        if tensor.dtype in sizes:
            sizes[tensor.dtype] += tensor.numel()
    return _TYPES[max(sizes, key=lambda dtype: sizes[dtype])].get_type_name()


def _make_cache_dir(name: str) -> Path:
    folder = Path(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OpenVINOBackendError(f"cannot make the cache folder {folder}: {error}") from error
    return folder


def _share_memory(tensor: torch.Tensor) -> openvino.Tensor:
    """Return an OpenVINO tensor over the memory of a contiguous torch tensor, which must outlive it."""
    raw = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor  # numpy has no bfloat16
    return openvino.Tensor(raw.numpy(), openvino.Shape(list(tensor.shape)), _TYPES[tensor.dtype])
