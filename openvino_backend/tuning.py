"""Lossless changes of an OpenVINO model: the CPU plug-in runs the same products and sums faster.

Timings are in docs/benchmarks.md.
"""

import ctypes
import math
from collections.abc import Callable

import numpy as np
import openvino
from openvino import opset13

from openvino_backend.low_rank import name_piece


def tune_for_cpu(model: openvino.Model) -> None:
    """Write attention as products, and each split linear layer as one layer per piece."""
    split_linear_layers(model)
    write_out_attention(model)
    model.validate_nodes_and_infer_types()


def write_out_attention(model: openvino.Model) -> None:
    """Write attention as its products and its softmax.

    The plug-in does the same, but first transposes the keys in a separate operator. A product takes them untransposed.
    """
    for node in model.get_ops():
        if node.get_type_name() == "ScaledDotProductAttention" and _is_plain_attention(node):
            query, key, value = (node.input_value(index) for index in range(3))
            scaled = opset13.multiply(query, np.float32(query.get_partial_shape()[-1].get_length() ** -0.5))
            shares = opset13.softmax(opset13.matmul(scaled, key, transpose_a=False, transpose_b=True), axis=-1)
            attended = opset13.matmul(shares, value, transpose_a=False, transpose_b=False)
            node.output(0).replace(attended.output(0))


def _is_plain_attention(node: openvino.Node) -> bool:
    """Return whether attention has no mask, the usual scale, and float32 between its operators."""
    return (
        node.get_input_size() == 3
        and not node.get_attributes().get("causal")
        and node.get_element_type() == openvino.Type.f32
    )


def split_linear_layers(model: openvino.Model) -> None:
    """Write a linear layer whose result is split as one layer per piece, with its share of the weights.

    In a gated activation everything after the two products is then one operator. The weights are not copied.
    """
    for node in model.get_ops():
        if node.get_type_name() == "Split" and _is_along_features(node):
            pieces = _split_layer(node.input_value(0).get_node(), count=node.get_output_size())
            for index, piece in enumerate(pieces):
                node.output(index).replace(piece.output(0))


def _is_along_features(split: openvino.Node) -> bool:
    axis = split.input_value(1).get_node()
    dimensions = len(split.get_output_partial_shape(0))
    return axis.get_type_name() == "Constant" and int(axis.data) in (-1, dimensions - 1)


def _split_layer(layer: openvino.Node, *, count: int) -> list[openvino.Node]:
    """Return a linear layer for each of `count` equal pieces of the result, or none for another operator."""
    product = layer.input_value(0).get_node() if layer.get_type_name() == "Add" else layer
    if product.get_type_name() != "MatMul" or not product.get_attributes()["transpose_b"]:
        return []
    pieces = []
    for index in range(count):
        weights = _take_piece(product.input_value(1), index, count, axis=0)
        bias = None if layer is product else _take_piece(layer.input_value(1), index, count, axis=-1)
        if weights is None or (layer is not product and bias is None):
            return []
        piece = opset13.matmul(product.input_value(0), weights, transpose_a=False, transpose_b=True)
        name_piece(piece, product, index)
        pieces.append(piece if bias is None else opset13.add(piece, bias))
    return pieces


def _take_piece(source: openvino.Output, index: int, count: int, *, axis: int) -> openvino.Node | None:
    """Return one of equal pieces of weights, compressed or not, or None if each call computes them."""
    node = source.get_node()
    if node.get_type_name() == "Constant":
        return _share_piece(node, index, count, axis=axis)
    rules = {"Convert": _convert_alike(node), "Multiply": opset13.multiply, "Subtract": opset13.subtract}
    if node.get_type_name() not in rules:
        return None
    inputs = [_take_piece(each, index, count, axis=axis) for each in node.input_values()]
    return None if None in inputs else rules[node.get_type_name()](*inputs)


def _convert_alike(node: openvino.Node) -> Callable[[openvino.Node], openvino.Node]:
    """Return a function that converts as this operator does, with its marks.

    The marks keep OpenVINO from storing widened weights in the wider type. Only the name of a mark counts.
    """

    def convert(value: openvino.Node) -> openvino.Node:
        converted = opset13.convert(value, node.get_element_type().get_type_name())
        for mark in node.get_rt_info():
            converted.get_rt_info()[mark] = ""
        return converted

    return convert


def _share_piece(constant: openvino.Node, index: int, count: int, *, axis: int) -> openvino.Node | None:
    """Return one of equal pieces of a constant, in its memory. One constant for all features stays whole."""
    shape = list(constant.shape)
    if not shape or shape[axis] == 1:
        return constant
    if math.prod(shape[: axis % len(shape)]) > 1 or constant.get_element_type() == openvino.Type.bf16:
        return None  # a piece is not in one place, or numpy lacks its type
    shape[axis] //= count
    size = constant.get_byte_size() // count
    memory = (ctypes.c_byte * size).from_address(constant.data.ctypes.data + index * size)
    memory.owner = constant  # keeps the memory for what shares it
    piece = np.frombuffer(memory, constant.data.dtype).reshape(shape)
    return openvino.op.Constant(piece, shared_memory=True)
