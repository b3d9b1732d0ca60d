"""Inpainting of a crop around the mask, and the width of a mask's soft edge."""

import io
import json
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from sdxl_server.api.http import HttpRequest
from sdxl_server.api.native import JSON
from sdxl_server.api.warnings import list_warnings
from sdxl_server.diffusion.generation import generate, run_to_end
from sdxl_server.diffusion.previews import draw_preview
from sdxl_server.errors import RequestError
from sdxl_server.model.loaded_pipeline import LoadedPipeline
from sdxl_server.request.masks import blend, choose_crop, cover_cells, fill_mask, keep_protected, prepare_drawing
from sdxl_server.service import Service
from tests.unit.pipelines import encode, make_picture

PHOTO = Image.effect_noise((300, 200), 90).convert("RGB")


def make_mask(*box: int, size: tuple[int, int] = PHOTO.size) -> Image.Image:
    mask = Image.new("L", size)
    if box:
        mask.paste(255, (box[0], box[1], box[2], box[3]))
    return mask


def check(loaded: LoadedPipeline, mask: Image.Image, photo: Image.Image = PHOTO, **fields: Any) -> Any:
    fields = {"prompt": "a red fox", "seed": 1, "width": 128, "height": 128, "padding_mask_crop": 8, **fields}
    return loaded.contract.check({**fields, "image": encode(photo), "mask_image": encode(mask)})


@pytest.mark.parametrize("padding", [0, 8, 200])
def test_a_crop_is_drawn_at_full_size_and_pasted(eager: LoadedPipeline, padding: int) -> None:
    mask = make_mask(200, 90, 240, 120)
    request = check(eager, mask, padding_mask_crop=padding)
    (result,) = run_to_end(generate(eager, request))
    drawn, given, is_protected = (np.asarray(each) for each in (result.image, PHOTO, np.asarray(mask) == 0))
    assert result.image.size == PHOTO.size
    assert np.array_equal(drawn[is_protected], given[is_protected])
    left, top, right, bottom = choose_crop(request)
    assert (right - left, bottom - top) == ((200, 200) if padding == 200 else (40 + 2 * padding,) * 2)
    # The same crop as an image of its own, drawn at the same size, shows the same.
    crop, crop_mask = prepare_drawing(request)
    assert crop.size == crop_mask.size == (128, 128)
    alone = make_picture(eager, image=encode(crop), mask_image=encode(crop_mask), width=128, height=128)
    pasted = Image.fromarray(alone.astype(np.uint8)).resize((right - left, bottom - top), Image.Resampling.LANCZOS)
    middle = (slice(100, 110), slice(210, 230))
    expected = np.asarray(pasted)[middle[0].start - top : middle[0].stop - top, 210 - left : 230 - left]
    assert np.array_equal(drawn[middle], expected)


def test_it_is_what_diffusers_draws_of_this_crop(eager: LoadedPipeline) -> None:
    """diffusers gets the crop itself: its own `padding_mask_crop` stretches masks and blends differently."""
    import diffusers

    request = check(eager, make_mask(100, 60, 164, 124), padding_mask_crop=32)
    assert choose_crop(request) == (68, 28, 196, 156)  # of the drawn size, so nothing is resized
    image, mask = prepare_drawing(request)
    assert image.tobytes() == PHOTO.crop((68, 28, 196, 156)).tobytes()
    pipeline = diffusers.StableDiffusionXLInpaintPipeline(**eager.pipeline.components)
    pipeline.set_progress_bar_config(disable=True)
    arguments = {"image": image, "mask_image": cover_cells(mask, 8), "width": 128, "height": 128, "strength": 1.0}
    arguments |= {"num_inference_steps": 4, "guidance_scale": 5.0, "generator": torch.Generator().manual_seed(1)}
    expected = np.asarray(pipeline("a red fox", **arguments).images[0])
    (result,) = run_to_end(generate(eager, request))
    inside = np.asarray(result.image)[70:114, 110:154]
    assert np.array_equal(inside, expected[70 - 28 : 114 - 28, 110 - 68 : 154 - 68])


@pytest.mark.parametrize(
    ("mask", "size", "padding", "box"),
    [
        ((0, 0, 10, 10), (128, 128), 20, (0, 0, 30, 30)),  # the padding ends at the image's edge
        ((290, 190, 300, 200), (128, 128), 0, (290, 190, 300, 200)),
        ((280, 10, 300, 20), (64, 128), 0, (280, 0, 300, 40)),  # moved into the image
        ((0, 0, 300, 200), (128, 128), 0, (0, -50, 300, 250)),  # it cannot fit
        ((), (192, 128), 5, (0, 0, 300, 200)),  # nothing is repainted
        ((270, 90, 290, 110), (128, 128), 99, (100, 0, 300, 200)),  # less padding, so that it fits
        ((150, 100, 151, 101), (256, 64), 0, (148, 100, 152, 101)),
    ],
)
def test_the_box_has_the_aspect_that_is_drawn(
    eager: LoadedPipeline, mask: tuple[int, ...], size: tuple[int, int], padding: int, box: tuple[int, ...]
) -> None:
    fields: dict[str, Any] = {"width": size[0], "height": size[1], "padding_mask_crop": padding}
    request = check(eager, make_mask(*mask), **fields)
    assert choose_crop(request) == box
    image, cut = prepare_drawing(request)
    assert image.size == cut.size == size
    assert keep_protected(image, request).size == PHOTO.size


def test_an_inverted_mask_crops_what_is_repainted(eager: LoadedPipeline) -> None:
    hole = Image.eval(make_mask(100, 60, 140, 100), lambda value: 255 - value)
    assert choose_crop(check(eager, hole, invert_mask=True, padding_mask_crop=0)) == (100, 60, 140, 100)


def test_a_large_image_is_reduced(eager: LoadedPipeline) -> None:
    most = 2 * eager.config.max_side
    photo = Image.new("RGB", (most * 2, 300), "red")
    request = check(eager, make_mask(0, 0, 100, 100, size=photo.size), photo)
    assert request.image.size == request.mask_image.size == request.image_size == (most, 150)


def test_previews_and_metadata_have_it(eager: LoadedPipeline) -> None:
    request = check(eager, make_mask(200, 90, 240, 120), mask_blur=9)
    assert {"padding_mask_crop": 8, "mask_blur": 9, "width": 128}.items() <= request.describe().items()
    preview = keep_protected(draw_preview(eager, next(generate(eager, request))), request)
    assert preview.size == PHOTO.size
    body = {"prompt": "a fox", "padding_mask_crop": 4, "num_inference_steps": 1, "width": 64, "height": 64}
    body |= {"image": encode(PHOTO), "mask_image": encode(make_mask(20, 20, 60, 60))}
    http_request = HttpRequest({"body": json.dumps(body).encode()}, content_type=JSON, accept=JSON)
    response = Service(eager).answer(http_request)
    (answer,) = (json.loads(b"".join(each for each in [*_list(response.steps)] if each)),)
    assert answer["size"] == "300x200"


def _list(steps: Any) -> Any:
    last = yield from steps
    yield last


@pytest.mark.parametrize("width", [0, 1, 4, 30])
def test_the_soft_edge_lies_inside_the_mask(eager: LoadedPipeline, width: int) -> None:
    mask, black, white = (
        make_mask(20, 20, 120, 120, size=(140, 140)),
        *(Image.new("RGB", (140, 140), colour) for colour in ("black", "white")),
    )
    row = np.asarray(blend(white, black, mask, width=width))[70, :, 0].astype(int)
    assert not row[:20].any()
    assert not row[120:].any()
    assert (row[20 + width : 120 - width] == 255).all()
    assert len(set(row[20 : 20 + width])) == width  # it rises with each pixel
    assert (np.diff(row[19:70]) >= 0).all()


def test_neighbours_are_those_of_pillows_filters() -> None:
    from sdxl_server.request.masks import _filter_neighbours

    noise = Image.effect_noise((50, 40), 90)
    for choose, kind in ((np.minimum, ImageFilter.MinFilter), (np.maximum, ImageFilter.MaxFilter)):
        assert np.array_equal(_filter_neighbours(np.asarray(noise), choose), np.asarray(noise.filter(kind(3))))


def test_a_mask_is_filled_with_the_colours_around_it(eager: LoadedPipeline) -> None:
    ramp = Image.linear_gradient("L").resize((200, 130))
    photo = Image.merge("RGB", (ramp, ramp.transpose(Image.Transpose.ROTATE_180), Image.new("L", ramp.size, 40)))
    spoiled = photo.copy()
    box = (61, 33, 147, 95)
    spoiled.paste("red", box)
    filled = np.asarray(fill_mask(spoiled, make_mask(*box, size=photo.size))).astype(int)
    is_kept = np.asarray(make_mask(*box, size=photo.size)) == 0
    expected = np.asarray(photo).astype(int)
    assert np.array_equal(filled[is_kept], expected[is_kept])
    assert np.abs(filled - expected)[~is_kept].mean() < 20  # of 255: the gradient goes on
    for mask in (make_mask(size=photo.size), make_mask(0, 0, *photo.size, size=photo.size)):
        assert fill_mask(photo, mask).tobytes() == photo.tobytes()


def test_a_filled_mask_draws_nothing_of_the_original(eager: LoadedPipeline) -> None:
    mask = encode(make_mask(40, 40, 90, 90, size=(128, 128)))
    images: list[Any] = []
    photo = Image.effect_noise((128, 128), 90).convert("RGB")
    for colour in ("red", "blue"):
        photo.paste(colour, (40, 40, 90, 90))
        fields = {"image": encode(photo), "mask_image": mask, "strength": 0.5, "mask_fill": "surroundings"}
        images.append(make_picture(eager, **fields))
    inside = (slice(46, 84), slice(46, 84))  # where no seam is blended
    assert np.array_equal(images[0][inside], images[1][inside])
    assert not np.array_equal(images[0], make_picture(eager, **{**fields, "mask_fill": "original"}))


def test_without_a_mask_they_have_no_effect(eager: LoadedPipeline) -> None:
    request = eager.contract.check({"prompt": "a", "image": encode(PHOTO), "padding_mask_crop": 8, "mask_blur": 2})
    assert not request.is_crop
    warnings = list_warnings(eager, request)
    assert [f"{name} has no effect without a mask" for name in ("mask_blur", "padding_mask_crop")] == warnings


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"padding_mask_crop": -1}, "padding_mask_crop takes a whole number from 0 to 1024, not -1"),
        ({"padding_mask_crop": True}, "padding_mask_crop takes a whole number from 0 to 1024, not True"),
        ({"mask_blur": 65}, "mask_blur takes a whole number from 0 to 64, not 65"),
        ({"resize_mode": "fill"}, "resize_mode takes one of crop, pad, stretch, not 'fill'"),
    ],
)
def test_wrong_values_are_refused(eager: LoadedPipeline, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as caught:
        check(eager, make_mask(), **fields)
    assert str(caught.value) == message


def test_an_image_is_stretched_on_request(eager: LoadedPipeline) -> None:
    halves = Image.new("RGB", (200, 100), "red")
    halves.paste((0, 0, 255), (100, 0, 200, 100))
    file = io.BytesIO()
    halves.save(file, "PNG")
    for mode, colours in (("stretch", (255, 0)), ("crop", (255, 0)), ("pad", (255, 255))):
        fields = {"image": file.getvalue(), "width": 128, "height": 128, "resize_mode": mode, "prompt": "x"}
        request = eager.contract.check(fields)
        top = [request.image.getpixel((x, 3))[0] for x in (20, 110)]
        assert tuple(top) == colours
    stretched = eager.contract.check({**fields, "resize_mode": "stretch"}).image
    assert np.abs(np.asarray(stretched.resize((200, 100))).astype(int) - np.asarray(halves)).mean() < 6
