"""The `backend=` of torch.compile: one graph in, a callable that runs it on OpenVINO out."""

import functools
import logging
import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import openvino
import torch
from torch.fx.passes.split_module import split_module

from openvino_backend.cache import name_entry
from openvino_backend.compression import compress_weights
from openvino_backend.errors import GraphLimitError, OpenVINOBackendError, UnsupportedOperatorsError
from openvino_backend.graph import (
    bind_constants,
    keep_whole,
    label_parts,
    name_operators,
    name_precision,
    restore_linear,
    widen,
    write_out_sizes,
)
from openvino_backend.low_rank import check_found, name_layers
from openvino_backend.memory import release_memory
from openvino_backend.model import ModelReport, Part, convert_graph
from openvino_backend.options import Options
from openvino_backend.precision import PRECISION
from openvino_backend.repeated import check_flat, write_out_regions
from openvino_backend.torch_private import (
    SerializableCallable,
    find_changed_inputs,
    find_static_inputs,
    has_plain_outputs,
    trace_inference,
)
from openvino_backend.weights import KnownWeights, digest_weights

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GraphReport:
    """What became of one graph of torch.compile.

    Attributes:
        models: the OpenVINO models, in the order they run: one, and another for what must run in float32.
        operators_outside: the operators that run in PyTorch, by name; none unless `strict` is off.
        weights_sha256: the digest of the weights compiled in.
        traced: false when CompiledFunction took the graph from the cache, and torch did not trace it again.
    """

    models: tuple[ModelReport, ...]
    operators_outside: tuple[str, ...]
    weights_sha256: str
    traced: bool


class CompiledGraph(SerializableCallable):
    """A graph whose parts run on OpenVINO, in the order and with the inputs of the graph.

    It is empty while torch traces, which wants to be given what is to run.
    """

    def fill(self, split: torch.fx.GraphModule, operators_outside: tuple[str, ...], weights_sha256: str) -> None:
        self.split, self.operators_outside, self.weights_sha256 = split, operators_outside, weights_sha256
        self.parts = [each for each in split.children() if isinstance(each, Part)]

    def find_side_inputs(self) -> set[str]:
        """Return the names of the weights beside which it takes matrices."""
        return {slot.name for part in self.parts for slot in part.side_inputs.slots}

    def __call__(self, *arguments: torch.Tensor) -> Any:
        with torch.no_grad():
            return self.split(*arguments)

    @classmethod
    def serialize_compile_artifacts(cls, fn: "CompiledGraph") -> bytes:
        return pickle.dumps((fn.split, fn.operators_outside, fn.weights_sha256))

    @classmethod
    def deserialize_compile_artifacts(cls, data: bytes) -> "CompiledGraph":
        graph = cls()
        graph.fill(*pickle.loads(data))
        return graph


@dataclass(frozen=True)
class TracedGraph:
    """A graph as torch has traced it, with all that compiling it takes: that needs nothing of torch's trace any more.

    Attributes:
        compiled: what is to run it, empty as yet.
        graph: operators of which none changes a tensor in place.
        constants: the tensors compiled in, by the names of its nodes.
        weight_ids: the ids of those of them that are weights.
        weights: of the module that was traced, where they are known.
        is_plain: the function that was traced neither changes its inputs nor returns views of them.
    """

    compiled: CompiledGraph
    graph: torch.fx.GraphModule
    constants: Mapping[str, torch.Tensor]
    weight_ids: frozenset[int]
    weights: KnownWeights | None
    is_plain: bool


class OpenVINOBackend:
    """The `backend=` of one torch.compile call.

    The weights are compiled in: a later change of the module's parameters has no effect on the compiled graph.

    Attributes:
        options: what it was made with.
        ranks: of the side inputs by the names of weights, see low_rank.py; none where torch.compile calls it.
        reports: one entry per compiled graph.

    Raises:
        OptionsError: wrong options.
    """

    def __init__(self, options: Mapping[str, Any] | None = None, *, ranks: Mapping[str, int] | None = None) -> None:
        self.options, self.ranks = Options.parse(options), dict(ranks or {})
        self.reports: list[GraphReport] = []

    def __call__(self, graph: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """Compile a graph of dynamo's; called by torch.compile."""

        def compile_at_once(traced: TracedGraph) -> None:
            with release_memory(self.options, traced.constants.values()):
                self.compile(traced)

        return self._trace(graph, example_inputs, compile_at_once)

    def trace_plain(
        self, graph: torch.fx.GraphModule, example_inputs: Sequence[Any], *, weights: KnownWeights
    ) -> TracedGraph:
        """Return a graph of a module with these weights, to be compiled, and kept in a file.

        Raises:
            OpenVINOBackendError: the function changes its inputs or returns views of them.
        """
        traced: list[TracedGraph] = []
        self._trace(graph, example_inputs, traced.append, weights=weights)
        if not traced[0].is_plain:
            raise OpenVINOBackendError(
                "the function changes its inputs or returns views of them; compile it with "
                "torch.compile(function, backend=OpenVINOBackend(...))"
            )
        return traced[0]

    def add_report(self, graph: CompiledGraph, models: Sequence[ModelReport], *, traced: bool) -> None:
        """Note and log what became of a graph.

        Raises:
            OpenVINOBackendError: a layer for side inputs is not in it.
        """
        check_found(self.ranks, graph.find_side_inputs())
        report = GraphReport(tuple(models), graph.operators_outside, graph.weights_sha256, traced)
        if report.operators_outside:
            logger.warning("These operators run in PyTorch, not on OpenVINO: %s", ", ".join(report.operators_outside))
        self.reports.append(report)
        logger.info("OpenVINO runs graph %d of at most %d: %s", len(self.reports), self.options.max_graphs, report)

    def check_bound(self) -> None:
        """Refuse another graph past the bound.

        Raises:
            GraphLimitError: says how many there are.
        """
        if len(self.reports) >= self.options.max_graphs:
            raise GraphLimitError(
                f"{len(self.reports)} graphs are compiled already, each with its weights: call the module with fewer "
                "different shapes, or raise the option 'max_graphs'"
            )

    def _trace(
        self,
        graph: torch.fx.GraphModule,
        example_inputs: Sequence[Any],
        use: Callable[[TracedGraph], None],
        *,
        weights: KnownWeights | None = None,
    ) -> Callable[..., Any]:
        """Have a graph traced and used, and return what is to run it.

        That is what is compiled, with what torch puts around it for changed inputs and views.
        """
        self.check_bound()
        check_on_cpu(example_inputs)
        constants = {index: example_inputs[index].detach() for index in find_static_inputs(graph)}

        def use_inference(inference: torch.fx.GraphModule) -> CompiledGraph:
            traced = _rewrite(inference, constants, weights)
            use(traced)
            return traced.compiled

        with keep_whole():
            return trace_inference(
                graph,
                example_inputs,
                use_inference,
                refuse_training=_refuse_training,
                decompositions=self.options.find_decompositions(),
            )

    def compile(self, traced: TracedGraph) -> None:
        """Compile a graph, and what cannot run on OpenVINO leave to PyTorch, if so configured.

        Raises:
            OpenVINOBackendError: what stood in the way.
        """
        outside = frozenset(self.options.disabled_ops)
        weights_sha256 = traced.weights.sha256 if traced.weights else digest_weights(traced.constants)
        salt = traced.weights.digest_constants(traced.constants) if traced.weights else weights_sha256
        while True:
            try:
                split, models = self._compile_parts(traced, outside, salt=salt)
                break
            except UnsupportedOperatorsError as error:
                if self.options.strict:
                    raise
                outside |= error.operators
        traced.compiled.fill(split, name_operators(traced.graph.graph, outside), weights_sha256)
        self.add_report(traced.compiled, models, traced=True)

    def _compile_parts(
        self, traced: TracedGraph, outside: frozenset[str], *, salt: str
    ) -> tuple[torch.fx.GraphModule, list[ModelReport]]:
        """Split the graph into parts by engine and precision, and compile those that OpenVINO runs."""
        graph = traced.graph
        labels = label_parts(graph.graph, outside)
        split = split_module(graph, graph, lambda node: labels[node])
        reports = []
        for node in split.graph.find_nodes(op="call_module"):
            module = split.get_submodule(node.target)
            node.args = bind_constants(module, node.args, traced.constants)
            if not node.target.endswith("pytorch"):
                in_float32 = node.target.endswith("float32")
                part = self._make_part(module, traced.weight_ids, in_float32=in_float32, salt=salt)
                convert = functools.partial(self._convert, module, traced.weights, in_float32=in_float32)
                reports.append(part.load(self.options, convert, ranks=self.ranks))
                split.set_submodule(node.target, part)
        split.recompile()
        return split, reports

    def _make_part(
        self, module: torch.fx.GraphModule, weight_ids: frozenset[int], *, in_float32: bool, salt: str
    ) -> Part:
        properties = {PRECISION: name_precision(module), **self.options.config}
        if in_float32:
            properties[PRECISION] = "f32"
        inputs = [str(node.meta["val"]) for node in module.graph.find_nodes(op="placeholder")]
        key = name_entry(self.options, "model", module.code, inputs, sorted(properties.items()), salt)
        # A tensor that stands in the code, and not in a module, is no weight: it is kept with the model.
        weights = {name: tensor for name, tensor in module.named_buffers() if id(tensor) in weight_ids}
        return Part(key, properties, weights)

    def _convert(
        self, module: torch.fx.GraphModule, weights: KnownWeights | None, *, in_float32: bool
    ) -> openvino.Model:
        widen(module)
        model = convert_graph(module)
        if weights:
            name_layers(model, {(each.data_ptr(), tuple(each.shape)): name for name, each in weights.tensors.items()})
        if self.options.weight_compression and not in_float32:
            model = compress_weights(model, self.options.weight_compression)
        return model


def _rewrite(
    graph: torch.fx.GraphModule, weights: Mapping[int, torch.Tensor], known: KnownWeights | None
) -> TracedGraph:
    """Write the graph that is traced just now in operators that OpenVINO knows.

    Args:
        weights: by the numbers of its inputs.
    """
    write_out_regions(graph)
    placeholders = graph.graph.find_nodes(op="placeholder")
    check_on_cpu(node.meta.get("val") for node in graph.graph.nodes)  # those that the code makes, too
    mutated = find_changed_inputs()
    if mutated & set(weights):
        names = ", ".join(sorted(placeholders[index].name for index in mutated & set(weights)))
        raise OpenVINOBackendError(f"the module changes its own parameters or buffers ({names}), which are compiled in")
    write_out_sizes(graph.graph)
    restore_linear(graph.graph)
    check_flat(graph)
    constants = {placeholders[index].name: value for index, value in weights.items()}
    constants |= {node.name: getattr(graph, node.target) for node in graph.graph.find_nodes(op="get_attr")}
    weight_ids = frozenset(map(id, weights.values()))
    is_plain = not mutated and has_plain_outputs()
    return TracedGraph(CompiledGraph(), graph, constants, weight_ids, known, is_plain)


def compile_graph(
    graph: torch.fx.GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """Compile a graph; registered with dynamo as `openvino_backend`. OpenVINOBackend also keeps the reports."""
    return OpenVINOBackend(options)(graph, example_inputs)


def check_on_cpu(values: Iterable[Any]) -> None:
    """Refuse tensors that are not in the CPU's memory, from which OpenVINO takes them whatever its device.

    Raises:
        OpenVINOBackendError: says where they are.
    """
    devices = {str(each.device) for each in values if isinstance(each, torch.Tensor) and each.device.type != "cpu"}
    if devices:
        raise OpenVINOBackendError(
            f"there are tensors on {', '.join(sorted(devices))}, and this backend takes CPU tensors, whatever the "
            "option 'device' names: leave the module and what it is called with on the CPU"
        )


def _refuse_training(*_: Any) -> Callable[..., Any]:
    raise OpenVINOBackendError("OpenVINO runs inference only; call the module under torch.no_grad()")
