"""Rewrite the FX graph from torch.compile: what stays whole, where each part runs, and its type."""

import contextlib
import functools
import operator
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from openvino_backend.errors import OpenVINOBackendError
from openvino_backend.running import TYPES
from openvino_backend.torch_private import disable_python_kernels, read_dimension, replace_python_kernel

aten = torch.ops.aten

# Angles reach 1,000 in a diffusion model's time embedding. There bfloat16 is exact to 4: sines would be noise.
_NEEDS_FLOAT32 = (aten.sin.default, aten.cos.default)
# Tracing would decompose these into index arithmetic. OpenVINO has one operator for each.
_KEPT_WHOLE = (
    aten.upsample_nearest1d.default,
    aten.upsample_nearest2d.default,
    aten.upsample_nearest3d.default,
)
_VIEWS = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)
_SHORT = (torch.float16, torch.bfloat16)


@contextlib.contextmanager
def keep_whole() -> Iterator[None]:
    """Stop torch from decomposing the operators to keep whole during a trace."""
    with disable_python_kernels(_KEPT_WHOLE), contextlib.ExitStack() as stack:
        for each in (aten.upsample_nearest1d, aten.upsample_nearest2d, aten.upsample_nearest3d):
            stack.enter_context(replace_python_kernel(each.vec, functools.partial(_upsample, each.default)))
        yield


def _upsample(operator: Any, source: Any, size: Sequence[Any] | None, factors: Sequence[float] | None) -> Any:
    """Write an upsampling by factors as one to a size. torch's own rule knows no dynamic sizes."""
    if size is None:
        pairs = zip(source.shape[2:], factors or (), strict=True)
        size = [length * int(factor) if factor == int(factor) else int(length * factor) for length, factor in pairs]
    return operator(source, size)


def write_out_sizes(graph: torch.fx.Graph) -> None:
    """Compute each dynamic size where it is used, from a tensor used there or else from an input.

    torch computes sizes once, from separate inputs. After this pass no part of the graph needs another's number.
    """
    inputs = _locate_sizes(graph.find_nodes(op="placeholder"))
    for node in list(graph.nodes):
        if is_size(node) or node.op not in ("call_function", "output"):
            continue
        places = {**inputs, **_locate_sizes(node.all_input_nodes)}

        def copy(
            node: torch.fx.Node, places: Mapping[Any, tuple[torch.fx.Node, int]] = places
        ) -> torch.fx.Node:  # copies what computes a size; a tensor stays
            if not is_size(node):
                return node
            dimension = read_dimension(node.meta["val"])
            if dimension in places:
                new = graph.call_function(aten.sym_size.int, places[dimension])
            elif node.target is torch.sym_sum:
                terms = torch.fx.map_arg(node.args[0], copy)
                new = functools.reduce(lambda left, right: graph.call_function(operator.add, (left, right)), terms)
            else:
                new = graph.node_copy(node, copy)
            new.meta = node.meta
            return new

        with graph.inserting_before(node):
            node.args = torch.fx.map_arg(node.args, copy)
            node.kwargs = torch.fx.map_arg(node.kwargs, copy)
    graph.eliminate_dead_code()


def _locate_sizes(nodes: Iterable[torch.fx.Node]) -> dict[Any, tuple[torch.fx.Node, int]]:
    """Return for each size a tensor that has it, and the axis."""
    places: dict[Any, tuple[torch.fx.Node, int]] = {}
    for node in nodes:
        if isinstance(node.meta.get("val"), torch.Tensor):
            for axis, dimension in enumerate(read_shape(node)):
                places.setdefault(dimension, (node, axis))
    return places


def read_shape(node: torch.fx.Node) -> list[Any]:
    """Return the shape of a node's tensor. Dynamic sizes are expressions, equal if the sizes always are."""
    return [read_dimension(each) for each in node.meta["val"].shape]


def restore_linear(graph: torch.fx.Graph) -> None:
    """Turn x @ w.t() + b, as tracing writes it, back into a linear layer. Compression looks for its weight."""
    for transposed in graph.find_nodes(op="call_function", target=aten.t.default):
        for user in list(transposed.users):
            if user.target is aten.mm.default and user.args[1] is transposed:
                matrix, bias = user.args[0], None
            elif user.target is aten.addmm.default and user.args[2] is transposed and not user.kwargs:
                bias, matrix = user.args[:2]
            else:
                continue
            _unflatten(_put_linear(user, matrix, transposed.args[0], bias))
    # After a permutation the matrices are multiplied with as many copies of the weight.
    for product in graph.find_nodes(op="call_function", target=aten.bmm.default):
        matrices, transposed = product.args[0], _see_through(product.args[1])
        if transposed.target is aten.t.default:
            _put_linear(product, matrices, transposed.args[0], None)
    graph.eliminate_dead_code()


def _put_linear(product: torch.fx.Node, *arguments: Any) -> torch.fx.Node:
    """Replace a product by a linear layer and return it."""
    with product.graph.inserting_before(product):
        linear = product.graph.call_function(aten.linear.default, arguments)
    linear.meta = product.meta
    product.replace_all_uses_with(linear)
    product.graph.erase_node(product)
    return linear


def _see_through(node: torch.fx.Node) -> torch.fx.Node:
    """Return the tensor behind views that copy it whole, once or more, in its shape."""
    while node.target in (*_VIEWS, aten.expand.default):
        source = node.args[0]
        shape, copied = read_shape(node), read_shape(source)
        if shape != copied and shape[1:] != copied:
            break
        node = source
    return node


def _unflatten(linear: torch.fx.Node) -> None:
    """Let a linear layer use its tensors unflattened. Tracing flattens them to matrices."""
    flat = linear.args[0]
    if flat.target not in _VIEWS:
        return
    whole, results = flat.args[0], list(linear.users)
    *leading, features = read_shape(whole)
    wanted = [*leading, read_shape(linear)[-1]]
    if read_shape(flat)[-1] == features and all(
        each.target in _VIEWS and read_shape(each) == wanted for each in results
    ):
        linear.args = (whole, *linear.args[1:])
        for each in results:
            linear.meta = each.meta
            each.replace_all_uses_with(linear)


def label_parts(graph: torch.fx.Graph, outside: frozenset[str]) -> dict[torch.fx.Node, str]:
    """Return the part of each operation: its level, then where it runs.

    A level is above the level of any input that runs elsewhere. So no two parts need each other's results. Float32
    comes before the first level: it depends only on itself. A size belongs to the part that uses it.
    """
    in_float32 = _find_sensitive(graph, outside)
    levels: dict[torch.fx.Node, int] = {}
    places: dict[torch.fx.Node, str] = {}
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr", "output") or is_size(node):
            continue
        place = "float32" if node in in_float32 else "pytorch" if _is_outside(node, outside) else "openvino"
        inputs = [each for each in node.all_input_nodes if each in levels]
        if inputs and node.target is operator.getitem:
            place = places[inputs[0]]  # it takes one of an operator's results and belongs to it
        places[node] = place
        first = 0 if place == "float32" else 1
        levels[node] = max([first, *(levels[each] + (places[each] != place) for each in inputs)])
    labels = {node: f"{levels[node]}_{places[node]}" for node in levels}
    for node in reversed(graph.nodes):
        if is_size(node) and node.op == "call_function":
            labels[node] = labels[next(iter(node.users))]
    return labels


def is_size(node: torch.fx.Node) -> bool:
    """Return whether a node is a size, not a tensor."""
    return isinstance(node.meta.get("val"), torch.SymInt)


def _find_sensitive(graph: torch.fx.Graph, outside: frozenset[str]) -> set[torch.fx.Node]:
    """Return the nodes that need float32: sines, cosines and all that they are computed from."""
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


def name_operators(graph: torch.fx.Graph, outside: frozenset[str]) -> tuple[str, ...]:
    return tuple(sorted({str(node.target) for node in graph.nodes if _is_outside(node, outside)}))


def bind_constants(
    part: torch.fx.GraphModule, arguments: Sequence[torch.fx.Node], values: Mapping[str, torch.Tensor]
) -> tuple[torch.fx.Node, ...]:
    """Turn the part's inputs with known values into constants. Return the remaining arguments."""
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


def widen(part: torch.fx.GraphModule) -> None:
    """Write a graph of a short type in float32 between its inputs, weights and results.

    OpenVINO's own models have this form. OpenVINO then keeps the weights in their short type, and computes in the
    configured type. With operators in the short type it would also store all weights in float32.
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


def name_precision(part: torch.fx.GraphModule) -> str:
    """Return the type of most weights, or else of the inputs, by OpenVINO's name."""
    tensors = [*part.buffers(), *(node.meta["val"] for node in part.graph.find_nodes(op="placeholder"))]
    sizes = {torch.float32: 0, torch.bfloat16: 0, torch.float16: 0}
    for tensor in tensors:
        if tensor.dtype in sizes:
            sizes[tensor.dtype] += tensor.numel()
    return str(TYPES[max(sizes, key=lambda dtype: sizes[dtype])].get_type_name())


def copy_constants(graph: torch.fx.Graph, names: Collection[str]) -> None:
    """Let a graph copy the constants that it returns.

    Args:
        names: the constants' names.
    """
    output = graph.output_node()

    def copy(node: torch.fx.Node) -> torch.fx.Node:
        if node.name not in names:
            return node
        with graph.inserting_before(output):
            new = graph.call_function(aten.clone.default, (node,))
        new.meta = dict(node.meta)
        return new

    output.args = torch.fx.map_arg(output.args, copy)


def check_flat(graph: torch.fx.GraphModule) -> None:
    """Refuse a graph that contains graphs.

    Raises:
        OpenVINOBackendError: names the operators that call them.
    """
    nodes = graph.graph.find_nodes(op="get_attr")
    held = [node for node in nodes if isinstance(getattr(graph, node.target), torch.nn.Module)]
    callers = {str(user.target) for node in held for user in node.users}
    if callers:
        raise OpenVINOBackendError(
            f"the graph contains graphs that {', '.join(sorted(callers))} call, as of torch.cond, or of a repeated "
            "block that changes its inputs"
        )
