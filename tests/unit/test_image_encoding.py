"""What files of pictures hold, and what is warned of."""

import dataclasses
import io
import json

import numpy as np
import pytest
from PIL import Image

from sdxl_server.api.image_encoding import encode_image
from sdxl_server.api.image_metadata import describe_image
from sdxl_server.api.marking import Marker
from sdxl_server.api.metadata import read_metadata
from sdxl_server.api.warnings import list_warnings
from sdxl_server.config.settings import HandlerConfig
from sdxl_server.diffusion.generation import generate, run_to_end
from sdxl_server.model.loaded_pipeline import LoadedPipeline
from tests.unit.pipelines import make_picture

MARKER = Marker(HandlerConfig())


def test_strength_without_an_image_is_told(eager: LoadedPipeline) -> None:
    request = eager.contract.check({"prompt": "x", "strength": 0.5})
    assert list_warnings(eager, request) == ["strength has no effect without an image"]
    request = eager.contract.check({"prompt": "x", "resize_mode": "pad"})
    assert list_warnings(eager, request) == ["resize_mode has no effect without an image"]
    request = eager.contract.check({"prompt": "x", "invert_mask": True})
    assert list_warnings(eager, request) == ["invert_mask has no effect without a mask"]
    assert np.array_equal(make_picture(eager, strength=0.5), make_picture(eager))


def test_prompts_too_long_for_a_jpeg_are_told_before_the_work(eager: LoadedPipeline) -> None:
    """An operator can allow such prompts."""
    for kind, is_held in (("jpeg", False), ("png", True), ("webp", True)):
        request = eager.contract.check({"prompt": "x", "output_format": kind})
        request = dataclasses.replace(request, prompt_2="\x01" * 12_000)
        assert any("too long for a JPEG" in each for each in list_warnings(eager, request)) is not is_held
        parameters = describe_image(eager, request, 0, unet_calls=4)
        file = encode_image(Image.new("RGB", (64, 64)), request, marker=MARKER, parameters=parameters)
        image = Image.open(io.BytesIO(file))
        assert bool(image.info.get("parameters") or image.getexif()) is is_held
        assert (b"sdxl:metadata" in image.info["xmp"]) is is_held


def test_long_prompts_are_told(eager: LoadedPipeline) -> None:
    fields = {"prompt": "fox " * 80, "negative_prompt": "blue"}
    (warning,) = list_warnings(eager, eager.contract.check(fields))
    assert "prompt has" in warning
    assert "the first 77" in warning


def test_prompts_in_other_programs_words_are_told_in_the_file(eager: LoadedPipeline) -> None:
    request = eager.contract.check({"prompt": "a (red:1.3) fox", "negative_prompt": "snow BREAK", "seed": 1})
    warnings = list_warnings(eager, request)
    assert [each.partition(":")[0] for each in warnings] == ["prompt", "negative_prompt"]
    assert describe_image(eager, request, 0, unet_calls=4, warnings=warnings)["warnings"] == warnings
    assert "warnings" not in describe_image(eager, request, 0, unet_calls=4)


@pytest.mark.parametrize("output_format", ["jpeg", "png", "webp"])
def test_file_holds_what_makes_the_picture_again(eager: LoadedPipeline, output_format: str) -> None:
    fields = {"prompt": "a fox 🦊", "seed": 3, "output_format": output_format, "num_images_per_prompt": 2}
    request = eager.contract.check(fields)
    pictures = [each.image for each in run_to_end(generate(eager, request))]
    file = encode_image(pictures[1], request, marker=MARKER, parameters=describe_image(eager, request, 1, unet_calls=4))
    image = Image.open(io.BytesIO(file))
    assert image.format == output_format.upper()
    text = image.text["parameters"] if output_format == "png" else read_comment(image)  # type: ignore[attr-defined]
    assert text.startswith("a fox 🦊\nSteps: 4, Sampler: Euler, ")
    parameters = read_metadata(file, eager.contract.limits)
    assert parameters == json.loads(json.dumps(describe_image(eager, request, 1, unet_calls=4)))
    again = run_to_end(generate(eager, eager.contract.check(parameters["request"])))
    assert again[0].image.tobytes() == pictures[1].tobytes()
    assert parameters["made_with"]["weights_sha256"] == eager.weights_sha256
    assert parameters["made_with"]["backend"] == "eager"
    plain = Image.open(io.BytesIO(encode_image(pictures[1], request, marker=MARKER)))
    assert "parameters" not in plain.info
    assert not plain.getexif()
    assert b"sdxl:metadata" not in plain.info["xmp"]


def read_comment(image: Image.Image) -> str:
    comment = image.getexif().get_ifd(0x8769)[0x9286]  # EXIF's UserComment
    return bytes(comment.removeprefix(b"UNICODE\0")).decode("utf-16-be")


@pytest.mark.parametrize("output_format", ["jpeg", "webp"])
def test_quality(eager: LoadedPipeline, output_format: str) -> None:
    image = Image.effect_noise((256, 256), 50).convert("RGB")
    small, large = (
        encode_image(
            image,
            eager.contract.check({"prompt": "x", "quality": quality, "output_format": output_format}),
            marker=MARKER,
        )
        for quality in (10, 90)
    )
    assert len(small) < len(large)
    assert Image.open(io.BytesIO(large)).size == (256, 256)
