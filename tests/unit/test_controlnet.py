"""ControlNet, plain and union, compared with diffusers' own pipelines in eager PyTorch."""

import dataclasses
import functools
import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from sdxl_server.api.image_metadata import describe_image
from sdxl_server.config.settings import HandlerConfig
from sdxl_server.diffusion.generation import generate, run_to_end
from sdxl_server.errors import ConfigError, RequestError
from sdxl_server.model.describe import describe_pipeline, list_uncompiled_components
from sdxl_server.model.loaded_pipeline import LoadedPipeline
from sdxl_server.sampling.step_plan import is_inside
from tests.unit.controls import (
    OUTLINE,
    WEIGHTS,
    Picture,
    change,
    control,
    draw_outline,
    make_adapter,
    measure,
    name_control,
    write_model,
)
from tests.unit.modules import needs_bf16
from tests.unit.pipelines import UNET_ONLY, encode, load, make_picture, make_pictures
from tools.random_model import make_pipeline, save_pipeline

EMBEDDING = (8, 8, 16, 32)  # channels; an eighth of the image's side
UNION = {"num_control_type": 8, "num_trans_channel": 32, "num_proj_channel": 32}
START = draw_outline(colour="blue")
MASK = Image.new("L", (128, 128), 0)
MASK.paste(255, (32, 32, 96, 96))
INSIDE = (slice(44, 84), slice(44, 84))  # where no seam is blended
LAYER = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
Components = Mapping[str, Any]


def make_controlnet(unet: Any, *, seed: int = 3, **config: Any) -> Any:
    """Return a ControlNet whose maps change the image clearly; a union with its settings."""
    torch.manual_seed(seed)
    kind = diffusers.ControlNetUnionModel if "num_control_type" in config else diffusers.ControlNetModel
    made = kind.from_config({**unet.config, "conditioning_embedding_out_channels": EMBEDDING, **config}).eval()
    made.load_state_dict(unet.state_dict(), strict=False)
    for name, each in made.named_parameters():
        if name.startswith(("controlnet_", "spatial_ch_projs")):  # zeros before a training
            each.data = torch.randn_like(each) * (0.3 if each.dim() == 1 else 0.1)
        elif name.startswith("control_add_embedding"):
            each.data *= 4
    return made


def name_as_original(name: str, *, layers: int = 1) -> str:
    """Return a tensor's name in the layout of ControlNet's authors.

    Args:
        layers: of each block.
    """
    resnet = {
        **{"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3"},
        **{"time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"},
    }

    def place(block: str, layer: int | str) -> int:
        return 1 + int(block) * (layers + 1) + int(layer)

    renamed: dict[str, str | Callable[[re.Match[str]], str]] = {
        r"controlnet_cond_embedding\.conv_in": "input_hint_block.0",
        r"controlnet_cond_embedding\.conv_out": "input_hint_block.14",
        r"controlnet_cond_embedding\.blocks\.(\d)": lambda it: f"input_hint_block.{2 * int(it[1]) + 2}",
        r"controlnet_down_blocks\.(\d+)": r"zero_convs.\1.0",
        r"controlnet_mid_block": "middle_block_out.0",
        r"time_embedding\.linear_(\d)": lambda it: f"time_embed.{2 * int(it[1]) - 2}",
        r"add_embedding\.linear_(\d)": lambda it: f"label_emb.0.{2 * int(it[1]) - 2}",
        r"conv_in": "input_blocks.0.0",
        r"down_blocks\.(\d)\.resnets\.(\d)": lambda it: f"input_blocks.{place(it[1], it[2])}.0",
        r"down_blocks\.(\d)\.attentions\.(\d)": lambda it: f"input_blocks.{place(it[1], it[2])}.1",
        r"down_blocks\.(\d)\.downsamplers\.0\.conv": lambda it: f"input_blocks.{place(it[1], layers)}.0.op",
        r"mid_block\.resnets\.(\d)": lambda it: f"middle_block.{2 * int(it[1])}",
        r"mid_block\.attentions\.0": "middle_block.1",
        rf"(\w+_block[s.\d]*)\.({'|'.join(resnet)})\.": lambda it: f"{it[1]}.{resnet[it[2]]}.",
    }
    for pattern, new in renamed.items():
        name = re.sub("^" + pattern, new, name)
    return name


def name_with_prefix(name: str) -> str:
    return f"control_model.{name_as_original(name)}"


def save(controlnet: Any, path: Path, rename: Callable[[str], str] = str, dtype: Any = torch.float32) -> Path:
    save_file({rename(name): each.to(dtype) for name, each in controlnet.state_dict().items()}, path)
    return path


def draw(components: Components, controlnet: Any, kind: str = "XLControlNet", /, **arguments: Any) -> Picture:
    """Return the image of diffusers' own pipeline, whose class is StableDiffusion<kind>Pipeline."""
    pipeline = getattr(diffusers, f"StableDiffusion{kind}Pipeline")(**components, controlnet=controlnet)
    pipeline.set_progress_bar_config(disable=True)
    given = {"num_inference_steps": 4, "guidance_scale": 5.0, **arguments}
    made = pipeline("a red fox", generator=torch.Generator().manual_seed(1), **given)
    return np.asarray(made.images[0]).astype(int)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("controlled") / "model")


@pytest.fixture(scope="module")
def components(model: Path) -> Components:
    """The models of diffusers' pipelines."""
    loaded: Components = diffusers.StableDiffusionXLPipeline.from_pretrained(model).components
    return loaded


@pytest.fixture(scope="module")
def controlnet(components: Components) -> Any:
    return make_controlnet(components["unet"])


@pytest.fixture(scope="module")
def other(components: Components) -> Any:
    return make_controlnet(components["unet"], seed=4)


@pytest.fixture(scope="module")
def union(components: Components) -> Any:
    return make_controlnet(components["unet"], **UNION)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, controlnet: Any) -> Path:
    folder = tmp_path_factory.mktemp("controlnets") / "edges"
    controlnet.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def paths(folder: Path, other: Any, union: Any) -> list[Path]:
    """Two ControlNets, a T2I-Adapter, a union ControlNet: `a` to `d`."""
    make_adapter().save_pretrained(folder.parent / "adapter")
    original = save(other, folder.parent / "other.safetensors", name_with_prefix)
    return [folder, original, folder.parent / "adapter", save(union, folder.parent / "union.safetensors")]


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The settings of a LoRA that changes one layer, and its change."""
    torch.manual_seed(7)
    up, down = torch.randn(64, 4), torch.randn(4, 64)
    path, name = tmp_path_factory.mktemp("loras") / "style.safetensors", f"lora_unet_{LAYER.replace('.', '_')}"
    save_file(
        {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down, f"{name}.alpha": torch.tensor(4.0)}, path
    )
    entries = HandlerConfig.parse({"adapters": [{"name": "style", "path": str(path)}]}).adapters
    return {"settings": {"adapters": entries}, "change": up @ down}


@pytest.fixture(scope="module")
def eager_controlled(model: Path, paths: list[Path]) -> LoadedPipeline:
    return control(model, None, *paths)


@pytest.fixture(scope="module")
def compiled_controlled(model: Path, paths: list[Path], lora: dict[str, Any]) -> Iterator[LoadedPipeline]:
    """One graph for all sizes. No request of any test compiles another one."""
    loaded = control(model, "openvino", *paths, warm_up=True, **UNET_ONLY, **lora["settings"])
    report = describe_pipeline(loaded)["openvino"]
    yield loaded
    assert describe_pipeline(loaded)["openvino"] == report


@pytest.fixture(params=["eager_controlled", "compiled_controlled"])
def loaded(request: pytest.FixtureRequest) -> LoadedPipeline:
    chosen: LoadedPipeline = request.getfixturevalue(request.param)
    return chosen


@pytest.mark.parametrize("size", [(128, 128), (96, 160)])
def test_the_image_equals_diffusers_own(
    loaded: LoadedPipeline, components: Components, controlnet: Any, size: Any
) -> None:
    image, sizes = draw_outline(*size), {"width": size[0], "height": size[1]}
    expected = draw(components, controlnet, image=image, controlnet_conditioning_scale=0.7, **sizes)
    drawn = make_picture(loaded, control=[name_control(image=image, scale=0.7)])  # its aspect decides
    assert drawn.shape == (size[1], size[0], 3)
    assert measure(drawn, expected) <= 1
    assert measure(make_picture(loaded, **sizes), expected) > 5
    assert measure(make_picture(loaded, control=[name_control(image=image, scale=1.5)]), expected) > 5


@pytest.mark.parametrize(("begin", "to"), [(0, 0.5), (0.25, 0.75), (0.5, 1)])
def test_from_and_to_are_shares_of_the_denoising(
    loaded: LoadedPipeline, components: Components, controlnet: Any, begin: float, to: float
) -> None:
    shares = {"control_guidance_start": float(begin), "control_guidance_end": float(to)}
    expected = draw(components, controlnet, image=OUTLINE, controlnet_conditioning_scale=0.8, **shares)
    assert measure(make_picture(loaded, control=[name_control(begin=begin, to=to)]), expected) <= 1
    assert measure(make_picture(loaded, control=[name_control()]), expected) > 5


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [4, 5, 8, 20, 25])
def test_shares_between_two_steps_are_those_of_diffusers(components: Components, spacing: str, steps: int) -> None:
    scheduler = diffusers.EulerDiscreteScheduler.from_config(components["scheduler"].config, timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    for begin in range(steps):
        for end in range(begin + 1, steps + 1):
            interval = (begin / steps, end / steps)
            inside = [is_inside(float(each), interval, trained=1000) for each in scheduler.timesteps]
            assert inside == [begin <= index < end for index in range(steps)], interval


def test_two_controlnets_add_up_as_in_diffusers(
    loaded: LoadedPipeline, components: Components, controlnet: Any, other: Any
) -> None:
    image = draw_outline(colour="grey").rotate(90)
    given = {"image": [OUTLINE, image], "controlnet_conditioning_scale": [0.7, 0.4]}
    shares = {"control_guidance_start": [0.0, 0.25], "control_guidance_end": [0.5, 1.0]}
    expected = draw(components, [controlnet, other], **given, **shares)
    controls = [name_control(scale=0.7, to=0.5), name_control("b", image, scale=0.4, begin=0.25)]
    assert measure(make_picture(loaded, control=controls), expected) <= 1
    assert measure(make_picture(loaded, control=controls[:1]), expected) > 5


def test_a_controlnet_and_a_t2i_adapter_add_up(
    loaded: LoadedPipeline, components: Components, controlnet: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """diffusers has no such pipeline. Its UNet gets the adapter's maps here."""
    image = draw_outline(colour="red")
    pixels = torch.from_numpy(np.asarray(image).astype(np.float32) / 255).permute(2, 0, 1)[None]
    with torch.no_grad():
        maps = [0.6 * each.repeat(2, 1, 1, 1) for each in make_adapter()(pixels)]
    forward = components["unet"].forward

    def add(*inputs: Any, **options: Any) -> Any:
        return forward(*inputs, **options, down_intrablock_additional_residuals=list(maps))

    monkeypatch.setattr(components["unet"], "forward", add)
    expected = draw(components, controlnet, image=OUTLINE, controlnet_conditioning_scale=0.7)
    controls = [name_control("c", image, scale=0.6), name_control(scale=0.7)]
    assert measure(make_picture(loaded, control=controls), expected) <= 1
    assert measure(make_picture(loaded, control=controls[1:]), expected) > 5


def test_image_to_image_equals_diffusers_own(loaded: LoadedPipeline, components: Components, controlnet: Any) -> None:
    given = {"image": START, "control_image": OUTLINE, "strength": 0.75, "controlnet_conditioning_scale": 0.8}
    expected = draw(components, controlnet, "XLControlNetImg2Img", **given)
    fields = {"image": encode(START), "strength": 0.75}
    assert measure(make_picture(loaded, control=[name_control()], **fields), expected) <= 1
    assert measure(make_picture(loaded, **fields), expected) > 5


def test_inpainting_equals_diffusers_own(loaded: LoadedPipeline, components: Components, controlnet: Any) -> None:
    given = {"image": START, "mask_image": MASK, "control_image": OUTLINE, "strength": 0.75}
    expected = draw(components, controlnet, "XLControlNetInpaint", **given, controlnet_conditioning_scale=0.8)[INSIDE]
    fields = {"image": encode(START), "mask_image": encode(MASK), "strength": 0.75}
    assert measure(make_picture(loaded, control=[name_control()], **fields)[INSIDE], expected) <= 1
    assert measure(make_picture(loaded, **fields)[INSIDE], expected) > 5


def test_an_inpainting_model_of_nine_channels(tmp_path: Path, folder: Path, controlnet: Any) -> None:
    """The ControlNet gets the four channels of the latents."""
    model = write_model(tmp_path / "model", in_channels=9)
    components = diffusers.StableDiffusionXLPipeline.from_pretrained(model).components
    change_index(model, "StableDiffusionXLInpaintPipeline")
    given = {"image": START, "mask_image": MASK, "control_image": OUTLINE, "strength": 1.0}
    expected = draw(components, controlnet, "XLControlNetInpaint", **given, controlnet_conditioning_scale=0.8)[INSIDE]
    fields = {"image": encode(START), "mask_image": encode(MASK), "strength": 1.0}
    for pt2, more in ((None, {}), ("openvino", {**UNET_ONLY, "warm_up": True})):
        loaded = control(model, pt2, folder, **more)
        assert measure(make_picture(loaded, control=[name_control()], **fields)[INSIDE], expected) <= 1
        assert measure(make_picture(loaded, **fields)[INSIDE], expected) > 5


def change_index(model: Path, kind: str) -> None:
    path = model / "model_index.json"
    path.write_text(path.read_text().replace("StableDiffusionXLPipeline", kind))


def test_without_guidance_too(loaded: LoadedPipeline, components: Components, controlnet: Any) -> None:
    expected = draw(components, controlnet, image=OUTLINE, controlnet_conditioning_scale=0.8, guidance_scale=1.0)
    assert measure(make_picture(loaded, control=[name_control()], guidance_scale=1.0), expected) <= 1


@pytest.mark.parametrize(
    "fields",
    [
        {"guidance_interval": [0.2, 0.8], "num_inference_steps": 6},
        {"num_images_per_prompt": 2},
        {"unet_calls": 4, "num_inference_steps": 6},
        {"width": 120, "height": 136},
        {"prompt": "a (red:1.4) fox " * 30},
    ],
)
def test_controls_combine_with_other_fields(
    eager_controlled: LoadedPipeline, compiled_controlled: LoadedPipeline, fields: dict[str, Any]
) -> None:
    controls = [name_control(), name_control("d", mode="canny", scale=0.3)]
    drawn = make_pictures(compiled_controlled, control=controls, **fields)
    assert measure(drawn, make_pictures(eager_controlled, control=controls, **fields)) <= 1
    assert measure(drawn, make_pictures(compiled_controlled, **fields)) > 5


def test_an_adapter_changes_the_unet_alone(
    compiled_controlled: LoadedPipeline,
    components: Components,
    controlnet: Any,
    lora: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight = components["unet"].get_submodule(LAYER).weight
    monkeypatch.setattr(weight, "data", weight.data + 0.5 * lora["change"])
    expected = draw(components, controlnet, image=OUTLINE, controlnet_conditioning_scale=0.8)
    fields = {"control": [name_control()], "adapters": [{"name": "style", "scale": 0.5}]}
    assert measure(make_picture(compiled_controlled, **fields), expected) <= 1
    assert measure(make_picture(compiled_controlled, control=[name_control()]), expected) > 5


def test_scale_0_is_no_control(loaded: LoadedPipeline) -> None:
    plain = make_picture(loaded)
    for each in (name_control(scale=0), name_control("d", scale=0), name_control(begin=0.9, to=0.95)):
        assert np.array_equal(make_picture(loaded, control=[each]), plain)
    assert np.array_equal(make_picture(loaded, control=[name_control()]), make_picture(loaded, control=name_control()))


@pytest.mark.parametrize(
    ("fields", "steps", "rows"),
    [
        ({"guidance_scale": 1.0}, 8, {1: 8}),
        ({"guidance_interval": [0, 0.5]}, 8, {2: 4, 1: 4}),
        ({"unet_calls": 4}, 4, {2: 4}),
        ({"num_images_per_prompt": 2}, 16, {2: 16}),
        ({"control": [name_control(to=0.5)]}, 8, {2: 4}),
        ({"control": [name_control(begin=0.5)], "unet_calls": 4}, 4, {2: 2}),
        ({"control": [name_control(scale=0)]}, 8, {}),
        ({"control": []}, 8, {}),
    ],
)
def test_it_is_called_with_the_unet(
    eager_controlled: LoadedPipeline, fields: dict[str, Any], steps: int, rows: dict[int, int]
) -> None:
    calls: dict[str, list[int]] = {}

    def count(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def call(first: Any, *inputs: Any, **options: Any) -> Any:
            calls.setdefault(name, []).append(len(first))
            return run(first, *inputs, **options)

        return call

    functions = {
        name: count(name, run) if name.startswith(("unet", "control")) else run
        for name, run in eager_controlled.functions.items()
    }
    counted = dataclasses.replace(eager_controlled, functions=functions)
    make_pictures(counted, **{"num_inference_steps": 8, "control": [name_control()], **fields})
    assert len(calls.pop("unet")) == steps
    assert Counter(calls.pop("control_a", [])) == rows
    assert calls == ({"control_a_image": [1]} if rows else {})  # once per request


def test_requests_in_flight_do_not_see_each_others(compiled_controlled: LoadedPipeline) -> None:
    controls = [name_control("b", draw_outline(colour="red")), name_control(to=0.6), name_control("d", mode="tile")]
    kinds: list[list[Any]] = [[], controls[:1], controls[1:2], controls[2:], controls[:2], [name_control(scale=0)]]
    expected = [make_picture(compiled_controlled, control=each) for each in kinds]
    fields = [{"prompt": "a red fox", "seed": 1, "control": each} for each in kinds]
    running = [generate(compiled_controlled, compiled_controlled.contract.check(each)) for each in fields]
    for steps in running * 3:
        next(steps)
    for steps, picture in zip(running, expected, strict=True):
        assert np.array_equal(np.asarray(run_to_end(steps)[0].image).astype(int), picture)


def test_a_union_draws_each_mode_as_diffusers_does(loaded: LoadedPipeline, components: Components, union: Any) -> None:
    drawn = []
    for mode, number in ((None, 0), ("openpose", 0), ("hed", 2), ("lineart", 3), ("repaint", 7)):
        given = {"control_image": [OUTLINE], "control_mode": [number], "controlnet_conditioning_scale": 0.8}
        drawn.append(make_picture(loaded, control=[name_control("d", OUTLINE, **({"mode": mode} if mode else {}))]))
        assert measure(drawn[-1], draw(components, union, "XLControlNetUnion", **given)) <= 1, mode
    assert min(measure(one, other) for one, other in itertools.combinations(drawn[1:], 2)) > 5


def test_a_static_graph_takes_controls(
    model: Path, paths: list[Path], components: Components, controlnet: Any, union: Any
) -> None:
    fixed = control(model, "openvino", paths[0], paths[3], allowed_sizes=["128x128"], warm_up=True, **UNET_ONLY)
    report = describe_pipeline(fixed)
    assert (report["graphs_for"], report["graphs"]) == ("static", 5)
    wide = draw_outline(192, 128)  # cropped to the allowed size
    for guidance in (5.0, 1.0):
        more = {"controlnet_conditioning_scale": 0.8, "guidance_scale": guidance}
        expected = draw(components, controlnet, image=wide.crop((32, 0, 160, 128)), **more)
        fields = {"control": [name_control(image=wide)], "guidance_scale": guidance}
        assert measure(make_picture(fixed, **fields), expected) <= 1
        expected = draw(components, union, "XLControlNetUnion", control_image=[OUTLINE], control_mode=[3], **more)
        fields["control"] = [name_control("b", mode="canny")]
        assert measure(make_picture(fixed, **fields), expected) <= 1
    assert describe_pipeline(fixed)["openvino"] == report["openvino"]


def test_single_files_and_variants_of_each_naming(
    tmp_path: Path, model: Path, components: Components, controlnet: Any, folder: Path
) -> None:
    unet, blocks = components["unet"], ("DownBlock2D",) * 3
    small = make_controlnet(unet, down_block_types=blocks, mid_block_type="UNetMidBlock2D")
    middle = make_controlnet(unet, down_block_types=blocks, transformer_layers_per_block=(1, 1, 2))
    variant = tmp_path / "variant"
    variant.mkdir()
    (variant / "config.json").write_bytes((folder / "config.json").read_bytes())
    save(controlnet, variant / WEIGHTS.replace("safetensors", "fp16.safetensors"), dtype=torch.float16)
    halves = {each: make_controlnet(unet).to(each).float() for each in (torch.float16, torch.bfloat16)}
    cases = [
        (controlnet, save(controlnet, tmp_path / "diffusers.safetensors")),
        (controlnet, save(controlnet, tmp_path / "original.safetensors", name_as_original)),
        (small, save(small, tmp_path / "small.safetensors")),
        (middle, save(middle, tmp_path / "middle.safetensors")),
        (halves[torch.float16], variant),
        *(
            (each, save(controlnet, tmp_path / f"{dtype}.safetensors", name_as_original, dtype))
            for dtype, each in halves.items()
        ),
    ]
    loaded = control(model, None, *(path for _, path in cases))
    assert sorted(loaded.controls[2].module.state_dict()) == sorted(
        each for each in small.state_dict() if not each.startswith("controlnet_cond_embedding.")
    )
    for registered, (each, path) in zip(loaded.controls, cases, strict=True):
        expected = draw(components, each, image=OUTLINE, controlnet_conditioning_scale=0.8)
        drawn = make_picture(loaded, control=[name_control(registered.config.name)])
        assert measure(drawn, expected) <= 1, path
    assert measure(make_picture(loaded), expected) > 5


def test_a_folder_of_the_unions_authors_with_fewer_modes(
    tmp_path: Path, model: Path, components: Components, folder: Path
) -> None:
    union = make_controlnet(components["unet"], **{**UNION, "num_control_type": 6})
    union.save_pretrained(tmp_path / "union")
    change(tmp_path / "union", _class_name="ControlNetModel_Union")
    loaded = control(model, None, tmp_path / "union", save(union, tmp_path / "union.safetensors"))
    given = {"control_image": [OUTLINE], "control_mode": [5], "controlnet_conditioning_scale": 0.8}
    expected = draw(components, union, "XLControlNetUnion", **given)
    for name in "ab":
        assert measure(make_picture(loaded, control=[name_control(name, mode="segment")]), expected) <= 1
        with pytest.raises(RequestError, match=r"^control\[0\]\.mode takes one of openpose, .*, segment, not 'tile'"):
            make_picture(loaded, control=[name_control(name, mode="tile")])


def test_controlnets_of_stable_diffusion_1(tmp_path: Path) -> None:
    """One of them averages its maps, as the one for shuffled images does."""
    pipeline = make_pipeline("tiny-sd")
    torch.manual_seed(1)
    config = {**pipeline.unet.config, "layers_per_block": 2}
    pipeline.register_modules(unet=diffusers.UNet2DConditionModel.from_config(config))
    save_pipeline(pipeline, tmp_path / "model")
    controlnet = make_controlnet(pipeline.unet)
    controlnet.save_pretrained(tmp_path / "folder")
    pooled = make_controlnet(pipeline.unet, global_pool_conditions=True)
    pooled.save_pretrained(tmp_path / "pooled")
    paths = [
        tmp_path / "folder",
        save(controlnet, tmp_path / "diffusers.safetensors"),
        save(controlnet, tmp_path / "original.safetensors", functools.partial(name_as_original, layers=2)),
        tmp_path / "pooled",
    ]
    loaded = control(tmp_path / "model", None, *paths)
    components = {**pipeline.components, "requires_safety_checker": False}
    for guidance in (5.0, 1.0):
        given = {"image": OUTLINE, "controlnet_conditioning_scale": 0.8, "guidance_scale": guidance}
        expected = dict.fromkeys("abc", draw(components, controlnet, "ControlNet", **given))
        expected["d"] = draw(components, pooled, "ControlNet", **given)
        for name, each in expected.items():
            assert measure(make_picture(loaded, control=[name_control(name)], guidance_scale=guidance), each) <= 1
        assert measure(make_picture(loaded, guidance_scale=guidance), expected["a"]) > 5
    assert measure(expected["a"], expected["d"]) > 5


def test_reports_name_the_controls(compiled_controlled: LoadedPipeline, paths: list[Path]) -> None:
    digest = hashlib.sha256((paths[0] / WEIGHTS).read_bytes()).hexdigest()
    report = describe_pipeline(compiled_controlled)
    plain, _, _, union = report["controls"]
    assert plain == {"name": "a", "kind": "controlnet", "sha256": digest, "scale": 0.8}
    assert (union["kind"], union["modes"][:3]) == ("controlnet", ["openpose", "depth", "scribble"])
    names = [*(f"control_{name}{part}" for name in "abd" for part in ("", "_image")), "control_c"]
    assert {name: len(report["openvino"][name]) for name in names} == dict.fromkeys(names, 1)
    controls = [name_control(scale=0.5, begin=0.25, to=0.75), name_control("d", mode="canny")]
    request = compiled_controlled.contract.check({"prompt": "a fox", "control": controls})
    described = describe_image(compiled_controlled, request, 0, unet_calls=1)
    applied = [
        {"name": "a", "scale": 0.5, "from": 0.25, "to": 0.75},
        {"name": "d", "scale": 0.8, "from": 0.0, "to": 1.0, "mode": "canny"},
    ]
    assert described["request"]["control"] == applied
    assert described["made_with"]["controls"] == [plain | applied[0], union | applied[1]]


def test_only_named_controls_wait_for_compilation(model: Path, paths: list[Path]) -> None:
    loaded = control(model, "openvino", *paths, **UNET_ONLY)
    check = loaded.contract.check
    assert list_uncompiled_components(loaded, check({"prompt": "a fox"})) == ["unet"]
    named = check({"prompt": "a fox", "control": [name_control("b"), name_control("c")]})
    waiting = ["unet", "control_b_image", "control_b", "control_c"]
    assert list_uncompiled_components(loaded, named) == waiting


def test_the_second_load_takes_all_from_the_cache(
    compiled_controlled: LoadedPipeline, model: Path, paths: list[Path], lora: dict[str, Any]
) -> None:
    second = control(model, "openvino", *paths, warm_up=True, **UNET_ONLY, **lora["settings"])
    for loaded, is_second in ((compiled_controlled, False), (second, True)):
        for name in ("unet", "control_a", "control_a_image", "control_d", "control_d_image"):
            (report,) = loaded.parts[name].reports
            assert report.traced is not is_second, name
            assert all(each.loaded_from_cache is is_second for each in report.models), name


@pytest.mark.parametrize("precision", [pytest.param("bf16", marks=needs_bf16), "int8"])
def test_each_precision_draws_nearly_the_image(
    model: Path, folder: Path, eager_controlled: LoadedPipeline, precision: str
) -> None:
    pt2 = {"backend": "openvino", "options": {"precision": precision}}
    loaded = control(model, pt2, folder, dtype="auto", warm_up=True, **UNET_ONLY)
    reports = describe_pipeline(loaded)["openvino"]
    if precision == "int8":
        for name in ("unet", "control_a"):
            assert sum(each["constants"].get("i8", 0) for each in reports[name][0]["models"]) > 0
    errors = [
        np.abs(make_picture(loaded, control=each) - make_picture(eager_controlled, control=each)).mean()
        for each in ([name_control()], [])
    ]
    effect = np.abs(make_picture(loaded, control=[name_control()]) - make_picture(loaded)).mean()
    assert errors[0] < max(2 * errors[1], 1)
    assert errors[0] < effect / 4


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (name_control(mode="canny"), r"is for union ControlNets, not canny for a"),
        (name_control("c", mode="canny"), r"is for union ControlNets, not canny for c"),
        (name_control("d", mode="edges"), r"takes one of openpose, depth, .*, repaint, not 'edges'"),
        (name_control("d", mode=3), r"takes one of openpose, .*, not 3"),
    ],
)
def test_a_wrong_mode_is_refused_in_a_line(eager_controlled: LoadedPipeline, given: Any, told: str) -> None:
    with pytest.raises(RequestError, match=rf"^control\[0\]\.mode {told}$"):
        eager_controlled.contract.check({"prompt": "a fox", "control": [given]})


def test_modes_are_unknown_without_a_union(model: Path, folder: Path) -> None:
    loaded = control(model, None, folder)
    with pytest.raises(
        RequestError, match=r"^control\[0\]\.'mode' is not a key; the keys are name, image, scale, from"
    ):
        loaded.contract.check({"prompt": "a fox", "control": [name_control(mode="canny")]})


def replace_all(tensors: dict[str, Any], name: str) -> None:
    tensors.clear()
    tensors[name] = torch.ones(1)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda each: each.pop("controlnet_mid_block.bias"), "lacks 1 tensors of its ControlNetModel, such as contr"),
        (
            lambda each: each.pop("conv_in.weight"),
            "holds no ControlNet for Stable Diffusion XL or .*: it has no",
        ),
        (
            lambda each: each.pop("controlnet_cond_embedding.conv_in.bias"),
            "lacks 1 tensors .*controlnet_cond_emb",
        ),
        (lambda each: each.update({"more": torch.ones(1)}), "not of a ControlNetModel: more"),
        (lambda each: each["conv_in.bias"].fill_(torch.nan), "not finite in float32: conv_in.bias"),
        (lambda each: each.update({"conv_in.bias": torch.ones(33)}), "takes 32 numbers for conv_in.bias, not 33"),
        (lambda each: replace_all(each, "lora_controlnet"), "holds a Control-LoRA; a control is a T2I-A"),
        (lambda each: replace_all(each, "lllite_unet_a.down.0.weight"), "holds a ControlNet-LLLite; a control is"),
        (
            lambda each: replace_all(each, "controlnet_blocks.0.weight"),
            "holds no ControlNet for Stable Diffusion XL or",
        ),
    ],
)
def test_a_spoiled_file_is_refused_in_a_line(
    model: Path, folder: Path, tmp_path: Path, spoil: Callable[[Any], Any], told: str
) -> None:
    tensors = load_file(folder / WEIGHTS)
    spoil(tensors)
    save_file(tensors, tmp_path / "wrong.safetensors")
    check_refused(model, tmp_path / "wrong.safetensors", rf"path: .*wrong\.safetensors .*{told}")


def test_a_spoiled_original_is_named_as_in_the_file(tmp_path: Path, model: Path, controlnet: Any) -> None:
    path = save(controlnet, tmp_path / "wrong.safetensors", name_with_prefix)
    tensors = {**load_file(path), "control_model.zero_convs.1.0.bias": torch.full((32,), torch.inf)}
    for more, told in (
        ({}, "not finite in float32: control_model.zero_convs.1.0.bias"),
        ({"model.diffusion_model.out.2.bias": torch.ones(1)}, "not of a ControlNetModel: model.diffusion_model.out.2"),
    ):
        save_file({**tensors, **more}, path)
        check_refused(model, path, rf"path: .*wrong\.safetensors .*{told}")


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"conditioning_embedding_out_channels": (8, 16, 32)}, "the pixels along a cell of latents must be 8, not 4"),
        (
            {"controlnet_conditioning_channel_order": "bgr"},
            "controlnet_conditioning_channel_order must be rgb, not bgr",
        ),
        ({"conditioning_channels": 4}, "the channels of images must be 3, not 4"),
        ({"in_channels": 9}, "the channels of latents must be 4, not 9"),
        ({"cross_attention_dim": 48}, "cross_attention_dim must be 64, not 48"),
        ({"class_embed_type": "timestep"}, "class_embed_type must be None, not timestep"),
        (
            {"block_out_channels": (32, 32, 64)},
            r"the channels of feature maps must be \[32, 32, 32, 64, 64, 64, 64\], not \[32, 32, 32, 32, 32, 64, 64\]",
        ),
        ({"addition_time_embed_dim": 16}, "addition_time_embed_dim must be 8, not 16"),
    ],
)
def test_a_controlnet_of_another_model_is_refused_in_a_line(
    model: Path, tmp_path: Path, components: Components, config: dict[str, Any], told: str
) -> None:
    own = {**components["unet"].config, "conditioning_embedding_out_channels": EMBEDDING, **config}
    diffusers.ControlNetModel.from_config(own).save_pretrained(tmp_path / "other")
    check_refused(model, tmp_path / "other", f"path: .*other .*{told}$")


def test_a_controlnet_of_the_other_family_is_refused_in_a_line(
    model: Path, tiny_sd_model: Path, folder: Path, tmp_path: Path
) -> None:
    old = make_controlnet(make_pipeline("tiny-sd").unet)
    names = ("Stable Diffusion XL", "Stable Diffusion 1.x or 2.x")
    told = [f"path: .* holds a ControlNet for {one}, and this model is {two}$" for one, two in (names, names[::-1])]
    check_refused(tiny_sd_model, folder, told[0])
    check_refused(model, save(old, tmp_path / "old.safetensors", name_as_original), told[1])


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda path: (path / WEIGHTS).rename(path / "diffusion_pytorch_model.bin"), "pickle"),
        (lambda path: (path / WEIGHTS).write_bytes(b"PK\x03\x04"), "is a pickle of PyTorch's"),
        (lambda path: change(path, _class_name="FluxControlNetModel"), "holds 'FluxControlNetModel'; a control is a"),
        (lambda path: change(path, down_block_types=["big"] * 3), "spoiled does not describe a ControlNetModel: big"),
        (
            lambda path: change(path, block_out_channels="many"),
            "does not describe a ControlNetModel: Must provide",
        ),
        (
            lambda path: change(path, norm_num_groups=7),
            "does not describe a ControlNetModel: num_channels",
        ),
        (lambda path: change(path, layers_per_block=2), "the channels of feature maps must be"),
    ],
)
def test_a_spoiled_folder_is_refused_in_a_line(
    model: Path, folder: Path, tmp_path: Path, spoil: Callable[[Path], Any], told: str
) -> None:
    path = tmp_path / "spoiled"
    path.mkdir()
    for each in folder.iterdir():
        (path / each.name).write_bytes(each.read_bytes())
    spoil(path)
    check_refused(model, path, f"path: .*{told}")


def test_the_published_pickles_are_refused_in_a_line(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "control_v11p_sd15_canny.pth"
    path.write_bytes(b"PK\x03\x04")
    check_refused(model, path, "path: .*canny.pth .*use the model's .safetensors file")


def test_another_kind_than_configured_is_refused_in_a_line(model: Path, paths: list[Path]) -> None:
    for path, kind, held in ((paths[0], "t2i_adapter", "controlnet"), (paths[2], "controlnet", "t2i_adapter")):
        entries = [{"name": "a", "path": str(path), "kind": kind}]
        with pytest.raises(ConfigError, match=rf"controls\[0\]\.kind takes {held}, which .* holds, not {kind}$"):
            load(model, controls=HandlerConfig.parse({"controls": entries}).controls)


def test_two_components_of_a_name_are_refused_in_a_line(model: Path, folder: Path) -> None:
    entries = [{"name": name, "path": str(folder)} for name in ("a", "a_image")]
    told = "^handler.controls takes other names: two of them have the component control_a_image$"
    with pytest.raises(ConfigError, match=told):
        load(model, controls=HandlerConfig.parse({"controls": entries}).controls)


def check_refused(model: Path, path: Path, told: str) -> None:
    with pytest.raises(ConfigError, match=rf"^handler\.controls\[0\]\.{told}") as error:
        control(model, None, path)
    assert "\n" not in str(error.value)
