"""Low-rank matrices beside compiled weights, chosen by each call."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from openvino_backend import CompiledFunction, OpenVINOBackendError
from tests.unit.modules import measure_error

RANKS = {"linear.weight": 8, "gated.weight": 8, "convolution.weight": 8}


class Mixed(torch.nn.Module):
    """A convolution with a stride, a linear layer, and one whose result is split."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = torch.nn.Conv2d(32, 64, 3, stride=2, padding=1)
        self.linear, self.gated = torch.nn.Linear(64, 64), torch.nn.Linear(64, 128, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.linear(self.convolution(x).flatten(2).transpose(1, 2))
        values, gate = self.gated(tokens).chunk(2, dim=-1)
        return values * torch.nn.functional.gelu(gate)


def make_products(module: Mixed, *, rank: int, seed: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: module.get_parameter(name).shape for name in RANKS}
    return {
        name: (
            torch.randn(rank, *shape[1:], generator=generator) * 0.1,
            torch.randn(shape[0], rank, generator=generator) * 0.1,
        )
        for name, shape in shapes.items()
    }


def compute(module: Mixed, products: Any, x: torch.Tensor) -> torch.Tensor:
    """Return what the module computes with the matrices added to its weights."""
    weights = dict(module.named_parameters())
    for name, (down, up) in products.items():
        weights[name] = weights[name] + (up @ down.flatten(1)).reshape(weights[name].shape)
    result: torch.Tensor = torch.func.functional_call(module, weights, (x,))
    return result


@pytest.mark.usefixtures("inference")
@pytest.mark.parametrize("weights", ["as they are", "in 8 bits"])
def test_each_call_has_its_own_matrices(tmp_path: Path, weights: str) -> None:
    module, x = Mixed().requires_grad_(False), torch.randn(2, 32, 16, 16)
    options = {
        "model_caching": True,
        "cache_dir": str(tmp_path),
        **({} if weights == "as they are" else {"weight_compression": "int8_sym", "quantize_linear_layers": True}),
    }
    plain = CompiledFunction(module.forward, options)
    plain(x)
    compiled = CompiledFunction(module.forward, options, ranks=RANKS)
    # In 8 bits the products of the weights are rough, and those of the matrices are not.
    tolerance = 1e-5 if weights == "as they are" else 0.03
    several: list[Any] = [{}, make_products(module, rank=4, seed=1), make_products(module, rank=8, seed=2)]
    several.append({"gated.weight": several[1]["gated.weight"]})
    for products in [*several, *reversed(several)]:
        assert measure_error(compiled.bind(products)(x), compute(module, products, x)) < tolerance
    assert measure_error(compiled(x), plain(x)) < 1e-5
    (report,) = compiled.backend.reports
    assert not report.traced  # it is the entry of the function without side inputs
    functions = [compiled.bind(products) for products in several] * 4
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda function: function(x), functions))
    for products, result in zip(several * 4, results, strict=True):
        assert measure_error(result, compute(module, products, x)) < tolerance


@pytest.mark.usefixtures("inference")
def test_a_layer_that_is_not_there_is_told() -> None:
    compiled = CompiledFunction(Mixed().requires_grad_(False).forward, ranks={"bias.weight": 4})
    with pytest.raises(
        OpenVINOBackendError,
        match=r"1 weights for side inputs are in no linear layer or convolution, such as bias\.weight",
    ):
        compiled(torch.randn(1, 32, 16, 16))
