"""Rewrite composite operators of an exported graph as operators that OpenVINO's front end knows.

torch can decompose them itself. But then it traces the whole graph again, which takes longer than the first trace.
"""

import operator
from collections.abc import Callable
from typing import Any

import torch

from openvino_backend.torch_private import OPERATOR, is_composite

aten = torch.ops.aten
# Composite operators that the front end knows.
_KNOWN = frozenset(
    {
        aten.linear.default,
        aten.scaled_dot_product_attention.default,
        aten.sym_size.int,
    }
)
_CHECKS = ("aten._assert_tensor_metadata.default", "aten._assert_scalar.default", "aten.sym_constrain_range")


def find_composites(graph: torch.fx.Graph) -> set[Any]:
    """Return the composite operators that neither `lower` nor the front end handles."""
    operators = {node.target for node in graph.nodes if isinstance(node.target, OPERATOR)}
    return {each for each in operators if is_composite(each) and each not in _KNOWN and each not in _RULES}


def add_out_of_place(graph: torch.fx.Graph) -> None:
    """Give additions in place a new result, where no view shows the change. Later uses of the tensor get the result."""
    places = {node: place for place, node in enumerate(graph.nodes)}
    for node in graph.find_nodes(op="call_function", target=aten.add_.Tensor):
        changed = node.args[0]
        earlier = [user for user in changed.users if places[user] < places[node]]
        types = [getattr(each.meta["val"], "dtype", None) for each in node.all_input_nodes]
        if len(types) == 2 and types[0] == types[1] and all(map(_is_new, [changed, *earlier])):
            node.target = aten.add.Tensor
            changed.replace_all_uses_with(node, delete_user_cb=lambda user, at=places[node]: places[user] > at)


def _is_new(node: torch.fx.Node) -> bool:
    """Say whether an operator's results share no memory with another tensor."""
    target = node.target
    if not isinstance(target, OPERATOR) or (is_composite(target) and _RULES.get(target) is not _lower_convolution):
        return False
    return all(each.alias_info is None for each in target._schema.returns)


def lower(graph: torch.fx.Graph) -> None:
    """Rewrite each composite operator that has a rule."""
    for node in list(graph.nodes):
        if str(node.target).startswith(_CHECKS):
            graph.erase_node(node)
        elif node.target in _RULES:
            with graph.inserting_before(node):
                new = _RULES[node.target](node, **_read_arguments(node))
            if new is not None:
                node.replace_all_uses_with(new)
                graph.erase_node(node)
    graph.eliminate_dead_code()


def _read_arguments(node: torch.fx.Node) -> dict[str, Any]:
    """Return the arguments by name, with the defaults."""
    declared = node.target._schema.arguments
    values = {each.name: each.default_value for each in declared}
    return {**values, **{each.name: value for each, value in zip(declared, node.args, strict=False)}, **node.kwargs}


def _put(node: torch.fx.Node, target: Any, *args: Any, **kwargs: Any) -> torch.fx.Node:
    """Return a new operator with the result of this one."""
    new = node.graph.call_function(target, args, kwargs)
    new.meta = dict(node.meta)
    return new


def _take_first(node: torch.fx.Node, target: Any, *args: Any) -> torch.fx.Node:
    """Return the first of an operator's results, which is this one's."""
    results = _put(node, target, *args)
    results.meta = {"val": (node.meta["val"],)}
    return _put(node, operator.getitem, results, 0)


def _read_length(node: torch.fx.Node, axis: int) -> Any:
    """Return a tensor's length: a number, or a node if it is dynamic."""
    length = node.meta["val"].shape[axis]
    if isinstance(length, int):
        return length
    size = node.graph.call_function(aten.sym_size.int, (node, axis))
    size.meta = {"val": length}
    return size


def _multiply_lengths(graph: torch.fx.Graph, lengths: list[Any]) -> Any:
    product = 1
    for each in lengths:
        if isinstance(product, int) and isinstance(each, int):
            product *= each
        elif product == 1:
            product = each
        else:
            values = [part.meta["val"] if isinstance(part, torch.fx.Node) else part for part in (product, each)]
            product = graph.call_function(operator.mul, (product, each))
            product.meta = {"val": values[0] * values[1]}
    return product


def _lower_convolution(
    node: torch.fx.Node, *, input: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, groups: int
) -> torch.fx.Node:
    axes = len(weight.meta["val"].shape) - 2
    stride, padding, dilation = (list(each) * (axes // len(each)) for each in (stride, padding, dilation))
    return _put(
        node, aten.convolution.default, input, weight, bias, stride, padding, dilation, False, [0] * axes, groups
    )


def _lower_group_norm(
    node: torch.fx.Node, *, input: Any, num_groups: int, weight: Any, bias: Any, eps: float, **_: Any
) -> torch.fx.Node:
    rows, channels, *lengths = (_read_length(input, axis) for axis in range(len(input.meta["val"].shape)))
    pixels = _multiply_lengths(node.graph, lengths)
    return _take_first(
        node, aten.native_group_norm.default, input, weight, bias, rows, channels, pixels, num_groups, eps
    )


def _lower_layer_norm(
    node: torch.fx.Node, *, input: Any, normalized_shape: Any, weight: Any, bias: Any, eps: float, **_: Any
) -> torch.fx.Node:
    return _take_first(node, aten.native_layer_norm.default, input, normalized_shape, weight, bias, eps)


def _lower_conversion(node: torch.fx.Node, *, self: Any = None, input: Any = None, **_: Any) -> torch.fx.Node:
    """Convert the type alone, or nothing: all tensors are on the CPU."""
    source, dtype = self or input, node.meta["val"].dtype
    return source if source.meta["val"].dtype == dtype else _put(node, aten._to_copy.default, source, dtype=dtype)


def _lower_dropout(node: torch.fx.Node, *, input: Any, train: bool, **_: Any) -> torch.fx.Node | None:
    return None if train else input


def _lower_flatten(node: torch.fx.Node, *, self: Any, start_dim: int, end_dim: int) -> torch.fx.Node:
    axes = len(self.meta["val"].shape)
    start, end = start_dim % max(axes, 1), end_dim % max(axes, 1)
    sizes = [_read_length(self, axis) for axis in range(axes)]
    return _put(node, aten.view.default, self, [*sizes[:start], -1, *sizes[end + 1 :]])


def _lower_reshape(node: torch.fx.Node, *, self: Any, shape: Any) -> torch.fx.Node:
    return _put(node, aten.view.default, self, shape)


def _lower_chunk(node: torch.fx.Node, *, self: Any, chunks: int, dim: int) -> torch.fx.Node:
    return _put(node, aten.split.Tensor, self, node.meta["val"][0].shape[dim], dim)


def _lower_cat(node: torch.fx.Node, *, tensors: Any, dim: int) -> torch.fx.Node:
    return _put(node, aten.cat.default, tensors, dim)


def _lower_pad(node: torch.fx.Node, *, self: Any, pad: Any, mode: str, value: float | None) -> torch.fx.Node | None:
    return _put(node, aten.constant_pad_nd.default, self, pad, value or 0.0) if mode == "constant" else None


def _lower_upsampling(node: torch.fx.Node, *, input: Any, output_size: Any, scale_factors: Any) -> torch.fx.Node | None:
    """Write an upsampling by whole factors as one to a size."""
    if output_size is None:
        if any(factor != int(factor) for factor in scale_factors):
            return None
        lengths = [_read_length(input, axis) for axis in range(2, len(input.meta["val"].shape))]
        pairs = zip(lengths, scale_factors, strict=True)
        output_size = [_multiply_lengths(node.graph, [length, int(factor)]) for length, factor in pairs]
    return _put(node, _UPSAMPLINGS[node.target], input, output_size)


def _lower_prelu(node: torch.fx.Node, *, self: Any, weight: Any) -> torch.fx.Node:
    """Write a PReLU in the form that OpenVINO fuses to its own."""
    channels, axes = weight.meta["val"], len(self.meta["val"].shape)
    slopes = _put(node, aten.view.default, weight, shape := [-1, *[1] * max(axes - 2, 0)])
    slopes.meta = {"val": channels.view(shape)}
    negative = _put(node, aten.neg.default, _put(node, aten.relu.default, _put(node, aten.neg.default, self)))
    positive = _put(node, aten.relu.default, self)
    return _put(node, aten.add.Tensor, positive, _put(node, aten.mul.Tensor, negative, slopes))


_UPSAMPLINGS = {
    each.vec: each.default for each in (aten.upsample_nearest1d, aten.upsample_nearest2d, aten.upsample_nearest3d)
}
# A rule returns an operator's replacement, or None to keep it.
_RULES: dict[Any, Callable[..., torch.fx.Node | None]] = {
    aten.conv1d.default: _lower_convolution,
    aten.conv2d.default: _lower_convolution,
    aten.conv3d.default: _lower_convolution,
    aten.group_norm.default: _lower_group_norm,
    aten.layer_norm.default: _lower_layer_norm,
    aten.to.dtype: _lower_conversion,
    aten.to.dtype_layout: _lower_conversion,
    aten.to.device: _lower_conversion,
    aten.type_as.default: _lower_conversion,
    aten.contiguous.default: _lower_conversion,
    aten.clone.default: _lower_conversion,
    aten.lift_fresh_copy.default: _lower_conversion,
    aten.detach_.default: _lower_conversion,
    aten.dropout.default: _lower_dropout,
    aten.flatten.using_ints: _lower_flatten,
    aten.reshape.default: _lower_reshape,
    aten.chunk.default: _lower_chunk,
    aten.concat.default: _lower_cat,
    aten.pad.default: _lower_pad,
    aten.prelu.default: _lower_prelu,
    **dict.fromkeys(_UPSAMPLINGS, _lower_upsampling),
}
