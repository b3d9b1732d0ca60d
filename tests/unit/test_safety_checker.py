"""The safety checker: loaded, compiled and reported on request only; a flagged image is an error, never a black one."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sdxl_server.api.http import HttpRequest
from sdxl_server.diffusion.generation import build_image_pipeline, generate, run_to_end
from sdxl_server.diffusion.safety import check_safety
from sdxl_server.errors import ConfigError, FlaggedError, NotFiniteError, RequestError
from sdxl_server.model.describe import describe_pipeline, measure_components
from sdxl_server.model.loaded_pipeline import LoadedPipeline
from sdxl_server.service import APIS, Service, describe_error
from tests.unit.pipelines import encode, load, make_picture
from tests.unit.test_upscaling import make_network, save
from tools.random_model import make_safety_checker

CHECKED = {"safety_checker": "model"}
ALONE = {"compile_unet": False, "compile_vae": False, "compile_text_encoders": False}  # of the parts that are compiled
ALWAYS, NEVER = -1.0, 1.0


@pytest.fixture
def make_folder(tiny_sd_model: Path, tmp_path: Path) -> Callable[[float], Path]:
    """Return what makes a model with a safety checker as published folders have one."""

    def make(threshold: float) -> Path:
        folder = shutil.copytree(tiny_sd_model, tmp_path / "model")
        torch.manual_seed(0)
        parts = make_safety_checker(threshold)
        for name in ("safety_checker", "feature_extractor"):
            parts[name].save_pretrained(folder / name)
        index = json.loads((folder / "model_index.json").read_text())
        index |= {
            "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
            "feature_extractor": ["transformers", "CLIPImageProcessor"],
            "requires_safety_checker": True,
        }
        (folder / "model_index.json").write_text(json.dumps(index))
        return folder

    return make


def compute_scores(folder: Path, image: Image.Image) -> float:
    """Return the largest cosine of an image with a concept, by diffusers' own code."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker, cosine_distance
    from transformers import CLIPImageProcessorPil

    checker = StableDiffusionSafetyChecker.from_pretrained(folder / "safety_checker")
    pixels = CLIPImageProcessorPil.from_pretrained(folder / "feature_extractor")(image, return_tensors="pt")
    with torch.no_grad():
        embedded = checker.visual_projection(checker.vision_model(pixels.pixel_values)[1])
        return float(cosine_distance(embedded, checker.concept_embeds).max())


def set_threshold(folder: Path, threshold: float) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "safety_checker/model.safetensors"
    weights = load_file(path)
    weights["concept_embeds_weights"].fill_(threshold)
    save_file(weights, path, metadata={"format": "pt"})


def test_null_loads_no_checker(make_folder: Callable[[float], Path], tiny_sd_model: Path) -> None:
    loaded = load(make_folder(ALWAYS))
    assert loaded.pipeline.safety_checker is loaded.pipeline.feature_extractor is None
    assert describe_pipeline(loaded)["safety_checker"] is None
    plain = load(tiny_sd_model)
    assert np.array_equal(make_picture(loaded), make_picture(plain))
    assert loaded.weights_sha256 == plain.weights_sha256


@pytest.mark.parametrize("pt2", [None, "openvino"])
def test_model_is_compiled_reported_and_refuses(make_folder: Callable[[float], Path], pt2: str | None) -> None:
    """The warm-up's image is flagged too, and that is no error."""
    loaded = load(make_folder(ALWAYS), pt2, warm_up=True, **CHECKED, **ALONE)
    report = describe_pipeline(loaded)
    assert report["safety_checker"] == "model"
    if pt2:
        assert "safety_checker" in report["compiled_parts"]
        (graph,) = report["openvino"]["safety_checker"]
        assert graph["models"]
        assert not graph["operators_outside"]
        assert measure_components(loaded)["safety_checker"]["OpenVINOModels"] == (1, "count")
    request = loaded.contract.check({"prompt": "a red fox", "seed": 7})
    with pytest.raises(FlaggedError, match="flagged the image of seed 7") as caught:
        run_to_end(generate(loaded, request))
    assert (caught.value.status, caught.value.param) == (400, "prompt")


@pytest.mark.parametrize("pt2", [None, "openvino"])
def test_each_image_is_checked_by_its_own_content(make_folder: Callable[[float], Path], pt2: str | None) -> None:
    folder = make_folder(NEVER)
    loaded = load(folder, pt2, **CHECKED, **ALONE)
    images = {seed: Image.fromarray(make_picture(loaded, seed=seed).astype(np.uint8)) for seed in (1, 2)}
    scores = {seed: compute_scores(folder, image) for seed, image in images.items()}
    mild, strong = sorted(scores, key=lambda seed: scores[seed])
    set_threshold(folder, (scores[mild] + scores[strong]) / 2)
    loaded = load(folder, pt2, **CHECKED, **ALONE)
    assert np.array_equal(make_picture(loaded, seed=mild), np.asarray(images[mild]))
    with pytest.raises(FlaggedError, match=f"seed {strong}"):
        make_picture(loaded, seed=strong)


@pytest.mark.parametrize("more", [{}, {"mask_image": encode(Image.new("L", (128, 128), 255))}])
def test_images_from_images_are_checked(make_folder: Callable[[float], Path], more: dict[str, Any]) -> None:
    photo = encode(Image.effect_noise((128, 128), 90).convert("RGB"))
    loaded = load(make_folder(ALWAYS), **CHECKED)
    with pytest.raises(FlaggedError):
        make_picture(loaded, image=photo, strength=0.5, **more)


def test_unchecked_images_are_unchanged(make_folder: Callable[[float], Path], tiny_sd_model: Path) -> None:
    loaded, plain = load(make_folder(NEVER), **CHECKED), load(tiny_sd_model)
    request = loaded.contract.check({"prompt": "x"})
    assert build_image_pipeline(loaded, request, loaded.functions).safety_checker is None  # diffusers' would run too
    assert np.array_equal(make_picture(loaded), make_picture(plain))
    assert loaded.weights_sha256 == plain.weights_sha256


def test_published_names_and_settings(make_folder: Callable[[float], Path]) -> None:
    """Folders of Stable Diffusion 1.x have these names of weights and this preprocessor_config.json."""
    from safetensors.torch import load_file, save_file

    folder = make_folder(NEVER)
    path = folder / "safety_checker/model.safetensors"
    image = Image.effect_noise((128, 128), 90).convert("RGB")
    old = {"crop_size": 32, "size": 32, "resample": 3, "feature_extractor_type": "CLIPFeatureExtractor"}
    steps = dict.fromkeys(("do_center_crop", "do_convert_rgb", "do_normalize", "do_resize"), True)
    numbers = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
    (folder / "feature_extractor/preprocessor_config.json").write_text(json.dumps(old | steps | numbers))
    score = compute_scores(folder, image)
    vision = re.compile(r"^vision_model\.(vision_model\.)?")
    long = {vision.sub("vision_model.vision_model.", name): each for name, each in load_file(path).items()}
    assert "vision_model.vision_model.embeddings.class_embedding" in long
    save_file(long, path, metadata={"format": "pt"})
    set_threshold(folder, score - 0.01)
    with pytest.raises(FlaggedError):
        check_safety(load(folder, **CHECKED), image, seed=1)
    set_threshold(folder, score + 0.01)
    check_safety(load(folder, **CHECKED), image, seed=1)


def test_numbers_that_are_not_finite_pass_no_image(make_folder: Callable[[float], Path]) -> None:
    loaded = load(make_folder(ALWAYS), **CHECKED)
    loaded.pipeline.safety_checker.vision_model.post_layernorm.weight.data.fill_(float("nan"))
    with pytest.raises(NotFiniteError, match="the safety checker's result"):
        make_picture(loaded)


@pytest.mark.parametrize("missing", ["safety_checker", "feature_extractor"])
def test_folder_without_one_is_refused(make_folder: Callable[[float], Path], missing: str) -> None:
    folder = make_folder(NEVER)
    shutil.rmtree(folder / missing)
    with pytest.raises(ConfigError, match=rf"^handler.safety_checker: model takes .* {missing}, .* --safety-checker$"):
        load(folder, **CHECKED)


@pytest.mark.parametrize("missing", ["concept_embeds_weights", "special_care_embeds", "visual_projection.weight"])
def test_a_checker_with_missing_weights_is_refused(make_folder: Callable[[float], Path], missing: str) -> None:
    """transformers would fill them with random numbers, and flagged images could pass."""
    from safetensors.torch import load_file, save_file

    folder = make_folder(ALWAYS)
    path = folder / "safety_checker/model.safetensors"
    weights = load_file(path)
    del weights[missing]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=f"safety_checker lacks 1 weights of its .*, such as {missing}"):
        load(folder, **CHECKED)


def test_pickled_checker_is_refused_where_it_is_loaded(make_folder: Callable[[float], Path]) -> None:
    folder = make_folder(NEVER)
    path = folder / "safety_checker/model.safetensors"
    path.rename(path.with_name("pytorch_model.bin"))
    load(folder)
    with pytest.raises(ConfigError, match=r"safety_checker/pytorch_model.bin is a pickle, which can run code"):
        load(folder, **CHECKED)


def test_xl_has_none(tiny_model: Path) -> None:
    with pytest.raises(ConfigError, match=r"^handler.safety_checker: model .* Stable Diffusion XL has none"):
        load(tiny_model, **CHECKED)


def ask(loaded: LoadedPipeline, path: str = "", **fields: Any) -> tuple[str, bytes]:
    """Return the warnings and the bytes of a response."""
    body = json.dumps({"prompt": "a red fox", "num_inference_steps": 4, "seed": 3, **fields}).encode()
    response = Service(loaded).answer(HttpRequest({"body": body}, path, "application/json"))
    sent = []
    while True:
        try:
            sent.append(next(response.steps) or b"")
        except StopIteration as end:
            return response.headers.get("X-Warning", ""), b"".join([*sent, end.value])


@pytest.mark.parametrize("path", [each for each in APIS if "extra" not in each])
@pytest.mark.parametrize("more", [{}, {"stream": True, "partial_images": 1}, {"num_images_per_prompt": 2}])
def test_flagged_image_is_an_error_of_every_api(
    make_folder: Callable[[float], Path], path: str, more: dict[str, Any]
) -> None:
    loaded = load(make_folder(ALWAYS), **CHECKED)
    photo = encode(Image.new("RGB", (128, 128), "red"))
    photos: dict[str, dict[str, Any]] = {
        "v1/images/edits": {"image": photo},
        "sdapi/v1/img2img": {"init_images": [photo]},
    }
    with pytest.raises(RequestError, match="flagged the image of seed 3") as caught:
        ask(loaded, path, **photos.get(path, {}), **more)
    status, described = describe_error(caught.value, "id", path=path)
    if path.startswith("sdapi"):
        assert (status, described["detail"][0]["loc"]) == (422, ["body", "prompt"])
    else:
        assert (status, described["error"]["code"]) == (400, "content_policy_violation" if path else 400)


@pytest.mark.parametrize("path", ["", "sdapi/v1/extra-single-image"])
def test_flagged_upload_is_not_enlarged(make_folder: Callable[[float], Path], path: str, tmp_path: Path) -> None:
    file = save(make_network(), tmp_path / "double.safetensors")
    loaded = load(make_folder(ALWAYS), upscaler_path=str(file), **CHECKED)
    fields: dict[str, Any] = {"image": encode(Image.new("RGB", (128, 128), "red"))}
    body = json.dumps(fields if path else {**fields, "upscale": 2}).encode()
    with pytest.raises(RequestError, match="flagged the upscaled image, so it is not sent") as caught:
        list(Service(loaded).answer(HttpRequest({"body": body}, path, "application/json")).steps)
    assert caught.value.param == "image"


@pytest.mark.parametrize("preview", ["fast", "exact"])
def test_previews_are_not_sent(make_folder: Callable[[float], Path], preview: str) -> None:
    """They cannot be checked; a warning says so."""
    loaded = load(make_folder(NEVER), preview=preview, **CHECKED)
    warning, sent = ask(loaded, stream=True, partial_images=2)
    assert warning == "partial_images has no effect here: the safety checker cannot check previews"
    assert b"partial_image" not in sent.replace(warning.encode(), b"")
    assert b"image_generation.completed" in sent
    assert ask(loaded, stream=True)[0] == ask(loaded, partial_images=2)[0] == ""
