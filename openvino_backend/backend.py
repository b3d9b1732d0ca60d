"""From the FX graph of torch.compile to compiled OpenVINO models."""

import contextlib
import hashlib
import logging
import math
import operator
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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

from openvino_backend.cache import open_entry
from openvino_backend.options import Options, split_device
from openvino_backend.runtime import TYPES, CompiledModule

logger = logging.getLogger(__name__)
aten = torch.ops.aten

# Angles reach 1,000 in a diffusion model's time embedding, where bfloat16 is exact to 4: their sines would be noise.
_NEEDS_FLOAT32 = (aten.sin.default, aten.cos.default)
# torch would decompose these into index arithmetic while tracing; OpenVINO has one operator for each.
_KEPT_WHOLE = (
    aten.upsample_nearest1d.vec,
    aten.upsample_nearest1d.default,
    aten.upsample_nearest2d.vec,
    aten.upsample_nearest2d.default,
    aten.upsample_nearest3d.vec,
    aten.upsample_nearest3d.default,
)
_VIEWS = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)
_SHORT = (torch.float16, torch.bfloat16)
_PRECISION = "INFERENCE_PRECISION_HINT"


class OpenVINOBackendError(RuntimeError):
    """A graph that cannot run on OpenVINO; the message says what stands in the way."""


class UnsupportedOperatorsError(OpenVINOBackendError):
    """OpenVINO's front end has no translation for these operators of the graph."""

    def __init__(self, operators: Iterable[str]) -> None:
        self.operators = frozenset(operators)
        super().__init__(
            f"OpenVINO has no {', '.join(sorted(self.operators))}; with strict: false these would run in PyTorch"
        )


@dataclass(frozen=True)
class ModelReport:
    """What OpenVINO says of one compiled model; every figure is read from it, none from the configuration.

    Attributes:
        devices: where it runs.
        precision: the floating-point type of its arithmetic, as OpenVINO names it: f32, bf16, f16.
        operators: the number of operators it executes.
        inputs: the number of tensors passed at each call.
        constants: the number of weights and other tensors compiled in, by their type.
        loaded_from_cache: true when it came from the cache instead of being compiled.
        seconds: the time of conversion and compilation.
    """

    devices: tuple[str, ...]
    precision: str
    operators: int
    inputs: int
    constants: Mapping[str, int]
    loaded_from_cache: bool
    seconds: float


@dataclass(frozen=True)
class GraphReport:
    """What became of one graph of torch.compile.

    Attributes:
        models: the OpenVINO models, in the order they run: one, and another for what must run in float32.
        operators_outside: the operators that run in PyTorch, by name; none unless `strict` is off.
        weights_sha256: the digest of the weights compiled in.
    """

    models: tuple[ModelReport, ...]
    operators_outside: tuple[str, ...]
    weights_sha256: str


class OpenVINOBackend:
    """The `backend=` of one torch.compile call.

    The weights are compiled in: a later change of the module's parameters has no effect on the compiled graph.

    Attributes:
        reports: one entry per compiled graph.

    Raises:
        OptionsError: wrong options.
    """

    def __init__(self, options: Mapping[str, Any] | None = None) -> None:
        self.options = Options.parse(options)
        self.reports: list[GraphReport] = []

    def __call__(self, graph: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """Compile a graph of dynamo's; called by torch.compile."""
        if len(self.reports) >= self.options.max_graphs:
            raise OpenVINOBackendError(
                f"{len(self.reports)} graphs are compiled already, each with its weights: call the module with fewer "
                "different shapes, or raise the option 'max_graphs'"
            )
        placeholders = graph.graph.find_nodes(op="placeholder")
        constants = {
            index: value.detach()
            for index, (node, value) in enumerate(zip(placeholders, example_inputs, strict=True))
            if "_dynamo_static_input_type" in (node.meta.get("tensor_dict") or {})
        }

        def compile_inference(traced: torch.fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
            with unset_fake_temporarily():  # the weights are real
                return self._compile_traced(traced, constants)

        compiler = aot_autograd(fw_compiler=_refuse_training, inference_compiler=compile_inference)
        with _keep_whole(_KEPT_WHOLE):
            return compiler(graph, example_inputs)

    def _compile_traced(self, graph: torch.fx.GraphModule, constants: Mapping[int, torch.Tensor]) -> Callable[..., Any]:
        placeholders = graph.graph.find_nodes(op="placeholder")
        if any(isinstance(node.meta["val"], torch.SymInt) for node in placeholders):
            raise OpenVINOBackendError("the graph has dynamic shapes; compile with dynamic=False")
        changed = set(torch._guards.TracingContext.get().fw_metadata.mutated_inp_runtime_indices) & set(constants)
        if changed:
            names = ", ".join(sorted(placeholders[index].name for index in changed))
            raise OpenVINOBackendError(
                f"the module changes its own parameters or buffers ({names}), which are compiled in"
            )
        _restore_linear(graph.graph)
        values = {placeholders[index].name: value for index, value in constants.items()}
        values |= {node.name: getattr(graph, node.target) for node in graph.graph.find_nodes(op="get_attr")}
        weights_sha256 = _digest(values)
        outside = frozenset(self.options.disabled_ops)
        while True:
            try:
                split, models = self._compile_parts(graph, values, outside, weights_sha256=weights_sha256)
                break
            except UnsupportedOperatorsError as error:
                if self.options.strict:
                    raise
                outside |= error.operators
        report = GraphReport(models, _name_operators(graph.graph, outside), weights_sha256)
        if report.operators_outside:
            logger.warning("These operators run in PyTorch, not on OpenVINO: %s", ", ".join(report.operators_outside))
        self.reports.append(report)
        logger.info("OpenVINO runs graph %d of at most %d: %s", len(self.reports), self.options.max_graphs, report)

        def run(arguments: list[Any]) -> Any:
            with torch.no_grad():
                return split(*arguments)

        run._boxed_call = True  # type: ignore[attr-defined]  # aot_autograd then passes its arguments as one list
        return run

    def _compile_parts(
        self,
        graph: torch.fx.GraphModule,
        values: Mapping[str, torch.Tensor],
        outside: frozenset[str],
        *,
        weights_sha256: str,
    ) -> tuple[torch.fx.GraphModule, tuple[ModelReport, ...]]:
        """Split the graph into parts by engine and precision, and compile those that OpenVINO runs."""
        labels = _label_parts(graph.graph, outside)
        split = split_module(graph, graph, lambda node: labels[node], keep_original_order=True)
        models = []
        for node in split.graph.find_nodes(op="call_module"):
            part = split.get_submodule(node.target)
            node.args = _bind_constants(part, node.args, values)
            if not node.target.endswith("pytorch"):
                in_float32 = node.target.endswith("float32")
                compiled, report = self._compile_part(part, in_float32=in_float32, weights_sha256=weights_sha256)
                split.set_submodule(node.target, compiled)
                models.append(report)
        split.recompile()
        return split, tuple(models)

    def _compile_part(
        self, part: torch.fx.GraphModule, *, in_float32: bool, weights_sha256: str
    ) -> tuple[CompiledModule, ModelReport]:
        started = time.perf_counter()
        precision = _name_precision(part)
        _widen(part)
        model = _convert_graph(part)
        if self.options.weight_compression and not in_float32:
            model = _compress_weights(model, self.options.weight_compression)
        properties = {_PRECISION: precision, **self.options.config}
        if in_float32:
            properties[_PRECISION] = "f32"
        with self._open_cache(part, properties, weights_sha256) as cache:
            compiled = openvino.Core().compile_model(model, self.options.device, {**properties, **cache})
        report = ModelReport(
            devices=tuple(compiled.get_property("EXECUTION_DEVICES")),
            precision=self._read_precision(compiled),
            operators=len(compiled.get_runtime_model().get_ops()),
            inputs=len(compiled.inputs),
            constants=_count_constants(model),
            loaded_from_cache=bool(compiled.get_property("LOADED_FROM_CACHE")),
            seconds=round(time.perf_counter() - started, 3),
        )
        if report.precision != str(properties[_PRECISION]):
            raise OpenVINOBackendError(
                f"OpenVINO's {self.options.device} computes in {report.precision} here, not in "
                f"{properties[_PRECISION]}; accept it with config: {{'{_PRECISION}': '{report.precision}'}}"
            )
        return CompiledModule(compiled), report

    @contextlib.contextmanager
    def _open_cache(
        self, part: torch.fx.GraphModule, properties: Mapping[str, Any], weights_sha256: str
    ) -> Iterator[dict[str, str]]:
        """Give the properties that let OpenVINO read and write the part's entry of the cache, if there is to be one."""
        if not self.options.model_caching:
            yield {}
            return
        ingredients = (
            *(part.code, [str(node.meta["val"]) for node in part.graph.find_nodes(op="placeholder")]),
            *(weights_sha256, self.options.device, sorted(properties.items())),
            *(self.options.weight_compression, openvino.get_version(), torch.__version__),
        )
        key = hashlib.sha256(repr(ingredients).encode()).hexdigest()[:32]
        try:
            with open_entry(Path(self.options.cache_dir), key) as folder:
                yield {"CACHE_DIR": str(folder)}
        except OSError as error:
            raise OpenVINOBackendError(f"cannot use the cache folder {self.options.cache_dir}: {error}") from error

    def _read_precision(self, compiled: openvino.CompiledModel) -> str:
        """Return the type that the model computes in; of several devices, all that differ."""
        kind, _ = split_device(self.options.device)
        several = (
            [compiled.get_property(_PRECISION)]
            if kind in (None, "BATCH")
            else [properties[_PRECISION] for properties in compiled.get_property("DEVICE_PROPERTIES").values()]
        )
        return "+".join(sorted({each.get_type_name() for each in several}))


def compile_graph(
    graph: torch.fx.GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """Compile a graph; registered with dynamo as `openvino_backend`. OpenVINOBackend also keeps the reports."""
    return OpenVINOBackend(options)(graph, example_inputs)


def _refuse_training(*_: Any) -> Callable[..., Any]:
    raise OpenVINOBackendError("OpenVINO runs inference only; call the module under torch.no_grad()")


@contextlib.contextmanager
def _keep_whole(operators: Iterable[Any]) -> Iterator[None]:
    """Take torch's Python decompositions away from some operators while a graph is traced."""
    saved = {each: each.py_kernels.copy() for each in operators}
    try:
        for each in saved:
            each.py_kernels.clear()
            each._dispatch_cache.clear()
        yield
    finally:
        for each, kernels in saved.items():
            each.py_kernels.update(kernels)
            each._dispatch_cache.clear()


def _restore_linear(graph: torch.fx.Graph) -> None:
    """Write x @ w.t() + b as one linear layer again, which tracing takes apart; NNCF looks for its weight."""
    for transposed in graph.find_nodes(op="call_function", target=aten.t.default):
        for user in list(transposed.users):
            if user.target is aten.mm.default and user.args[1] is transposed:
                matrix, bias = user.args[0], None
            elif user.target is aten.addmm.default and user.args[2] is transposed and not user.kwargs:
                bias, matrix = user.args[:2]
            else:
                continue
            with graph.inserting_before(user):
                linear = graph.call_function(aten.linear.default, (matrix, transposed.args[0], bias))
            linear.meta = user.meta
            user.replace_all_uses_with(linear)
            graph.erase_node(user)
            _unflatten(linear)
    graph.eliminate_dead_code()


def _unflatten(linear: torch.fx.Node) -> None:
    """Let a linear layer take and give its tensors as they are, not as matrices; tracing flattens them before it."""
    flat = linear.args[0]
    if flat.target not in _VIEWS:
        return
    whole, results = flat.args[0], list(linear.users)
    *leading, features = whole.meta["val"].shape
    wanted = [*leading, linear.meta["val"].shape[-1]]
    if flat.meta["val"].shape[-1] == features and all(
        each.target in _VIEWS and list(each.meta["val"].shape) == wanted for each in results
    ):
        linear.args = (whole, *linear.args[1:])
        for each in results:
            linear.meta = each.meta
            each.replace_all_uses_with(linear)


def _label_parts(graph: torch.fx.Graph, outside: frozenset[str]) -> dict[torch.fx.Node, str]:
    """Return for each operation the part it belongs to: its level, then where it runs.

    A level is one more than that of any input that runs elsewhere, so that no two parts need each other's results.
    Float32 comes before the first level: it depends on nothing but itself.
    """
    in_float32 = _find_sensitive(graph, outside)
    levels: dict[torch.fx.Node, int] = {}
    places: dict[torch.fx.Node, str] = {}
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr", "output"):
            continue
        place = "float32" if node in in_float32 else "pytorch" if _is_outside(node, outside) else "openvino"
        inputs = [each for each in node.all_input_nodes if each in levels]
        if inputs and node.target is operator.getitem:
            place = places[inputs[0]]  # it takes one of an operator's results and belongs to it
        places[node] = place
        first = 0 if place == "float32" else 1
        levels[node] = max([first, *(levels[each] + (places[each] != place) for each in inputs)])
    return {node: f"{levels[node]}_{places[node]}" for node in levels}


def _find_sensitive(graph: torch.fx.Graph, outside: frozenset[str]) -> set[torch.fx.Node]:
    """Return the nodes that must run in float32: sines and cosines with all they are computed from."""
    found: set[torch.fx.Node] = set()
    for node in graph.nodes:
        if node.target in _NEEDS_FLOAT32:
            ancestors, pending = set(), [node]
            while pending:
                each = pending.pop()
                if each.op == "call_function" and each not in ancestors:
                    ancestors.add(each)
                    pending.extend(each.all_input_nodes)
            if not any(_is_outside(each, outside) for each in ancestors):
                found |= ancestors
    return found


def _is_outside(node: torch.fx.Node, outside: frozenset[str]) -> bool:
    return node.op == "call_function" and str(node.target) in outside


def _name_operators(graph: torch.fx.Graph, outside: frozenset[str]) -> tuple[str, ...]:
    return tuple(sorted({str(node.target) for node in graph.nodes if _is_outside(node, outside)}))


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


def _widen(part: torch.fx.GraphModule) -> None:
    """Write a graph of a short type in float32 between its inputs, weights and results.

    That is the form of OpenVINO's own models: it keeps the weights in their short type and computes in the type that
    it is told. A graph whose operators are in the short type makes it store all weights in float32 beside it.
    """

    def convert(node: torch.fx.Node, dtype: torch.dtype) -> torch.fx.Node:
        return part.graph.call_function(aten._to_copy.default, (node,), {"dtype": dtype})

    for node in list(part.graph.nodes):
        if node.op in ("placeholder", "get_attr") and node.meta["val"].dtype in _SHORT:
            with part.graph.inserting_after(node):
                wide = convert(node, torch.float32)
            node.replace_all_uses_with(wide, delete_user_cb=lambda user, wide=wide: user is not wide)
        elif node.op == "call_function":
            node.args = tuple(torch.float32 if each in _SHORT else each for each in node.args)
            node.kwargs = {name: torch.float32 if each in _SHORT else each for name, each in node.kwargs.items()}
        elif node.op == "output":
            with part.graph.inserting_before(node):
                node.args = torch.fx.map_arg(
                    node.args,
                    lambda each: convert(each, each.meta["val"].dtype) if each.meta["val"].dtype in _SHORT else each,
                )
    part.recompile()


def _convert_graph(part: torch.fx.GraphModule) -> openvino.Model:
    """Return the part as an OpenVINO model that shares its weights with torch."""
    examples = [node.meta["val"] for node in part.graph.find_nodes(op="placeholder")]
    types, shapes = [tensor.dtype for tensor in examples], [tensor.shape for tensor in examples]
    front_end = FrontEndManager().load_by_framework("pytorch")
    decoder = TorchFXPythonDecoder(part, input_types=types, input_shapes=shapes)
    try:
        model = front_end.convert(front_end.load(decoder))
    except Exception as error:
        decoder = TorchFXPythonDecoder(part, input_types=types, input_shapes=shapes)
        partial = front_end.convert_partially(front_end.load(decoder))
        left = [node for node in partial.get_ops() if node.get_type_name() == "PtFrameworkNode"]
        if not left:
            raise OpenVINOBackendError(f"OpenVINO cannot convert the graph: {error}") from error
        raise UnsupportedOperatorsError(node.get_friendly_name().rpartition("/")[2] for node in left) from error
    for port, tensor in zip(model.inputs, examples, strict=True):
        port.get_node().set_element_type(TYPES[tensor.dtype])
        port.get_node().set_partial_shape(openvino.PartialShape(list(tensor.shape)))
    model.validate_nodes_and_infer_types()
    return model


def _compress_weights(model: openvino.Model, mode: str) -> openvino.Model:
    """Lossy: store the weights of linear layers and convolutions in 8 bits."""
    import nncf

    return nncf.compress_weights(model, mode=nncf.CompressWeightsMode(mode))


def _count_constants(model: openvino.Model) -> dict[str, int]:
    """Return the number of constants of more than one element by type; integers only where they are weights."""
    types = [
        node.get_element_type().get_type_name()
        for node in model.get_ops()
        if node.get_type_name() == "Constant" and math.prod(node.shape) > 1
    ]
    return {name: types.count(name) for name in ("f32", "f16", "bf16", "i8", "u8") if name in types}


def _name_precision(part: torch.fx.GraphModule) -> str:
    """Return the type that most weights have, or else the inputs, by OpenVINO's name."""
    tensors = [*part.buffers(), *(node.meta["val"] for node in part.graph.find_nodes(op="placeholder"))]
    sizes = {torch.float32: 0, torch.bfloat16: 0, torch.float16: 0}
    for tensor in tensors:
        if tensor.dtype in sizes:
            sizes[tensor.dtype] += tensor.numel()
    return str(TYPES[max(sizes, key=lambda dtype: sizes[dtype])].get_type_name())


def _digest(values: Mapping[str, torch.Tensor]) -> str:
    """Return the SHA-256 of the weights in the order of the graph's inputs."""
    digest = hashlib.sha256()
    for tensor in values.values():
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
