"""The machine's peak: the highest rate of matrix products that a library reaches on it, in each arithmetic."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

_SIDES = (512, 1024, 2048)  # of the square matrices: which is fastest depends on the caches
_OPERATIONS = 2 * 2048**3  # of a chain of products, at least
_CALLS = 8


def measure_peak(has_bf16: bool) -> dict[str, float]:
    """Return the best of some chains of products by torch and by OpenVINO, for each arithmetic, in GFLOP/s.

    Neither is the faster one everywhere: on AMX torch's 8-bit products reach two thirds of what OpenVINO's do.
    """
    kinds = ("f32", "int8", *(("bf16",) if has_bf16 else ()))
    return {kind: round(max(_measure_rates(kind)), 1) for kind in kinds}


def _measure_rates(kind: str) -> Iterator[float]:
    for side in _SIDES:
        count = max(_OPERATIONS // (2 * side**3), 1)
        for multiply in (prepare_torch(kind, side, count), prepare_openvino(kind, side, count)):
            best = float("inf")
            for _ in range(_CALLS):
                started = time.perf_counter()
                multiply()
                best = min(best, time.perf_counter() - started)
            yield count * 2 * side**3 / best / 1e9


def prepare_torch(kind: str, side: int, count: int) -> Callable[[], Any]:
    """Return what multiplies two square matrices so many times."""
    import torch

    product, dtype = {
        "f32": (torch.mm, torch.float32),
        "bf16": (torch.mm, torch.bfloat16),
        "int8": (torch._int_mm, torch.int8),
    }[kind]
    left, right = (each.to(dtype) for each in torch.randn(2, side, side).unbind())
    return lambda: [product(left, right) for _ in range(count)]


def prepare_openvino(kind: str, side: int, count: int) -> Callable[[], Any]:
    """Return what makes so many products with constant matrices, one after the other.

    In 8 bits each is quantised to 256 levels as it comes, and what lies between two of them stays in 8 bits.
    """
    import openvino
    from openvino import opset13 as operators

    random = np.random.default_rng(0)
    given = node = operators.parameter([side, side], np.float32)
    for _ in range(count):
        if kind == "int8":
            bounds = [np.float32(each) for each in (0, 255, 0, 255)]
            node = operators.fake_quantize(node, *bounds, levels=256)
            whole = operators.constant(random.integers(-127, 128, (side, side), dtype=np.int8))
            scale = np.full((side, 1), 0.02 / side, np.float32)
            matrix = operators.multiply(operators.convert(whole, "f32"), scale)
        else:
            matrix = operators.constant(random.standard_normal((side, side), dtype=np.float32))
        node = operators.matmul(node, matrix, transpose_a=False, transpose_b=True)
    properties = {"INFERENCE_PRECISION_HINT": "bf16" if kind == "bf16" else "f32"}
    request = openvino.Core().compile_model(openvino.Model([node], [given]), "CPU", properties).create_infer_request()
    request.set_input_tensor(openvino.Tensor(random.standard_normal((side, side), dtype=np.float32)))
    return request.infer
