"""Lossy changes of an OpenVINO model: weights in 8 bits, and layers that compute in 8 bits."""

import functools
from collections.abc import Sequence

import numpy as np
import openvino
from openvino import opset13

from openvino_backend.options import Options
from openvino_backend.precision import PRECISION
from openvino_backend.processors import find_processors, limit_openvino

_FLOATING = (openvino.Type.f32, openvino.Type.f16, openvino.Type.bf16)
_LARGEST = 127  # the largest weight in 8 bits
_LEVELS = 256
_MIDDLE = 128
# SiLU is never below -0.2785. With this zero, 7/8 of the levels are for positive values.
_SILU_MINIMUM, _SILU_ZERO = 0.2785, 32
_FEWEST_CHANNELS = 32
_SMALLEST_HALF = np.float32(6e-6)  # of weights that are all zeros; a smaller scale is 0 in float16
_SMALLEST_SCALE = 1e-30  # of an image that is all zeros


def compress_weights(model: openvino.Model, mode: str) -> openvino.Model:
    """Store the weights of linear layers and convolutions in 8 bits.

    Symmetric weights get one scale for each output, as in NNCF. NNCF takes ten times as long: a minute for SDXL's UNet.
    """
    if mode != "int8_sym":
        import nncf

        return nncf.compress_weights(model, mode=nncf.CompressWeightsMode(mode))
    make_compressor = functools.cache(_make_compressor)
    for node in model.get_ops():
        is_layer = node.get_type_name() == "MatMul" and node.get_attributes()["transpose_b"]
        if is_layer or node.get_type_name() == "Convolution":
            source = node.input_value(1)
            constant = source.get_node()
            if constant.get_type_name() == "Convert":
                constant = constant.input_value(0).get_node()
            if _is_compressed(constant, of_layer=is_layer):
                compressor = make_compressor(constant.get_element_type(), len(constant.shape))
                source.replace(_compress(constant, compressor).output(0))
    return model


def _is_compressed(constant: openvino.Node, *, of_layer: bool) -> bool:
    """Return whether weights are stored in 8 bits.

    Convolutions of few channels are not: they hold few weights, and the last one's error is the result's error.
    """
    is_known = constant.get_type_name() == "Constant" and constant.get_element_type() in _FLOATING
    return is_known and (of_layer or min(list(constant.shape)[:2]) >= _FEWEST_CHANNELS)


def _compress(constant: openvino.Node, compressor: openvino.InferRequest) -> openvino.Node:
    """Return weights as 8 bits times a scale. Their first axis is the outputs."""
    whole, scales = compressor.infer([constant.get_tensor_view()], share_inputs=True).to_tuple()
    widened = opset13.convert(opset13.constant(whole), "f16")
    return opset13.convert(opset13.multiply(widened, opset13.constant(scales)), "f32")


def _make_compressor(dtype: openvino.Type, dimensions: int) -> openvino.InferRequest:
    """Return a request that brings weights into 8 bits, with the scales in float16.

    It runs on OpenVINO because another thread may be tracing. Each of torch's operators would then wait for Python, and
    take ten times as long.
    """
    weights = opset13.parameter([-1] * dimensions, dtype)
    wide = opset13.convert(weights, "f32")
    largest = opset13.reduce_max(opset13.abs(wide), np.arange(1, dimensions), keep_dims=True)
    scales = opset13.convert(opset13.divide(opset13.maximum(largest, _SMALLEST_HALF), np.float32(_LARGEST)), "f16")
    whole = opset13.round(opset13.divide(wide, opset13.convert(scales, "f32")), "half_to_even")
    model = openvino.Model([opset13.convert(opset13.clamp(whole, -_LARGEST, _LARGEST), "i8"), scales], [weights])
    properties = {**limit_openvino(find_processors(), "CPU"), PRECISION: "f32"}
    return openvino.Core().compile_model(model, "CPU", properties).create_infer_request()


def quantize_products(model: openvino.Model, options: Options) -> None:
    """Give convolutions and linear layers with 8-bit weights their inputs in 8 bits too, as configured.

    Nothing is calibrated: both are linear. The input is divided by a number, and the result multiplied with it. That
    leaves a fixed range to quantise, and OpenVINO computes in integers. Layers with one input share its quantiser.
    """
    quantized: dict[tuple[str, int], tuple[openvino.Output, openvino.Node]] = {}
    for node in model.get_ops():
        axes = _choose_axes(node, options)
        if axes:
            source = node.input_value(0)
            place = source.get_node().get_name(), source.get_index()
            if place not in quantized:
                quantized[place] = _quantize(source, axes)
            _replace_input(node, *quantized[place])
    model.validate_nodes_and_infer_types()


def _choose_axes(node: openvino.Node, options: Options) -> list[int]:
    """Return the axes along which an operator's input has one scale, or none to leave it unchanged.

    A convolution has one scale for each image, a linear layer one for each token. Convolutions of few channels or of
    one pixel are unchanged: they take little time, and in SDXL their inputs lose most. Linear layers of vectors, such
    as in the time embedding, take no time.
    """
    kind = node.get_type_name()
    if kind == "Convolution" and options.quantize_convolutions and _has_short_weights(node):
        outputs, inputs, *kernel = node.input(1).get_shape()
        if min(outputs, inputs) >= _FEWEST_CHANNELS and max(kernel) > 1:
            return list(range(1, len(node.get_output_partial_shape(0))))
    if kind == "MatMul" and options.quantize_linear_layers and _has_short_weights(node):
        dimensions = len(node.get_output_partial_shape(0))
        return [dimensions - 1] if dimensions > 2 else []
    return []


def _has_short_weights(product: openvino.Node) -> bool:
    node = product.input_value(1).get_node()
    while node.get_type_name() in ("Convert", "Multiply", "Reshape"):
        node = node.input_value(0).get_node()
    return node.get_type_name() == "Constant" and node.get_element_type() == openvino.Type.i8


def _quantize(source: openvino.Output, axes: Sequence[int]) -> tuple[openvino.Output, openvino.Node]:
    """Divide a tensor by its largest value along the axes. Return it in 8 bits, and that value."""
    is_silu = source.get_node().get_type_name() == "Swish"
    zero = _SILU_ZERO if is_silu else _MIDDLE  # the level of exactly 0, the value of padding
    lowest, highest = -zero / (_LEVELS - 1 - zero), 1.0
    floor = _SILU_MINIMUM / -lowest if is_silu else _SMALLEST_SCALE
    largest = opset13.reduce_max(source if is_silu else opset13.abs(source), np.array(axes), keep_dims=True)
    scale = opset13.maximum(largest, np.float32(floor))
    bounds = [np.full([1] * len(source.get_partial_shape()), value, np.float32) for value in (lowest, highest)]
    scaled = opset13.multiply(source, opset13.divide(np.float32(1), scale))
    return opset13.fake_quantize(scaled, *bounds, *bounds, levels=_LEVELS).output(0), scale


def _replace_input(node: openvino.Node, quantized: openvino.Output, scale: openvino.Node) -> None:
    """Give a linear operator its 8-bit input, and multiply its result with the input's scale."""
    results = list(node.output(0).get_target_inputs())
    node.input(0).replace_source_output(quantized)
    restored = opset13.multiply(node.output(0), scale)
    for each in results:
        each.replace_source_output(restored.output(0))
