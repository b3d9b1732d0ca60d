"""Lossy changes of an OpenVINO model: weights in 8 bits, and convolutions that compute in 8 bits."""

import numpy as np
import openvino
from openvino import opset13

_LEVELS = 256
_MIDDLE = 128
# SiLU never goes below -0.2785: with this as zero, 7/8 of the levels are left for what is above it.
_SILU_MINIMUM, _SILU_ZERO = 0.2785, 32
_FEWEST_CHANNELS = 32
_SMALLEST_SCALE = 1e-30  # of a picture that is all zeros


def compress_weights(model: openvino.Model, mode: str) -> openvino.Model:
    """Store the weights of linear layers and convolutions in 8 bits."""
    import nncf

    return nncf.compress_weights(model, mode=nncf.CompressWeightsMode(mode))


def quantize_convolutions(model: openvino.Model) -> None:
    """Let convolutions take their input in 8 bits, scaled at each call to each picture's largest value.

    Nothing is calibrated: convolution is linear, so dividing its input by a number and multiplying its result with it
    leaves a fixed range to quantise. OpenVINO computes those in integers whose weights are in 8 bits too. Those of few
    channels or of one pixel stay: they take little time, and in SDXL their inputs are the ones that lose most.
    """
    for node in model.get_ops():
        if node.get_type_name() == "Convolution":
            outputs, inputs, *kernel = node.input(1).get_shape()
            if min(outputs, inputs) >= _FEWEST_CHANNELS and max(kernel) > 1:
                _quantize_input(node)
    model.validate_nodes_and_infer_types()


def _quantize_input(convolution: openvino.Node) -> None:
    source, results = convolution.input_value(0), list(convolution.output(0).get_target_inputs())
    is_silu = source.get_node().get_type_name() == "Swish"
    zero = _SILU_ZERO if is_silu else _MIDDLE  # the level that stands for 0, which padding is made of: exactly
    lowest, highest = -zero / (_LEVELS - 1 - zero), 1.0
    floor = _SILU_MINIMUM / -lowest if is_silu else _SMALLEST_SCALE
    axes = np.arange(1, len(source.get_partial_shape()), dtype=np.int64)
    largest = opset13.reduce_max(source if is_silu else opset13.abs(source), axes, keep_dims=True)
    scale = opset13.maximum(largest, np.float32(floor))
    bounds = [np.full([1] * (len(axes) + 1), value, np.float32) for value in (lowest, highest)]
    scaled = opset13.multiply(source, opset13.divide(np.float32(1), scale))
    quantized = opset13.fake_quantize(scaled, *bounds, *bounds, levels=_LEVELS)
    convolution.input(0).replace_source_output(quantized.output(0))
    restored = opset13.multiply(convolution.output(0), scale)
    for each in results:
        each.replace_source_output(restored.output(0))
