"""The upscaler: real models of spandrel with random weights, compared with spandrel's own results."""

import base64
import dataclasses
import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from sdxl_server.api.a1111 import A1111Api
from sdxl_server.api.a1111_documents import A1111_DOCUMENTS
from sdxl_server.api.content_filter import ContentFilter
from sdxl_server.api.http import HttpRequest
from sdxl_server.api.image_metadata import describe_image
from sdxl_server.api.infotext import read_infotext, write_infotext
from sdxl_server.api.metadata import read_metadata
from sdxl_server.config.compile_settings import CompileConfig
from sdxl_server.config.settings import HandlerConfig
from sdxl_server.diffusion.generation import generate
from sdxl_server.diffusion.progress import Progress
from sdxl_server.diffusion.upscaling import upscale
from sdxl_server.errors import ConfigError, NotFiniteError, RequestError
from sdxl_server.model.compiling import compile_method
from sdxl_server.model.describe import describe_pipeline, list_uncompiled_components
from sdxl_server.model.loaded_pipeline import LoadedPipeline
from sdxl_server.model.upscaler import TILE_SIDE, UPSCALER, Upscaler, import_spandrel, load_upscaler
from sdxl_server.service import Service
from tests.unit.pipelines import UNET_ONLY, encode, load, make_picture
from tools.random_model import make_pipeline

spandrel = import_spandrel()
EXACT = {"backend": "openvino", "options": {"config": {"INFERENCE_PRECISION_HINT": "f32"}}}
Picture = np.ndarray[Any, Any]


def make_network(name: str = "Compact", *, scale: int = 2) -> Any:
    """Return a small model of one of spandrel's architectures, with results near the image."""
    from spandrel.architectures import ESRGAN, PLKSR, SPAN, Compact, SwinIR

    torch.manual_seed(7)
    makers: dict[str, Callable[[], Any]] = {
        "Compact": lambda: Compact.Compact(num_feat=8, num_conv=2, upscale=scale),
        "ESRGAN": lambda: ESRGAN.ESRGAN(num_filters=8, num_blocks=1, scale=scale),
        "SPAN": lambda: SPAN.SPAN(num_in_ch=3, num_out_ch=3, feature_channels=8, upscale=scale),
        "PLKSR": lambda: PLKSR.RealPLKSR(dim=8, n_blocks=1, upscaling_factor=scale),
        "SwinIR": lambda: SwinIR.SwinIR(
            img_size=64,
            depths=[1],
            num_heads=[2],
            embed_dim=8,
            window_size=8,
            upscale=scale,
            upsampler="pixelshuffledirect",
        ),
    }
    network = makers[name]().eval()
    for each in network.modules():
        if isinstance(each, torch.nn.PReLU):  # 0.25 of all channels would hide that they are mixed up
            each.weight.data = torch.rand_like(each.weight) - 0.3
    return network


def save(network: Any, path: Path) -> Path:
    save_file({name: each.contiguous() for name, each in network.state_dict().items()}, path)
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An upscaler that doubles."""
    return save(make_network(), tmp_path_factory.mktemp("upscalers") / "double.safetensors")


@pytest.fixture(scope="module")
def quadruple(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An upscaler with a scale of four."""
    return save(make_network(scale=4), tmp_path_factory.mktemp("upscalers") / "quadruple.safetensors")


@pytest.fixture(scope="module")
def eager(tiny_model: Path, file: Path) -> LoadedPipeline:
    return load(tiny_model, upscaler_path=str(file))


@pytest.fixture(scope="module")
def compiled(tiny_model: Path, file: Path) -> LoadedPipeline:
    return load(tiny_model, "openvino", upscaler_path=str(file), warm_up=True, **UNET_ONLY)


@pytest.fixture(params=["eager", "compiled"])
def loaded(request: pytest.FixtureRequest) -> LoadedPipeline:
    loaded: LoadedPipeline = request.getfixturevalue(request.param)
    return loaded


def draw_leaves(width: int, height: int) -> Image.Image:
    """Return an image with edges in all directions and fine detail."""
    random = np.random.default_rng(3)
    image = Image.fromarray(random.integers(0, 255, (height // 8, width // 8, 3), dtype=np.uint8))
    smooth = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return Image.fromarray((smooth + random.integers(-20, 20, smooth.shape)).clip(0, 255).astype(np.uint8))


def enlarge(network: Any, image: Image.Image) -> Picture:
    """Return what a whole image becomes in one call."""
    pixels = torch.from_numpy(np.asarray(image).astype(np.float32) / 255).permute(2, 0, 1)[None]
    with torch.no_grad():
        enlarged = network(pixels)[0].permute(1, 2, 0).clamp(0, 1) * 255
    return enlarged.round().numpy().astype(int)


def as_upscaler(network: Any, *, scale: int = 2) -> Upscaler:
    return Upscaler("a.safetensors", "?", scale, "", network)


def run_upscaler(upscaler: Upscaler, image: Image.Image, factor: int) -> Picture:
    *_, result = upscale(upscaler, upscaler.module, image, factor)
    return np.asarray(result).astype(int)


def list_progress(loaded: LoadedPipeline, **fields: Any) -> list[Progress]:
    request = loaded.contract.check({"seed": 1, "num_inference_steps": 2, **fields})
    return list(generate(loaded, request))


# The files


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", ["Compact", "ESRGAN", "SPAN", "PLKSR", "SwinIR"])
def test_each_architecture_is_read_and_compiled_as_a_whole(
    name: str, dtype: str, tmp_path: Path, inference: None
) -> None:
    network = make_network(name)
    path = save(network, tmp_path / "model.safetensors")
    config = HandlerConfig(upscaler_path=str(path))
    upscaler = load_upscaler(make_pipeline("tiny"), config, dtype, model_dir=tmp_path)
    assert upscaler is not None
    run = compile_method(upscaler.module.forward, CompileConfig.parse(EXACT), name=UPSCALER)
    tile = torch.rand(1, 3, TILE_SIDE, TILE_SIDE)
    expected = network(tile)
    made = run(tile.to(next(upscaler.module.parameters()).dtype)).float()
    bound = 1e-4 if dtype == "float32" else 5e-3
    assert (made - expected).abs().max() <= bound * max(1.0, float(expected.abs().max()))
    (report,) = run.backend.reports
    assert not report.operators_outside
    assert upscaler.scale == 2


def test_a_file_in_the_archive_is_found(tiny_model: Path, file: Path) -> None:
    inside = tiny_model.parent / "double.safetensors"
    inside.write_bytes(file.read_bytes())
    assert load(tiny_model, upscaler_path=inside.name).upscaler is not None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: {"lora_unet_down.lora_up.weight": torch.ones(2, 2)}, "holds a LoRA or another adapter of a model; an"),
        (lambda: {"encoder.conv_in.weight": torch.ones(2, 2)}, "holds a VAE alone; an upscaler is a model such as"),
        (lambda: {"emb_params": torch.ones(2, 2)}, "holds a textual inversion; an upscaler is a model such as ESRGAN"),
        (lambda: {"a": torch.ones(2)}, "holds 1 tensors of unknown kind, such as a; an upscaler is a model such as"),
        (lambda: make_network(scale=1).state_dict(), "holds RealESRGAN Compact, which does not enlarge images"),
        (lambda: grey(make_network()), "holds RealESRGAN Compact from 1 channels to 1; an upscaler takes and makes"),
        (lambda: spoil(make_network()), "holds numbers that are not finite: body.0.bias"),
        (lambda: cut(make_network()), "is damaged, or of an unknown kind: "),
    ],
)
def test_another_file_is_refused_by_what_it_holds(
    make: Callable[[], Any], message: str, tiny_model: Path, tmp_path: Path
) -> None:
    path = tmp_path / "other.safetensors"
    save_file({name: each.contiguous() for name, each in make().items()}, path)
    with pytest.raises(ConfigError, match=re.escape(f"handler.upscaler_path: {path} {message}")):
        load(tiny_model, upscaler_path=str(path))


def grey(network: Any) -> Any:
    from spandrel.architectures import Compact

    return Compact.Compact(num_in_ch=1, num_out_ch=1, num_feat=8, num_conv=2, upscale=2).state_dict()


def spoil(network: Any) -> Any:
    network.body[0].bias.data[0] = float("nan")
    return network.state_dict()


def cut(network: Any) -> Any:
    return {name: each for name, each in network.state_dict().items() if name != "body.2.weight"}


def test_a_pickle_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    torch.save(make_network().state_dict(), tmp_path / "model.pth")
    with pytest.raises(ConfigError, match="handler.upscaler_path: .* is a pickle, which can run code"):
        load(tiny_model, upscaler_path=str(tmp_path / "model.pth"))


def test_an_upscaler_is_recognised_elsewhere(tiny_model: Path, file: Path) -> None:
    entries = [{"name": "a", "path": str(file)}]
    with pytest.raises(ConfigError, match="holds an upscaler"):
        load(tiny_model, embeddings=HandlerConfig.parse({"embeddings": entries}).embeddings)


def test_spandrel_leaves_no_stand_in_of_torchvision() -> None:
    assert "torchvision" not in sys.modules


# The tiles


@pytest.mark.parametrize("size", [(700, 300), (257, 256), (600, 513)])
def test_tiles_have_no_seams(size: tuple[int, int]) -> None:
    network, image = make_network(), draw_leaves(*size)
    whole, tiled = enlarge(network, image), run_upscaler(as_upscaler(network), image, 2)
    assert tiled.shape == (size[1] * 2, size[0] * 2, 3)
    assert np.abs(tiled - whole).max() <= 3
    assert np.abs(tiled - whole).mean() < 0.1


def test_a_small_image_is_padded_and_cut() -> None:
    network, image = make_network(), draw_leaves(64, 96)
    tiled, whole = run_upscaler(as_upscaler(network), image, 2), enlarge(network, image)
    assert tiled.shape == (192, 128, 3)
    assert np.abs(tiled - whole)[:-16, :-16].max() <= 1  # the padding shows at the right and at the bottom only


def test_each_tile_has_one_size() -> None:
    network, shapes = make_network(), []

    class Watched(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, pixels: Any) -> Any:
            shapes.append(tuple(pixels.shape))
            return self.network(pixels)

    upscaler = as_upscaler(Watched())
    image = draw_leaves(300, 200)
    run_upscaler(upscaler, image, 4)
    assert set(shapes) == {(1, 3, TILE_SIDE, TILE_SIDE)}
    assert len(shapes) == upscaler.count_tiles(image.size, 4) == 2 + 6


def test_a_factor_takes_several_passes_or_a_reduction() -> None:
    image = draw_leaves(80, 64)
    double, fourfold = make_network(), make_network(scale=4)
    twice = enlarge(double, Image.fromarray(enlarge(double, image).astype(np.uint8)))
    assert np.abs(run_upscaler(as_upscaler(double), image, 4) - twice)[:-40, :-40].max() <= 1
    four = Image.fromarray(run_upscaler(as_upscaler(fourfold, scale=4), image, 4).astype(np.uint8))
    half = np.asarray(four.resize((160, 128), Image.Resampling.LANCZOS)).astype(int)
    assert np.array_equal(run_upscaler(as_upscaler(fourfold, scale=4), image, 2), half)


def test_numbers_that_are_not_finite_are_an_error() -> None:
    network = make_network()
    network.body[0].bias.data[0] = float("inf")
    with pytest.raises(NotFiniteError, match="the upscaler's result holds numbers that are not finite"):
        run_upscaler(as_upscaler(network), draw_leaves(64, 64), 2)


# Requests


def test_an_image_is_drawn_and_enlarged(loaded: LoadedPipeline, file: Path) -> None:
    drawn = make_picture(loaded).astype(np.uint8)
    network = make_network()
    network.load_state_dict(load_file(file))
    expected = enlarge(network, Image.fromarray(drawn))
    enlarged = make_picture(loaded, upscale=2)
    assert enlarged.shape == expected.shape == (256, 256, 3)
    assert np.abs(enlarged - expected)[:-16, :-16].max() <= (1 if loaded.compilation.backend is None else 3)
    assert np.array_equal(make_picture(loaded, upscale=2), enlarged)


def test_progress_counts_tiles_by_their_work(eager: LoadedPipeline) -> None:
    steps = list_progress(eager, prompt="a red fox", upscale=4, num_images_per_prompt=2)
    assert [each.done for each in steps] == list(range(1, 2 * (2 + 2) + 1))
    assert {each.total for each in steps} == {8}
    assert [each.step for each in steps] == [1, 2, 2, 2] * 2
    shares = [each.share for each in steps]
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1)
    assert shares[3] == pytest.approx(0.5)
    assert [each.image is not None for each in steps] == [False, False, False, True] * 2
    assert steps[-1].image is not None
    assert steps[-1].image.image.size == (512, 512)
    assert steps[-1].image.unet_calls == 2


def test_the_work_limit_counts_the_upscaling(eager: LoadedPipeline) -> None:
    limits = eager.contract.limits
    assert limits.upscaler is not None
    one = limits.upscaler.measure((128, 128), 2)
    assert limits.upscaler.measure((300, 200), 4) == pytest.approx((2 + 6) * one)
    request = {"prompt": "a red fox", "num_inference_steps": 2, "upscale": 2}
    work = 2 * 128 * 128 / 1e6 + one
    accepted = limit_work(eager, work * 1.001)
    assert accepted.check(request).upscale == 2
    with pytest.raises(RequestError, match="not 2 UNet calls of 128x128 and an upscaling that counts .* = "):
        limit_work(eager, work * 0.999).check(request)


def limit_work(loaded: LoadedPipeline, most: float) -> Any:
    config = dataclasses.replace(loaded.config, max_megapixel_steps=most)
    return dataclasses.replace(loaded.contract, limits=dataclasses.replace(loaded.contract.limits, config=config))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"upscale": 3}, "upscale takes one of 2, 4, not 3"),
        ({"upscale": "2"}, "upscale takes one of 2, 4, not '2'"),
        ({"upscale": 4, "width": 2048}, "an upscaled image has sides of at most 4096 pixels, not 2048x128 times 4; "),
    ],
)
def test_wrong_factors_are_refused(eager: LoadedPipeline, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=re.escape(message)):
        eager.contract.check({"prompt": "x", **fields})


def test_without_an_upscaler_the_field_is_refused(tiny_model: Path) -> None:
    with pytest.raises(RequestError, match="upscale takes null: this server has no upscaler, not 2"):
        load(tiny_model).contract.check({"prompt": "x", "upscale": 2})


def test_reports_and_metadata_name_the_upscaler(compiled: LoadedPipeline, file: Path) -> None:
    report = describe_pipeline(compiled)
    assert report["upscaler"]["name"] == file.name
    assert report["upscaler"]["scale"] == 2
    assert len(report["upscaler"]["sha256"]) == 64
    assert UPSCALER in report["compiled_parts"]
    assert len(report["openvino"][UPSCALER]) == 1
    request = compiled.contract.check({"prompt": "x", "upscale": 2})
    described = describe_image(compiled, request, 0, unet_calls=4)
    assert described["request"]["upscale"] == 2
    assert described["made_with"]["upscaler"] == report["upscaler"]
    assert (
        "upscaler"
        not in describe_image(compiled, compiled.contract.check({"prompt": "x"}), 0, unet_calls=4)["made_with"]
    )
    text = write_infotext(described)
    assert "Postprocess upscale by: 2, Postprocess upscaler: double" in text
    assert read_infotext(text, compiled.contract.limits)["request"]["upscale"] == 2


def test_the_component_is_compiled_when_it_is_first_needed(tiny_model: Path, file: Path) -> None:
    loaded = load(tiny_model, "openvino", upscaler_path=str(file), **UNET_ONLY)
    plain, enlarged = (loaded.contract.check({"prompt": "x", **each}) for each in ({}, {"upscale": 2}))
    assert UPSCALER not in list_uncompiled_components(loaded, plain)
    assert UPSCALER in list_uncompiled_components(loaded, enlarged)
    upload = loaded.contract.check({"image": encode(draw_leaves(64, 64)), "upscale": 2})
    assert list_uncompiled_components(loaded, upload) == [UPSCALER]


# Without drawing


def ask(loaded: LoadedPipeline, body: Any, path: str = "", **about: Any) -> tuple[Any, bytes]:
    """Return the response to a request, and all its bytes."""
    values = {"body": json.dumps(body).encode()}
    response = Service(loaded).answer(HttpRequest(values, path=path, content_type="application/json", **about))
    written = []
    while True:
        try:
            written.append(next(response.steps))
        except StopIteration as end:
            written.append(end.value)
            return response, b"".join(filter(None, written))


def open_image(file: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(file))
    image.load()
    return image


def test_an_uploaded_image_is_enlarged_without_a_prompt(loaded: LoadedPipeline, file: Path) -> None:
    image, network = draw_leaves(300, 200), make_network()
    response, written = ask(loaded, {"image": encode(image), "upscale": 2, "output_format": "png"})
    assert response.content_type == "image/png"
    made = open_image(written)
    assert made.size == (600, 400)
    bound = 3 if loaded.compilation.backend is None else 5
    assert np.abs(np.asarray(made).astype(int) - enlarge(network, image))[:-16, :-16].max() <= bound
    described = read_metadata(written, loaded.contract.limits)
    assert described["request"] == {"upscale": 2, "output_format": "png", "quality": 90}
    assert described["made_with"]["upscaler"]["name"] == file.name
    assert "model" not in described["made_with"]
    assert b"compositeWithTrainedAlgorithmicMedia" in written


def test_a_large_upload_keeps_all_its_pixels(tiny_model: Path, file: Path) -> None:
    loaded = load(tiny_model, upscaler_path=str(file), max_side=128, max_upscaled_side=1200)
    response, written = ask(loaded, {"image": encode(draw_leaves(600, 304)), "upscale": 2})
    assert open_image(written).size == (1200, 608)
    with pytest.raises(RequestError, match="an upscaled image has sides of at most 1200 pixels, not 608x304 times 2"):
        loaded.contract.check({"image": encode(draw_leaves(608, 304)), "upscale": 2})


def test_an_upload_streams_a_step_for_each_tile(eager: LoadedPipeline) -> None:
    response, written = ask(eager, {"image": encode(draw_leaves(300, 64)), "upscale": 2, "stream": True})
    events = [json.loads(line.removeprefix("data: ")) for line in written.decode().splitlines() if line[:6] == "data: "]
    assert [each["type"] for each in events] == ["progress", "image_generation.completed"]
    assert (events[0]["step"], events[0]["total"], events[1]["size"]) == (1, 2, "600x128")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"strength": 0.5}, "strength has no effect without a prompt; leave it out, or send prompt"),
        ({"seed": 3}, "seed has no effect without a prompt; leave it out, or send prompt"),
        ({"upscale": None}, "prompt is missing; send a text"),
        ({"image": None}, "prompt is missing; send a text"),
    ],
)
def test_a_request_without_a_prompt_takes_few_fields(
    eager: LoadedPipeline, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=re.escape(message)):
        eager.contract.check({"image": encode(draw_leaves(64, 64)), "upscale": 2, **fields})


def test_the_work_of_an_upload_is_limited(eager: LoadedPipeline) -> None:
    assert eager.contract.limits.upscaler is not None
    one = eager.contract.limits.upscaler.measure((64, 64), 2)
    fields = {"image": encode(draw_leaves(300, 64)), "upscale": 2}
    assert limit_work(eager, 2.01 * one).check(fields).image[0].size == (300, 64)
    with pytest.raises(RequestError, match="at most, not an upscaling that counts .*; reduce image"):
        limit_work(eager, 1.99 * one).check(fields)


def test_a1111_enlarges_an_image(eager: LoadedPipeline) -> None:
    body = {"image": encode(draw_leaves(80, 64)), "upscaling_resize": 2, "upscaler_1": "double", "gfpgan_visibility": 0}
    _, written = ask(eager, body, "sdapi/v1/extra-single-image")
    answer = json.loads(written)
    assert answer["html_info"] == ""
    assert open_image(base64.b64decode(answer["image"])).size == (160, 128)
    _, native = ask(eager, {"image": body["image"], "upscale": 2, "output_format": "png"})
    assert base64.b64decode(answer["image"]) == native


def test_a1111_enlarges_several_images(eager: LoadedPipeline) -> None:
    files = [{"data": encode(draw_leaves(*size)), "name": "a.png"} for size in ((80, 64), (300, 64), (64, 64))]
    _, written = ask(eager, {"imageList": files, "upscaling_resize": 4.0}, "sdapi/v1/extra-batch-images")
    images = json.loads(written)["images"]
    assert [open_image(base64.b64decode(each)).size for each in images] == [(320, 256), (1200, 256), (256, 256)]


@pytest.mark.parametrize(
    ("path", "fields", "message"),
    [
        ("single-image", {"upscaler_1": "R-ESRGAN 4x+"}, "upscaler_1 takes one of double, not 'R-ESRGAN 4x+'"),
        ("single-image", {"upscaling_resize": 3}, "upscaling_resize takes one of 2, 4, not 3"),
        ("single-image", {"resize_mode": 1}, "resize_mode takes 0, a factor: send upscaling_resize"),
        ("single-image", {"image": "x"}, "image takes base64, not 'x'"),
        ("batch-images", {"imageList": []}, "imageList takes 1 to 10 images such as"),
        ("batch-images", {"imageList": [{"data": "x"}]}, "imageList[0].data takes base64, not 'x'"),
    ],
)
def test_a1111_hears_of_wrong_fields(eager: LoadedPipeline, path: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=re.escape(message)):
        ask(eager, {"image": encode(draw_leaves(64, 64)), **fields}, f"sdapi/v1/extra-{path}")


def test_a1111_lists_the_upscaler(eager: LoadedPipeline) -> None:
    listed = A1111_DOCUMENTS["upscalers"](eager, HttpRequest({}), None)
    assert [(each["name"], each["scale"]) for each in listed] == [("None", 1), ("double", 2)]


def test_the_content_filter_sees_each_upload(eager: LoadedPipeline) -> None:
    seen: list[Any] = []

    class Watching(ContentFilter):
        is_active = True

        def __init__(self) -> None:
            self._function = lambda fields, image: seen.append((fields["image"].size, image and image.size))

    files = [{"data": encode(draw_leaves(*size)), "name": "a.png"} for size in ((80, 64), (64, 64))]
    http_request = HttpRequest(
        {"body": json.dumps({"imageList": files}).encode()},
        path="sdapi/v1/extra-batch-images",
        content_type="application/json",
    )
    for _ in Service(eager, content_filter=Watching()).answer(http_request).steps:
        pass
    assert seen == [((80, 64), None), ((64, 64), None), ((80, 64), (160, 128)), ((64, 64), (128, 128))]


# Two passes


@pytest.fixture(scope="module")
def plain(tiny_model: Path) -> LoadedPipeline:
    """A server without an upscaler."""
    return load(tiny_model)


def test_the_second_pass_starts_from_the_enlarged_image(plain: LoadedPipeline) -> None:
    """A client that enlarges an image itself and sends it gets the same pixels."""
    first = Image.fromarray(make_picture(plain).astype(np.uint8))
    start = encode(first.resize((192, 192), Image.Resampling.LANCZOS))
    size = {"width": 192, "height": 192}
    expected = make_picture(plain, image=start, strength=0.5, num_inference_steps=6, **size)
    made = make_picture(plain, hires={"scale": 1.5, "strength": 0.5, "steps": 6})
    assert made.shape == (192, 192, 3)
    assert np.array_equal(made, expected)


def test_the_upscaler_enlarges_for_the_second_pass(eager: LoadedPipeline, plain: LoadedPipeline, file: Path) -> None:
    first = Image.fromarray(make_picture(eager).astype(np.uint8))
    doubled = Image.fromarray(run_upscaler(as_upscaler(eager.upscaler.module), first, 2).astype(np.uint8))  # type: ignore[union-attr]
    start = encode(doubled.resize((192, 192), Image.Resampling.LANCZOS))
    fields = {"scale": 1.5, "strength": 0.5}
    made = make_picture(eager, hires=fields)
    assert np.array_equal(made, make_picture(plain, image=start, strength=0.5, width=192, height=192))
    assert not np.array_equal(made, make_picture(plain, hires=fields))
    named = [
        describe_image(each, each.contract.check({"prompt": "x", "hires": fields}), 0, unet_calls=4)["made_with"]
        for each in (eager, plain)
    ]
    assert [each["hires_upscaler"] for each in named] == ["double", "Lanczos"]


def test_both_passes_and_the_upscaling_count(eager: LoadedPipeline) -> None:
    hires = {"scale": 1.5, "strength": 0.5, "steps": 4}
    steps = list_progress(eager, prompt="a red fox", hires=hires, upscale=2, num_images_per_prompt=2)
    # Two steps, a tile, two steps of four, four tiles of 192 pixels enlarged in one.
    assert [each.done for each in steps] == list(range(1, 2 * 6 + 1))
    assert {each.total for each in steps} == {12}
    assert [each.steps for each in steps] == [4] * 12
    shares = [each.share for each in steps]
    assert shares == sorted(shares)
    assert [shares[5], shares[-1]] == pytest.approx([0.5, 1])
    assert steps[-1].image is not None
    assert steps[-1].image.image.size == (384, 384)
    assert steps[-1].image.unet_calls == 4


def test_the_work_limit_counts_both_passes(plain: LoadedPipeline) -> None:
    fields = {"prompt": "x", "num_inference_steps": 4, "hires": {"scale": 2, "strength": 0.5}}
    work = (4 * 128 * 128 + 2 * 256 * 256) / 1e6
    assert limit_work(plain, work * 1.001).check(fields).image_size == (256, 256)
    with pytest.raises(RequestError, match="not 4 UNet calls of 128x128 and 2 UNet calls of 256x256 = 0.1966; reduce"):
        limit_work(plain, work * 0.999).check(fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hires": 2}, "hires takes an object such as"),
        ({"hires": {}}, "hires takes an object such as"),
        ({"hires": {"scale": 1}}, "hires.scale takes a number above 1 to 4, not 1"),
        ({"hires": {"scale": 2, "strength": 2}}, "hires.strength takes a number from 0 to 1, not 2"),
        ({"hires": {"scale": 2, "size": 2}}, "hires.'size' is not a key; the keys are scale, strength, steps"),
        ({"hires": {"scale": 2}, "width": 1536}, "the second pass has sides of at most 2048 pixels, not 3072x256"),
        (
            {"hires": {"scale": 2, "strength": 0.1}},
            "hires: the second pass: strength times num_inference_steps",
        ),
        (
            {"hires": {"scale": 2}, "image": encode(draw_leaves(64, 64))},
            "hires is for images from a prompt alone",
        ),
    ],
)
def test_wrong_second_passes_are_refused(plain: LoadedPipeline, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=re.escape(message)):
        plain.contract.check({"prompt": "x", "num_inference_steps": 4, **fields})


def test_allowed_sizes_hold_for_the_second_pass(tiny_model: Path) -> None:
    loaded = load(tiny_model, allowed_sizes=["128x128", "192x192"])
    assert loaded.contract.check({"prompt": "x", "hires": {"scale": 1.5}}).image_size == (192, 192)
    with pytest.raises(RequestError, match="the second pass: width and height take one of 128x128, 192x192 here"):
        loaded.contract.check({"prompt": "x", "hires": {"scale": 2}})


def test_the_text_of_a1111_keeps_the_second_pass(plain: LoadedPipeline) -> None:
    fields = {"prompt": "x", "hires": {"scale": 1.5, "strength": 0.5, "steps": 6}}
    described = describe_image(plain, plain.contract.check(fields), 0, unet_calls=4)
    text = write_infotext(described)
    assert "Denoising strength: 0.5, Hires upscale: 1.5, Hires steps: 6, Hires upscaler: Lanczos" in text
    read = read_infotext(text, plain.contract.limits)
    assert read["request"]["hires"] == fields["hires"]
    assert "warnings" not in read


def test_a1111_asks_for_a_second_pass(eager: LoadedPipeline) -> None:
    body = {"prompt": "x", "seed": 1, "width": 128, "height": 128, "steps": 4, "enable_hr": True, "hr_scale": 1.5}
    body |= {"denoising_strength": 0.5, "hr_second_pass_steps": 6, "hr_upscaler": "double", "scheduler": None}
    _, written = ask(eager, body, "sdapi/v1/txt2img")
    answer = json.loads(written)
    made = open_image(base64.b64decode(answer["images"][0]))
    native = {"prompt": "x", "hires": {"scale": 1.5, "strength": 0.5, "steps": 6}}
    assert np.array_equal(np.asarray(made).astype(int), make_picture(eager, **native))
    info = json.loads(answer["info"])
    assert info["warnings"] == []
    assert "Hires upscaler: double" in info["infotexts"][0]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {"scale": 2.0, "strength": 0.75}),
        ({"hr_resize_x": 192, "hr_resize_y": 192}, {"scale": 1.5, "strength": 0.75}),
        ({"hr_resize_x": 192, "hr_scale": 0}, {"scale": 1.5, "strength": 0.75}),
        ({"hr_second_pass_steps": 0, "denoising_strength": "0.5"}, {"scale": 2.0, "strength": 0.5}),
    ],
)
def test_a1111s_fields_of_a_second_pass(eager: LoadedPipeline, fields: Any, expected: Any) -> None:
    request, warnings = read_a1111(eager, enable_hr=True, **fields)
    assert request.hires.describe() == expected
    assert warnings == []


def read_a1111(loaded: LoadedPipeline, **fields: Any) -> tuple[Any, list[str]]:
    body = {"body": json.dumps({"prompt": "x", "steps": 8, **fields}).encode()}
    return A1111Api().read(body, content_type="application/json", contract=loaded.contract)


def test_a1111_hears_of_other_parts_of_a_second_pass(eager: LoadedPipeline) -> None:
    others = {"hr_upscaler": "Latent", "hr_sampler_name": "Euler", "hr_prompt": "y"}
    _, warnings = read_a1111(eager, enable_hr=True, **others)
    assert warnings == [
        "hr_sampler_name has no effect here, and 'Euler' is ignored",
        "hr_prompt has no effect here, and 'y' is ignored",
        "hr_upscaler is double here, and 'Latent' is ignored",
    ]
    assert read_a1111(eager, enable_hr=False, **others)[1] == []
    for wrong, message in (
        ({"hr_resize_x": 192, "hr_resize_y": 256}, "hr_resize_x and hr_resize_y keep the aspect of 128x128 here"),
        ({"hr_scale": 5}, "hr_scale takes a number above 1 to 4, not 5"),
    ):
        with pytest.raises(RequestError, match=message):
            read_a1111(eager, enable_hr=True, **wrong)
