"""Small modules that the tests of the backends share."""

import openvino
import pytest
import torch

CAPABILITIES = frozenset(openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))
HAS_BF16 = "BF16" in CAPABILITIES
needs_bf16 = pytest.mark.skipif(not HAS_BF16, reason="this CPU has no bfloat16 arithmetic")


class Bessel(torch.nn.Module):
    """A module with an operator that OpenVINO lacks in its middle, with weights before and after."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = torch.nn.Linear(16, 16), torch.nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skipped = self.before(x)
        return self.after(torch.special.bessel_j0(skipped)) + skipped


class TimeEmbedding(torch.nn.Module):
    """Sines of large angles before a linear layer, as in a diffusion model."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(64, 64)

    def forward(self, time: torch.Tensor) -> torch.Tensor:
        angles = time[:, None].float() * torch.exp(-0.1 * torch.arange(32))
        waves = torch.cat([angles.sin(), angles.cos()], dim=-1)
        return self.linear(waves.to(self.linear.weight.dtype))


def make_module(*, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    layers = (torch.nn.Linear(16, 32), torch.nn.LayerNorm(32), torch.nn.GELU(), torch.nn.Linear(32, 8))
    return torch.nn.Sequential(*layers).requires_grad_(False)


def measure_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Return the relative L2 distance."""
    return float((value.double() - reference.double()).norm() / reference.double().norm())


def shift(x: torch.Tensor) -> torch.Tensor:
    return x + 1
