"""Compile a traced graph. If so configured, PyTorch runs what OpenVINO cannot."""

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import openvino
import torch
from torch.fx.passes.split_module import split_module

from openvino_backend.cache import name_entry
from openvino_backend.compression import compress_weights
from openvino_backend.errors import OpenVINOBackendError, UnsupportedOperatorsError
from openvino_backend.graph_passes import bind_constants, label_parts, name_operators, name_precision, widen
from openvino_backend.low_rank import name_layers
from openvino_backend.models import CompiledModel, ModelReport, convert_graph
from openvino_backend.options import Options
from openvino_backend.precision import PRECISION
from openvino_backend.tracing import TracedGraph, trace_lock
from openvino_backend.weights import digest_weights


@dataclass(frozen=True)
class _Step:
    """A part of a graph that runs, or one of its results.

    Attributes:
        name: the result's name.
        run: the part, or the result's number.
        inputs: names of earlier results and of the graph's inputs.
    """

    name: str
    run: CompiledModel | torch.fx.GraphModule | int
    inputs: tuple[str, ...]


@dataclass(frozen=True)
class CompiledGraph:
    """A graph whose parts run in order, each on OpenVINO or in PyTorch.

    Attributes:
        inputs: names of its tensors that are not compiled in.
        outputs: names of results.
        operators_outside: the operators that run in PyTorch.
        weights_sha256: the digest of the weights compiled in.
    """

    inputs: tuple[str, ...]
    steps: tuple[_Step, ...]
    outputs: tuple[str | None, ...]
    operators_outside: tuple[str, ...]
    weights_sha256: str

    @property
    def models(self) -> list[CompiledModel]:
        return [step.run for step in self.steps if isinstance(step.run, CompiledModel)]

    def find_side_inputs(self) -> set[str]:
        """Return the names of the weights that take low-rank matrices."""
        return {slot.name for model in self.models for slot in model.side_inputs.slots}

    def __call__(self, *tensors: Any) -> list[Any]:
        """Return the results as a list."""
        values: dict[str, Any] = dict(zip(self.inputs, tensors, strict=True))
        with torch.no_grad():
            for step in self.steps:
                inputs = [values[name] for name in step.inputs]
                if isinstance(step.run, int):
                    values[step.name] = inputs[0][step.run]
                else:  # not as a module: while another thread traces, torch records each call of a module
                    values[step.name] = step.run.forward(*inputs)
        for name in set(self.inputs) & set(self.outputs):
            values[name] = values[name].clone()
        return [None if name is None else values[name] for name in self.outputs]


def compile_traced(
    traced: TracedGraph, options: Options, ranks: dict[str, int]
) -> tuple[CompiledGraph, list[ModelReport]]:
    """Compile a graph. Unless `strict` is set, PyTorch runs what OpenVINO cannot.

    Args:
        ranks: the side inputs' ranks, see low_rank.py.

    Raises:
        OpenVINOBackendError: the graph cannot be compiled; says why.
    """
    outside = frozenset(options.disabled_ops)
    while True:
        try:
            return _Compiler(traced, options, ranks, outside).compile()
        except UnsupportedOperatorsError as error:
            if options.strict:
                raise
            movable = set(name_operators(traced.graph.graph, error.operators)) - outside
            if not movable:
                raise OpenVINOBackendError(
                    f"OpenVINO has no {', '.join(sorted(error.operators))}, and strict: false does not help: the graph "
                    "has no further operator of that name to run in PyTorch"
                ) from error
            outside |= movable


@dataclass(frozen=True)
class _Compiler:
    """Compiles one graph, with these operators in PyTorch."""

    traced: TracedGraph
    options: Options
    ranks: dict[str, int]
    outside: frozenset[str]

    def compile(self) -> tuple[CompiledGraph, list[ModelReport]]:
        """Split the graph into parts by engine and precision, and compile those that OpenVINO runs."""
        graph, constants, weights = self.traced.graph, self.traced.constants, self.traced.weights
        weights_sha256 = weights.sha256 if weights else digest_weights(constants)
        salt = weights.digest_constants(constants) if weights else weights_sha256
        with trace_lock:
            labels = label_parts(graph.graph, self.outside)
            split = split_module(graph, graph, lambda node: labels[node])
        reports: list[ModelReport] = []
        steps: list[_Step] = []
        for node in split.graph.nodes:
            run: Any = None
            if node.op == "call_module":
                run = split.get_submodule(node.target)
                with trace_lock:
                    node.args = bind_constants(run, node.args, constants)
                if not node.target.endswith("pytorch"):
                    run, report = self._compile_part(run, in_float32=node.target.endswith("float32"), salt=salt)
                    reports.append(report)
            elif node.target is operator.getitem:
                run = node.args[1]
            if run is not None:
                steps.append(_Step(node.name, run, tuple(each.name for each in node.all_input_nodes)))
        inputs = [node.name for node in split.graph.find_nodes(op="placeholder") if node.name not in constants]
        outputs = (node and node.name for node in _list_results(split.graph.output_node()))
        operators = name_operators(graph.graph, self.outside)
        return CompiledGraph(tuple(inputs), tuple(steps), tuple(outputs), operators, weights_sha256), reports

    def _compile_part(
        self, part: torch.fx.GraphModule, *, in_float32: bool, salt: str
    ) -> tuple[CompiledModel, ModelReport]:
        with trace_lock:  # sizes of the graph are added up
            properties = {PRECISION: name_precision(part), **self.options.config}
            inputs = [str(node.meta["val"]) for node in part.graph.find_nodes(op="placeholder")]
        if in_float32:
            properties[PRECISION] = "f32"
        key = name_entry(self.options, "model", part.code, inputs, sorted(properties.items()), salt)
        # A tensor of the code, not of a module, is no weight. It is kept with the model.
        weights = {name: tensor for name, tensor in part.named_buffers() if id(tensor) in self.traced.weight_ids}
        model = CompiledModel(key, properties, weights)
        convert = functools.partial(self._convert, part, in_float32=in_float32)
        return model, model.load(self.options, convert, ranks=self.ranks)

    def _convert(self, part: torch.fx.GraphModule, *, in_float32: bool) -> openvino.Model:
        with trace_lock:
            widen(part)
            model, known = convert_graph(part), self.traced.weights
        if known:
            name_layers(model, {(each.data_ptr(), tuple(each.shape)): name for name, each in known.tensors.items()})
        if self.options.weight_compression and not in_float32:
            model = compress_weights(model, self.options.weight_compression)
        return model


def _list_results(output: torch.fx.Node) -> Sequence[torch.fx.Node | None]:
    (results,) = output.args
    return results if isinstance(results, list | tuple) else [results]
