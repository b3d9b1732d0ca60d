"""The graphs that reach OpenVINO, against OpenVINO's own conversion of the same modules."""

import copy
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openvino
import pytest
import torch
from diffusers.models.activations import GEGLU

from openvino_backend import OpenVINOBackend
from sdxl_server.model.diffusers_pipeline import load_diffusers_pipeline
from sdxl_server.model.families import FAMILIES
from tests.unit.modules import measure_error, needs_bf16

pytestmark = pytest.mark.usefixtures("inference")
SIZE, TOKENS = 16, 77


@pytest.fixture(scope="module")
def pipeline(tiny_model: Path) -> Any:
    return load_diffusers_pipeline(tiny_model, "float32", FAMILIES["sdxl"])


class Call(torch.nn.Module):
    """A module and a way to call it, as one module of tensors only: the form that OpenVINO's converter takes."""

    def __init__(self, module: torch.nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.module, self.call = module, call

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.call(self.module, *inputs)


def make_case(pipeline: Any, name: str) -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    if name == "unet":
        times = torch.tensor([[128.0, 128, 0, 0, 128, 128]] * 2)
        inputs = (torch.randn(2, 4, SIZE, SIZE), torch.tensor(500.0), torch.randn(2, TOKENS, 64))
        return Call(
            pipeline.unet,
            lambda unet, x, t, text, pooled, times: unet(
                x, t, text, added_cond_kwargs={"text_embeds": pooled, "time_ids": times}, return_dict=False
            ),
        ), (*inputs, torch.randn(2, 32), times)
    if name == "vae":
        return Call(pipeline.vae, lambda vae, x: vae.decode(x, return_dict=False)), (torch.randn(1, 4, SIZE, SIZE),)
    encoder = getattr(pipeline, name)
    encoder(torch.zeros(1, 1, dtype=torch.long), output_hidden_states=True)
    call = lambda module, ids: module(ids, output_hidden_states=True).hidden_states[-2]  # noqa: E731
    return Call(encoder, call), (torch.randint(0, 500, (1, TOKENS)),)


def count_operators(models: list[openvino.CompiledModel]) -> Counter[str]:
    """Return the number of operators by kind that are executed; constants and the ends of the graph are none."""
    kinds = [
        str(node.get_rt_info()["layerType"].astype(str))
        for model in models
        for node in model.get_runtime_model().get_ops()
    ]
    return Counter(kind for kind in kinds if kind not in ("Const", "Input", "Output"))


@pytest.mark.parametrize("name", ["unet", "vae", "text_encoder", "text_encoder_2"])
def test_graph_is_eagers_and_no_longer_than_openvinos_own(
    pipeline: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, inputs = make_case(pipeline, name)
    expected = take_first(module(*inputs))
    properties = {"INFERENCE_PRECISION_HINT": "f32"}
    native = openvino.convert_model(module.eval(), example_input=inputs)
    native.reshape({port: tuple(tensor.shape) for port, tensor in zip(native.inputs, inputs, strict=True)})
    compiled: list[openvino.CompiledModel] = []
    compile_model = openvino.Core.compile_model

    def spy(core: openvino.Core, *arguments: Any) -> openvino.CompiledModel:
        compiled.append(compile_model(core, *arguments))
        return compiled[-1]

    theirs = count_operators([openvino.Core().compile_model(native, "CPU", properties)])
    monkeypatch.setattr(openvino.Core, "compile_model", spy)
    assert measure_error(run_on_openvino(module, inputs, "f32"), expected) < 1e-4
    ours = count_operators(compiled)
    # A layer whose result is split is a layer more and a split less here; each has the reorder of its own bias.
    gates = theirs["Split"] - ours["Split"]
    assert ours["FullyConnected"] == theirs["FullyConnected"] + gates
    assert ours.total() <= theirs.total() + 2 * gates, (ours - theirs, theirs - ours)
    for kind in ("MVN", "ScaledDotProductAttention", "Interpolate", "Convolution"):
        assert ours[kind] == theirs[kind]


@pytest.mark.parametrize("name", ["unet", "vae"])
def test_the_weights_of_every_layer_but_convolutions_of_few_channels_are_compressed(pipeline: Any, name: str) -> None:
    module, inputs = make_case(pipeline, name)
    module.requires_grad_(False)  # torch traces it otherwise than with gradients
    called: set[torch.nn.Module] = set()
    layers = [each for each in module.modules() if isinstance(each, torch.nn.Linear | torch.nn.Conv2d)]
    hooks = [each.register_forward_hook(lambda layer, *_: called.add(layer)) for each in layers]
    module(*inputs)
    for hook in hooks:
        hook.remove()
    backend = OpenVINOBackend({"weight_compression": "int8_sym", "config": {"INFERENCE_PRECISION_HINT": "f32"}})
    torch.compile(module, backend=backend, fullgraph=True, dynamic=False)(*inputs)
    gates = sum(isinstance(each, GEGLU) for each in module.modules())  # whose layer is two here
    compressed = [each for each in called if isinstance(each, torch.nn.Linear) or min(each.weight.shape[:2]) >= 32]
    assert 0 < len(compressed) < len(called)
    assert sum(model.constants.get("i8", 0) for model in backend.reports[0].models) == len(compressed) + gates


def run_on_openvino(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], precision: str) -> torch.Tensor:
    torch._dynamo.reset()
    backend = OpenVINOBackend({"config": {"INFERENCE_PRECISION_HINT": precision}})
    return take_first(torch.compile(module, backend=backend, fullgraph=True, dynamic=False)(*inputs))


def take_first(result: Any) -> torch.Tensor:
    tensor: torch.Tensor = result if isinstance(result, torch.Tensor) else result[0]
    return tensor.float()


@needs_bf16
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *(("unet", torch.bfloat16), ("unet", torch.float16), ("vae", torch.float16)),
        *(("text_encoder", torch.bfloat16), ("text_encoder_2", torch.float16)),
    ],
)
def test_bfloat16_is_as_near_as_torchs_own(pipeline: Any, name: str, dtype: torch.dtype) -> None:
    module, inputs = make_case(pipeline, name)
    expected = take_first(module(*inputs))

    def shorten(dtype: torch.dtype) -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
        short = [each.to(dtype) if each.is_floating_point() and each.ndim else each for each in inputs]
        return copy.deepcopy(module).to(dtype), tuple(short)

    by_torch, short_inputs = shorten(torch.bfloat16)
    torchs_error = measure_error(take_first(by_torch(*short_inputs)), expected)
    ours = measure_error(run_on_openvino(*shorten(dtype), "bf16"), expected)
    assert ours <= 1.2 * torchs_error, (ours, torchs_error)
