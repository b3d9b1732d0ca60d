"""The `backend=` of torch.compile: one graph in, a callable that runs it on OpenVINO out."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from openvino_backend.compiling import CompiledGraph, compile_traced
from openvino_backend.errors import GraphLimitError, OpenVINOBackendError
from openvino_backend.graph_passes import check_flat, keep_whole, restore_linear, write_out_sizes
from openvino_backend.low_rank import check_found
from openvino_backend.memory import release_memory
from openvino_backend.models import ModelReport
from openvino_backend.options import Options
from openvino_backend.torch_private import find_changed_inputs, find_static_inputs, trace_inference
from openvino_backend.tracing import TracedGraph

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GraphReport:
    """The report of one compiled graph.

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


class OpenVINOBackend:
    """The `backend=` of one torch.compile call.

    The weights are compiled in: a later change of the module's parameters has no effect on the compiled graph.

    Attributes:
        options: the parsed options.
        ranks: the side inputs' ranks by weight name, see low_rank.py. torch.compile gives none.
        reports: one entry per compiled graph.

    Raises:
        OptionsError: an option is unknown or wrong.
    """

    def __init__(self, options: Mapping[str, Any] | None = None, *, ranks: Mapping[str, int] | None = None) -> None:
        self.options, self.ranks = Options.parse(options), dict(ranks or {})
        self.reports: list[GraphReport] = []

    def __call__(self, graph: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """Compile a graph from dynamo. torch.compile calls this.

        Returns:
            A callable that runs the graph. torch wraps it for changed inputs and views.
        """
        self.check_bound()
        check_on_cpu(example_inputs)
        weights = {index: example_inputs[index].detach() for index in find_static_inputs(graph)}

        def compile_inference(inference: torch.fx.GraphModule) -> Callable[..., Any]:
            names = [node.name for node in inference.graph.find_nodes(op="placeholder")]
            traced = _rewrite(inference, weights)
            with release_memory(self.options, traced.constants.values()):
                compiled = self.compile(traced)
            places = [names.index(name) for name in compiled.inputs]
            return lambda *arguments: compiled(*(arguments[place] for place in places))

        with keep_whole():
            return trace_inference(
                graph,
                example_inputs,
                compile_inference,
                refuse_training=_refuse_training,
                decompositions=self.options.find_decompositions(),
            )

    def compile(self, traced: TracedGraph) -> CompiledGraph:
        """Compile a graph and report it.

        Raises:
            OpenVINOBackendError: the graph cannot be compiled; says why.
        """
        compiled, models = compile_traced(traced, self.options, self.ranks)
        self.add_report(compiled, models, traced=True)
        return compiled

    def add_report(self, graph: CompiledGraph, models: Sequence[ModelReport], *, traced: bool) -> None:
        """Add and log the report of a graph.

        Raises:
            OpenVINOBackendError: a layer with side inputs is not in the graph.
        """
        check_found(self.ranks, graph.find_side_inputs())
        report = GraphReport(tuple(models), graph.operators_outside, graph.weights_sha256, traced)
        if report.operators_outside:
            logger.warning("These operators run in PyTorch, not on OpenVINO: %s", ", ".join(report.operators_outside))
        self.reports.append(report)
        logger.info("OpenVINO runs graph %d of at most %d: %s", len(self.reports), self.options.max_graphs, report)

    def check_bound(self) -> None:
        """Refuse another graph when `max_graphs` are compiled.

        Raises:
            GraphLimitError: says how many are compiled.
        """
        if len(self.reports) >= self.options.max_graphs:
            raise GraphLimitError(
                f"{len(self.reports)} graphs are compiled already, each with its weights: call the module with fewer "
                "different shapes, or raise the option 'max_graphs'"
            )


def _rewrite(graph: torch.fx.GraphModule, weights: Mapping[int, torch.Tensor]) -> TracedGraph:
    """Rewrite the graph being traced in operators that OpenVINO knows.

    Args:
        weights: by input number.
    """
    placeholders = graph.graph.find_nodes(op="placeholder")
    check_on_cpu(node.meta.get("val") for node in graph.graph.nodes)  # including those that the code makes
    mutated = find_changed_inputs() & set(weights)
    if mutated:
        names = ", ".join(sorted(placeholders[index].name for index in mutated))
        raise OpenVINOBackendError(f"the module changes its own parameters or buffers ({names}), which are compiled in")
    write_out_sizes(graph.graph)
    restore_linear(graph.graph)
    check_flat(graph)
    constants = {placeholders[index].name: value for index, value in weights.items()}
    constants |= {node.name: getattr(graph, node.target) for node in graph.graph.find_nodes(op="get_attr")}
    return TracedGraph(graph, constants, frozenset(map(id, weights.values())), None)


def compile_graph(
    graph: torch.fx.GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """Compile a graph; registered with dynamo as `openvino_backend`. OpenVINOBackend also keeps the reports."""
    return OpenVINOBackend(options)(graph, example_inputs)


def check_on_cpu(values: Iterable[Any]) -> None:
    """Refuse tensors outside the CPU's memory. OpenVINO reads them there for every device.

    Raises:
        OpenVINOBackendError: says where they are.
    """
    devices = {str(each.device) for each in values if isinstance(each, torch.Tensor) and each.device.type != "cpu"}
    if devices:
        raise OpenVINOBackendError(
            f"there are tensors on {', '.join(sorted(devices))}, and this backend takes CPU tensors for any 'device': "
            "keep the module and its inputs on the CPU"
        )


def _refuse_training(*_: Any) -> Callable[..., Any]:
    raise OpenVINOBackendError("OpenVINO runs inference only; call the module under torch.no_grad()")
