"""Pictures as people have them: what is drawn from is what a viewer shows, brought to a size without stretching."""

import base64
import io
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from sdxl_server.errors import RequestError
from sdxl_server.request.limits import Limits
from sdxl_server.request.masks import blend, cover_cells
from sdxl_server.request.resizing import choose_size, list_sizes
from sdxl_server.request.upload_limits import (
    MAX_NUMBERS,
    MAX_PIXELS,
    MAX_RUNS,
    MAX_SEGMENTS,
    check_segments,
)
from sdxl_server.request.uploads import Upload, read_bytes, read_upload
from tests.unit.test_request import CONTRACT

RAMP = np.tile(np.linspace(0, 255, 64).astype(np.uint8), (64, 1))
GREY = Image.fromarray(RAMP)
LONG = RAMP.astype(np.uint16) * 257
LEFT = int(RAMP[0, 5])


def save(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def read(file: bytes) -> Upload:
    return read_upload("image", file, max_side=2048)


def make_clear(image: Image.Image = GREY, mode: str = "RGBA") -> Image.Image:
    """Return a picture that is opaque at its right and transparent at its left."""
    clear = image.convert("RGBA")
    clear.putalpha(Image.fromarray(np.where(np.arange(64) < 32, 0, 255).astype(np.uint8)[None].repeat(64, 0)))
    return clear.convert(mode)


def convert_to_lab(image: Image.Image) -> Image.Image:
    profiles = (ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"))
    made = ImageCms.profileToProfile(image.convert("RGB"), *profiles, outputMode="LAB")
    assert made is not None
    return made


SHOWN: dict[str, tuple[Callable[[], bytes], int]] = {  # with what they show at the left
    "PNG of 16 bits": (lambda: save(Image.fromarray(LONG)), LEFT),
    "TIFF of 16 bits": (lambda: save(Image.fromarray(LONG), "TIFF"), LEFT),
    "TIFF of 16 bits, the other way round": (lambda: save(Image.fromarray(LONG.astype(">u2")), "TIFF"), LEFT),
    "TIFF of 32 bits": (lambda: save(Image.fromarray(LONG.astype(np.int32)), "TIFF"), LEFT),
    "TIFF of numbers to 1": (lambda: save(Image.fromarray(RAMP.astype(np.float32) / 255), "TIFF"), LEFT),
    "PNG of 1 bit": (lambda: save(Image.fromarray(RAMP > 40)), 0),
    "CMYK": (lambda: save(GREY.convert("CMYK"), "JPEG"), LEFT),
    "YCbCr": (lambda: save(GREY.convert("YCbCr"), "TIFF"), LEFT),
    "Lab": (lambda: save(convert_to_lab(GREY), "TIFF"), LEFT),
    "alpha": (lambda: save(make_clear()), 255),
    "grey with alpha": (lambda: save(make_clear(mode="LA")), 255),
    "a colour that is transparent": (lambda: save(GREY, transparency=LEFT), 255),
    "a grey of 16 bits that is transparent": (lambda: save(Image.fromarray(LONG), transparency=LEFT * 257), 255),
    "a palette's colour that is transparent": (lambda: save(GREY.convert("P"), "GIF", transparency=LEFT), 255),
    "WebP with alpha": (lambda: save(make_clear(), "WEBP", lossless=True), 255),
    "AVIF": (lambda: save(GREY.convert("RGB"), "AVIF", quality=95), LEFT),
    "BMP": (lambda: save(GREY.convert("RGB"), "BMP"), LEFT),
    "a telephone's JPEG of two pictures": (
        lambda: save(GREY.convert("RGB"), "MPO", save_all=True, append_images=[GREY.convert("RGB")]),
        LEFT,
    ),
    "GIF of two pictures": (lambda: save(GREY, "GIF", save_all=True, append_images=[GREY.rotate(180)]), LEFT),
    "a profile that is damaged": (lambda: save(GREY.convert("RGB"), icc_profile=bytes(5000)), LEFT),
}


@pytest.mark.parametrize("name", SHOWN)
def test_what_a_viewer_shows_is_read(name: str) -> None:
    make, left = SHOWN[name]
    upload = read(make())
    shown = np.asarray(upload.pixels).astype(int)
    assert (upload.pixels.mode, upload.pixels.size) == ("RGB", (64, 64))
    assert np.abs(shown[10, 5] - left).max() <= 2
    assert name == "PNG of 1 bit" or np.abs(shown[10, 60] - RAMP[0, 60]).max() <= 2
    assert (upload.alpha is not None) == (left == 255)


def test_profiles_are_applied_and_srgb_changes_no_bit() -> None:
    noise = Image.effect_noise((64, 64), 90).convert("RGB")
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert read(save(noise, icc_profile=srgb)).pixels.tobytes() == noise.tobytes()
    swapped = bytearray(srgb)  # red and blue change places: a profile that shows whether it was used
    at = {tag: srgb.index(tag) for tag in (b"rXYZ", b"bXYZ")}
    swapped[at[b"rXYZ"] : at[b"rXYZ"] + 4], swapped[at[b"bXYZ"] : at[b"bXYZ"] + 4] = b"bXYZ", b"rXYZ"
    shown = read(save(Image.new("RGB", (64, 64), "red"), icc_profile=bytes(swapped))).pixels.getpixel((5, 5))
    assert shown[2] > 200 > 60 > shown[0]


def make_exif(*, is_whole: bool) -> bytes:
    """Return EXIF that says a quarter turn; its unit of resolution, which Pillow cannot write, or all else is wrong."""
    count = 4  # more than there are
    wrong = struct.pack("<HHIi", 0x0128, 9, 1, -5) if is_whole else struct.pack("<HHII", 0x010E, 2, 9999, 9999)
    tags = wrong + struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", count) + tags + struct.pack("<HHII", 0x8769, 4, 1, 2**31)


@pytest.mark.parametrize(
    ("kind", "is_whole"),
    [("JPEG", True), ("JPEG", False), ("PNG", True), ("PNG", False), ("WEBP", True), ("WEBP", False), ("AVIF", False)],
)
def test_photo_is_upright_whatever_else_is_wrong_with_its_exif(kind: str, is_whole: bool) -> None:
    exif = make_exif(is_whole=is_whole)
    file = save(Image.new("RGB", (64, 32), "red"), kind, exif=b"Exif\0\0" + exif if kind == "JPEG" else exif)
    assert read(file).pixels.size == (32, 64)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF"])
def test_photo_of_24_megapixels_is_made_smaller(kind: str) -> None:
    file = save(Image.new("RGB", (6000, 4000), "red"), kind)
    request = CONTRACT.check({"prompt": "a", "image": base64.b64encode(file).decode()})
    assert (request.width, request.height) == (152, 104)
    assert request.image.getpixel((50, 50))[0] > 250


@pytest.mark.parametrize(
    ("size", "is_progressive"),
    [
        ((8160, 6144), False),
        ((9248, 6936), False),
        ((12000, 9000), False),
        ((12000, 9000), True),
        ((16320, 12240), False),
    ],
)
def test_photos_of_many_megapixels_are_decoded_smaller(size: tuple[int, int], is_progressive: bool) -> None:
    """Upright, with the sides that a result needs, and within a bound of memory."""
    ramp = Image.linear_gradient("L").resize(size)
    exif = Image.Exif()
    exif[0x0112] = 6
    file = save(ramp, "JPEG", progressive=is_progressive, exif=exif, quality=50)
    del ramp
    upload = read(file)
    assert min(upload.pixels.size) >= 2048
    assert upload.pixels.width * upload.pixels.height <= MAX_PIXELS
    assert abs(upload.pixels.width / upload.pixels.height - size[1] / size[0]) < 0.001
    middle = upload.pixels.height // 2
    left, right = (upload.pixels.getpixel((at, middle))[0] for at in (20, upload.pixels.width - 21))
    assert (left > 240, right < 15) == (True, True)  # the quarter turn brings the black top of the ramp to the right


def test_photos_are_bounded() -> None:
    with pytest.raises(RequestError, match="at most 200 megapixels, not 16008x16000$"):
        read(save(Image.new("L", (16_008, 16_000)), "JPEG"))
    with pytest.raises(RequestError, match="at most 50 megapixels, not 8160x6144; a JPEG may have 200$"):
        read(save(Image.new("1", (8160, 6144))))
    wide = read(save(Image.new("L", (20_000, 6000)), "JPEG")).pixels.size
    assert min(wide) >= 2048
    many = read_upload("image", save(Image.new("L", (8160, 6144)), "JPEG"), max_side=4096).pixels.size
    assert many == (4080, 3072)


def test_colours_in_several_scans_count_as_progressive() -> None:
    """Then libjpeg holds all coefficients too."""
    frame = b"\xff\xc0\0\x11\x08" + struct.pack(">HH", 12_240, 16_320) + b"\3" + bytes(9)
    scan = b"\xff\xda\0\x0c\3" + bytes(9)
    check_segments(b"\xff\xd8" + frame + scan)
    for file in (frame + scan.replace(b"\x0c\3", b"\x0c\1"), frame.replace(b"\xff\xc0", b"\xff\xc2") + scan):
        with pytest.raises(ValueError, match="it is progressive, with more than 120 megapixels"):
            check_segments(b"\xff\xd8" + file)


@pytest.mark.parametrize("kind", [b"heic", b"mif1", b"hevc"])
def test_heic_is_named(kind: bytes) -> None:
    with pytest.raises(RequestError, match=r"this file is HEIC \(HEIF\): save or export it"):
        read(b"\0\0\0\x18ftyp" + kind + bytes(100))


FILE = save(GREY)
TEXT = base64.b64encode(FILE).decode()


@pytest.mark.parametrize(
    "text",
    [
        TEXT,
        base64.encodebytes(FILE).decode().replace("\n", "\r\n"),
        f"\n  {TEXT} \t\n",
        f"data:image/png;base64,{TEXT}",
        f"Data:image/png;charset=utf-8;BASE64,{TEXT}",
        "data:image/png;base64,\n" + base64.encodebytes(FILE).decode(),
        base64.urlsafe_b64encode(FILE).decode(),
        base64.urlsafe_b64encode(FILE).decode().rstrip("="),
        TEXT.rstrip("="),
    ],
)
def test_base64_is_read_as_tools_make_it(text: str) -> None:
    assert read_bytes("image", text) == FILE
    assert read_bytes("image", text.encode()) == FILE  # a form's field
    assert read_bytes("image", FILE) == FILE


@pytest.mark.parametrize(
    "text", [TEXT + "A" * (-len(TEXT.rstrip("=")) % 4 + 1), "data:,x", "é" * 9, "ab=cd==x", "b'" + TEXT]
)
def test_what_is_no_base64_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match=r"image takes .*(base64|image)"):
        read_upload("image", text, max_side=2048)


@pytest.mark.parametrize(
    ("image", "given", "size"),
    [
        ((4032, 3024), {}, (1152, 896)),
        ((3024, 4032), {}, (896, 1152)),
        ((1920, 1080), {}, (1344, 768)),
        ((512, 512), {}, (1024, 1024)),
        ((1024, 1024), {"width": 512}, (512, 512)),
        ((4032, 3024), {"height": 768}, (1024, 768)),
        ((1170, 2532), {}, (704, 1472)),
        ((9000, 100), {}, (2048, 512)),
        ((9000, 100), {"width": 512}, (512, 64)),
    ],
)
def test_size_follows_the_images_aspect(image: tuple[int, int], given: dict[str, int], size: tuple[int, int]) -> None:
    assert choose_size(image, Limits(), **given) == size


def test_size_is_one_of_those_that_are_allowed() -> None:
    limits = Limits(allowed_sizes=((128, 128), (128, 64), (64, 64)))
    assert [choose_size(image, limits) for image in ((400, 401), (300, 100), (100, 300))] == [
        *((128, 128), (128, 64), (128, 128)),
    ]
    assert choose_size((300, 100), limits, height=64) == (128, 64)
    assert choose_size((300, 100), limits, height=128) == (128, 128)


@pytest.mark.parametrize("max_side", [4096, 2048, 1020, 1024, 768, 100, 65])
@pytest.mark.parametrize(("own_side", "multiple"), [(1024, 32), (512, 64), (128, 16), (64, 8)])
def test_sizes_are_of_the_models_own_area(own_side: int, multiple: int, max_side: int) -> None:
    sizes = list_sizes(own_side, multiple, max_side)
    assert any(width == height for width, height in sizes)
    assert all(64 <= side <= max_side and side % 8 == 0 for size in sizes for side in size)
    if max_side >= 64 * max(multiple // 64, 1) + multiple:
        assert all(side % multiple == 0 for size in sizes for side in size)
    if (own_side, max_side) == (1024, 2048):
        assert all(0.85 < width * height / 2**20 <= 1.08 for width, height in sizes)
        assert len(sizes) == 41


def test_nothing_is_stretched() -> None:
    image = Image.new("RGB", (256, 128), "red")
    image.paste((0, 0, 255), (96, 32, 160, 96))  # a square
    fields = {"prompt": "a", "image": base64.b64encode(save(image)).decode(), "width": 128, "height": 128}
    crop, pad = (np.asarray(CONTRACT.check({**fields, "resize_mode": how}).image) for how in ("crop", "pad"))
    for drawn, side in ((crop, 64), (pad, 32)):
        is_blue = drawn[..., 2].astype(int) - drawn[..., 0] > 128
        assert (np.abs(np.sum(is_blue, axis=axis).max() - side) <= 1 for axis in (0, 1))
    assert (crop[2, 64] == (255, 0, 0)).all()
    assert (pad[2, 64] == 255).all()
    assert np.array_equal(np.asarray(CONTRACT.check(fields).image), crop)
    mask = base64.b64encode(save(Image.new("L", (256, 128)))).decode()
    padded = np.asarray(CONTRACT.check({**fields, "mask_image": mask, "resize_mode": "pad"}).mask_image)
    assert (padded[2, 64], padded[64, 64]) == (255, 0)  # no mask protects the bars


def test_mask_tells_by_alpha_or_by_brightness() -> None:
    fields: dict[str, Any] = {"prompt": "a", "image": base64.b64encode(save(Image.new("RGB", (128, 128)))).decode()}
    white = Image.new("L", (64, 64), 255)
    white.paste(0, (32, 0, 64, 64))
    for mask in (make_clear(), make_clear(white), white, white.convert("RGB"), white.convert("1"), white.convert("P")):
        read_mask = CONTRACT.check({**fields, "mask_image": base64.b64encode(save(mask)).decode()}).mask_image
        assert (read_mask.getpixel((20, 60)), read_mask.getpixel((100, 60))) == (255, 0)
        assert set(np.unique(np.asarray(read_mask))) == {0, 255}


def test_blending_lies_within_the_mask() -> None:
    black, white = (Image.new("RGB", (64, 64), colour) for colour in ("black", "white"))
    mask = Image.new("L", (64, 64))
    mask.paste(255, (20, 20, 50, 50))
    mask.paste(255, (5, 0, 6, 64))
    row = np.asarray(blend(white, black, mask))[32, :, 0].tolist()
    assert row[:7] == [0] * 5 + [255, 0]
    assert row[19:26] == [0, 63, 127, 191, 255, 255, 255]
    assert row[48:51] == [127, 63, 0]
    assert np.array_equal(np.asarray(blend(black, white, mask))[..., 0], 255 - np.asarray(mask))  # no line of a hole
    cells = np.asarray(cover_cells(mask, 8))
    assert cells[0, :9].tolist() == [255] * 8 + [0]


def test_pieces_of_further_kinds_are_counted() -> None:
    gif, tiff, bmp = save(GREY, "GIF"), save(GREY, "TIFF"), save(GREY, "BMP")
    start = 13 + (3 << (gif[10] & 7) + 1)
    assert gif[10] & 128
    directory = b"II*\0\x08\0\0\0" + struct.pack("<H", 1)
    for file, told in {
        gif[:start] + b"!\xfe" + b"\1a" * MAX_SEGMENTS + b"\0" + gif[start:]: "more than 10000 blocks",
        gif[:start] + b"\0" * MAX_SEGMENTS + gif[start:]: "more than 10000 blocks",
        directory + struct.pack("<HHII", 273, 4, MAX_NUMBERS + 1, 0) + bytes(4): "a tag of more than 100000 numbers",
        directory + struct.pack("<HHII", 256, 4, 1, 0) + struct.pack("<I", 8): "more than 10000 tags",
        b"II*\0\x08\0\0\0" + b"\xff\xff" + bytes(12 * 65535): "more than 10000 tags",
        b"II+\0" + bytes(100): "BigTIFF",
        bmp[:30] + b"\1\0\0\0" + bytes(MAX_RUNS): "run-length-encoded BMP",
    }.items():
        with pytest.raises(ValueError, match=told):
            check_segments(file)
    for file in (gif, tiff, bmp, gif[:20], tiff[:20], b"GIF89a", b"II*\0", b"MM\0*\0\0\0\x08\0", b"BM"):
        check_segments(file)
