"""Lossless changes of a model: the same result, in another form."""

import gc
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import openvino
import pytest
from openvino import opset13

from openvino_backend.tuning import tune_for_cpu

GENERATOR = np.random.default_rng(0)


def draw(*shape: int) -> Any:
    return GENERATOR.standard_normal(shape).astype(np.float32)


def write_layer(x: Any, *, features: int, axis: int = -1, pieces: int = 2, bias: bool = True) -> list[openvino.Node]:
    """Return a linear layer whose float16 weights are widened, split into pieces."""
    weights = opset13.convert(opset13.constant(draw(features, 64).astype(np.float16)), "f32")
    result = opset13.matmul(x, weights, transpose_a=False, transpose_b=True)
    if bias:
        result = opset13.add(result, opset13.constant(draw(1, 1, features)))
    parts = opset13.split(result, axis, pieces)
    return [opset13.multiply(parts.output(0), opset13.gelu(parts.output(pieces - 1), "erf"))]


def write_compressed_layer(x: Any) -> list[openvino.Node]:
    numbers = GENERATOR.integers(-128, 127, (96, 64)).astype(np.int8)
    weights = opset13.multiply(opset13.convert(opset13.constant(numbers), "f32"), opset13.constant(draw(96, 1)))
    parts = opset13.split(opset13.matmul(x, weights, transpose_a=False, transpose_b=True), 2, 3)
    return [opset13.add(parts.output(0), opset13.multiply(parts.output(1), parts.output(2)))]


def write_layer_of_computed_weights(x: Any) -> list[openvino.Node]:
    weights = opset13.multiply(opset13.constant(draw(32, 64)), opset13.reduce_max(x, [0, 1, 2], keep_dims=False))
    parts = opset13.split(opset13.matmul(x, weights, transpose_a=False, transpose_b=True), -1, 2)
    return [opset13.add(parts.output(0), parts.output(1))]


def write_attention(x: Any, *, masked: bool = False, causal: bool = False) -> list[openvino.Node]:
    query, key, value = (opset13.multiply(x, draw(2, 8, 64)) for _ in range(3))
    mask = [opset13.constant(draw(8, 8))] if masked else []
    return [opset13.scaled_dot_product_attention(query, key, value, *mask, causal=causal)]


CASES: dict[str, tuple[Callable[[Any], list[openvino.Node]], str, bool]] = {
    "gate": (lambda x: write_layer(x, features=128), "Split", True),
    "gate without a bias": (lambda x: write_layer(x, features=128, bias=False), "Split", True),
    "three pieces in 8 bits": (write_compressed_layer, "Split", True),
    "split along the tokens": (lambda x: write_layer(x, features=128, axis=1), "Split", False),
    "computed weights": (write_layer_of_computed_weights, "Split", False),
    "attention": (write_attention, "ScaledDotProductAttention", True),
    "attention with a mask": (lambda x: write_attention(x, masked=True), "ScaledDotProductAttention", False),
    "causal attention": (lambda x: write_attention(x, causal=True), "ScaledDotProductAttention", False),
}


@pytest.mark.parametrize(("write", "kind", "is_changed"), CASES.values(), ids=CASES)
def test_result_is_the_same(write: Callable[[Any], list[openvino.Node]], kind: str, is_changed: bool) -> None:
    x = opset13.parameter([2, 8, 64], np.float32)
    model, tokens = openvino.Model(write(x), [x]), draw(2, 8, 64)
    expected = run(model, tokens)
    tune_for_cpu(model)
    assert (kind not in Counter(node.get_type_name() for node in model.get_ops())) == is_changed
    gc.collect()  # the pieces of the weights keep what they are pieces of
    np.testing.assert_allclose(run(model, tokens), expected, rtol=1e-4, atol=1e-4)


def test_pieces_of_weights_are_in_the_memory_of_the_whole() -> None:
    x = opset13.parameter([2, 8, 64], np.float32)
    model = openvino.Model(write_layer(x, features=128), [x])
    (whole,) = find_weights(model)
    find_conversions(model)[0].get_rt_info()["decompression_0"] = ""  # OpenVINO's mark of weights to leave as they are
    tune_for_cpu(model)
    assert [np.shares_memory(whole, piece) for piece in find_weights(model)] == [True, True]
    assert ["decompression_0" in list(each.get_rt_info()) for each in find_conversions(model)] == [True, True]


def find_conversions(model: openvino.Model) -> list[openvino.Node]:
    return [node for node in model.get_ops() if node.get_type_name() == "Convert"]


def find_weights(model: openvino.Model) -> list[Any]:
    constants = [node.data for node in model.get_ops() if node.get_type_name() == "Constant"]
    return [each for each in constants if each.dtype == np.float16]


def run(model: openvino.Model, tokens: Any) -> Any:
    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return compiled([tokens])[0]
