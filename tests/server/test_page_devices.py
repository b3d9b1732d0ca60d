"""The web UI on people's devices: older browsers, files of any kind, the clipboard and full disks."""

import base64
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import Browser, BrowserContext, Page, expect

from tests.newer_browsers import DELETE_APIS
from tests.server.browser import (
    PATIENCE,
    PROMPT,
    download,
    draw,
    drop,
    make_file,
    needs_browser,
    open_context,
    open_page,
    paint_mask,
    wait_for_image,
)
from tools.proxy import LocalProxy

pytestmark = needs_browser
SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="30" height="20"><rect width="15" height="20" fill="red"/></svg>'
HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100)
MEGABYTES_23 = 23_000_000
# Each file that the page opens, by its size.
RECORD_READING = """
    globalThis.opened = [];
    const { arrayBuffer } = Blob.prototype;
    Blob.prototype.arrayBuffer = function () { opened.push(this.size); return arrayBuffer.call(this); };
"""


def record_sent(page: Page) -> list[Any]:
    """Return the list of the requests that the page will send from now on."""
    sent: list[Any] = []
    page.on("request", lambda each: sent.append(each.post_data_json) if each.method == "POST" else None)
    return sent


def expect_chosen(page: Page) -> None:
    expect(page.get_by_alt_text("The image to start from")).to_be_visible()


def expect_refused(page: Page, words: str) -> None:
    error = page.locator("#start-error")
    expect(error).to_contain_text(words)
    expect(page.locator("#chosen")).to_be_hidden()
    script = """(node) => {
        const { x, bottom } = node.getBoundingClientRect();
        return node.contains(document.elementFromPoint(x + 5, bottom - 5));
    }"""
    assert error.evaluate(script)  # nothing covers it


def test_older_browser_draws_paints_and_keeps(context: BrowserContext, nginx: LocalProxy) -> None:
    context.add_init_script(DELETE_APIS)
    page = open_page(context, nginx, token=nginx.token)
    assert page.evaluate("[Promise.withResolvers, [].toSorted, globalThis.OffscreenCanvas].join()") == ",,"
    draw(page)
    wait_for_image(page)
    drop(page, "drawing.svg", SVG)
    paint_mask(page)
    page.get_by_role("button", name="Use the mask").click()
    expect(page.get_by_alt_text("The mask: white is painted anew")).to_be_visible()
    draw(page)
    wait_for_image(page, 2)
    page.reload()
    expect(page.locator("#images li")).to_have_count(2)
    page.get_by_role("button", name="Delete").click()
    expect(page.locator("#images li")).to_have_count(1)


def test_browser_that_blocks_storage_draws(context: BrowserContext, nginx: LocalProxy) -> None:
    refuse = 'get() { throw new DOMException("blocked", "SecurityError"); }'
    for name in ("sessionStorage", "indexedDB"):
        context.add_init_script(f"Object.defineProperty(globalThis, '{name}', {{ {refuse} }});")
    page = open_page(context, nginx, token=nginx.token)
    draw(page)
    expect(page.locator("#gallery-news")).to_contain_text("download it before you leave the page")
    wait_for_image(page)
    assert Image.open(io.BytesIO(download(page))).size == (128, 128)


def save(kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGBA" if kind in ("ICO", "PNG") else "RGB", (96, 64), "red").save(buffer, kind, **options)
    return buffer.getvalue()


def make_large() -> bytes:
    image, buffer = Image.new("P", (9216, 6912), 0), io.BytesIO()
    image.putpalette([255, 0, 0])
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["BMP", "GIF", "TIFF", "AVIF", "WEBP"])
def test_file_that_the_server_takes_is_sent_unchanged(page: Page, kind: str) -> None:
    sent, file = record_sent(page), save(kind)
    drop(page, "image", file)
    if kind == "TIFF":
        expect(page.locator("#start-error")).to_have_text("This browser cannot show TIFF. The server can read it.")
        page.get_by_role("button", name="Paint a mask").click()
        expect(page.locator("#start-error")).to_contain_text("no mask can be painted")
    expect_chosen(page)
    draw(page)
    wait_for_image(page)
    assert base64.b64decode(sent[0]["image"]) == file


@pytest.mark.parametrize(
    ("make", "size", "kind"),
    [
        (lambda: SVG, (1024, 683), "PNG"),
        (lambda: b"\xef\xbb\xbf<?xml version='1.0'?>\n<!-- a -->" + SVG, (1024, 683), "PNG"),
        (lambda: save("ICO", sizes=[(96, 64)]), (96, 64), "JPEG"),
        (lambda: save("PNG") + bytes(MEGABYTES_23), (96, 64), "JPEG"),
        (make_large, (4096, 3072), "JPEG"),
    ],
    ids=["svg", "xml", "ico", "23 MB", "63 megapixels"],
)
def test_file_that_only_the_browser_reads_is_converted(
    page: Page, tmp_path: Path, make: Callable[[], bytes], size: tuple[int, int], kind: str
) -> None:
    sent, path = record_sent(page), tmp_path / "image.bin"
    path.write_bytes(make())
    page.locator("#start-file").set_input_files(path)
    expect_chosen(page)
    draw(page)
    wait_for_image(page)
    image = Image.open(io.BytesIO(base64.b64decode(sent[0]["image"])))
    assert (image.format, image.size) == (kind, size)
    red, green, blue = image.convert("RGB").getpixel((2, 2))  # type: ignore[misc]
    assert red > 240
    assert green < 20
    assert blue < 20


@pytest.mark.parametrize(
    ("name", "type_", "content", "words"),
    [
        (
            "a.heic",
            "image/heic",
            HEIC,
            "a.heic is HEIC, which neither this browser nor the server can read. Use JPEG, PNG",
        ),
        ("a.jpg", "image/jpeg", HEIC.replace(b"heic", b"mif1"), "a.jpg is HEIC, which neither"),
        ("a.jxl", "", b"\xff\x0a" + bytes(40), "a.jxl is JPEG XL, which neither"),
        ("a.pdf", "application/pdf", b"%PDF-1.7", "a.pdf is PDF, which neither"),
        ("a.png", "image/png", make_file()[:60], "a.png is a damaged PNG"),
        ("a.mp4", "video/mp4", b"\0", "a.mp4 is video/mp4, no image."),
        ("a.mov", "", b"\0\0\0\x14ftypqt  " + bytes(40), "a.mov is a video, no image."),
        ("a.mkv", "", b"\x1aE\xdf\xa3" + bytes(40), "a.mkv is a video, no image."),
        ("a.txt", "text/plain", b"a red fox", "a.txt is no image that this browser can read. Use JPEG, PNG, WebP"),
        ("a", "", b"", "a is no image"),
        ("a.tif", "", b"II*\0" + bytes(MEGABYTES_23), "a.tif has 23 MB, and this browser cannot reduce it."),
    ],
    ids=["heic", "heif", "jxl", "pdf", "cut png", "mp4", "mov", "mkv", "text", "empty", "large tiff"],
)
def test_other_file_is_refused_with_its_kind(page: Page, name: str, type_: str, content: bytes, words: str) -> None:
    drop(page, name, content, type_)
    expect_refused(page, words)
    drop(page, "b.png", make_file())
    expect_chosen(page)
    expect(page.locator("#start-error")).to_be_hidden()


@pytest.mark.parametrize(
    ("name", "words"),
    [("film.mp4", "film.mp4 is video/mp4"), ("scan.tif", "has 3.0 GB: an image file has at most 100 MB")],
)
def test_file_of_gigabytes_is_not_read(
    context: BrowserContext, nginx: LocalProxy, tmp_path: Path, name: str, words: str
) -> None:
    context.add_init_script(RECORD_READING)
    page = open_page(context, nginx, token=nginx.token)
    path = tmp_path / name
    path.touch()
    os.truncate(path, 3_000_000_000)
    drag(page, path)
    expect_refused(page, words)
    assert page.evaluate("opened") == []


def drag(page: Page, *paths: Path, items: Any = ()) -> None:
    """Drag files or items from outside of the browser onto the page."""
    session = page.context.new_cdp_session(page)
    data = {"items": list(items), "files": [str(path) for path in paths], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
        session.send("Input.dispatchDragEvent", {"type": kind, "x": 800, "y": 500, "data": data})


def test_folder_and_address_are_refused_in_words(page: Page, tmp_path: Path) -> None:
    expect(page.get_by_label("Prompt", exact=True)).to_be_visible()
    folder = tmp_path / "holiday"
    folder.mkdir()
    drag(page, folder)
    expect_refused(page, "holiday is a folder: drop one image file.")
    drag(page, items=[{"mimeType": "text/uri-list", "data": "https://example.org/a.png"}])
    expect_refused(page, "This is the address of an image, not its file")
    (tmp_path / "image.png").write_bytes(make_file())
    drag(page, folder, tmp_path / "image.png")
    expect_chosen(page)


@pytest.fixture
def clipboard(context: BrowserContext) -> BrowserContext:
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    return context


def copy(page: Page, *kinds: str) -> None:
    """Put an image or a formatted text onto the clipboard."""
    script = """async ([kinds, text]) => {
        const image = Uint8Array.from(atob(text), (each) => each.charCodeAt(0));
        const parts = { "image/png": [image], "text/plain": ["a fox"], "text/html": ["<b>a fox</b>"] };
        const blobs = kinds.map((type) => [type, new Blob(parts[type], { type })]);
        await navigator.clipboard.write([new ClipboardItem(Object.fromEntries(blobs))]);
    }"""
    page.evaluate(script, [kinds, base64.b64encode(make_file()).decode()])


@pytest.mark.parametrize("kinds", [["image/png"], ["text/html", "image/png"]], ids=["screenshot", "image of a page"])
def test_pasted_image_is_where_to_start_from(clipboard: BrowserContext, page: Page, kinds: list[str]) -> None:
    prompt = page.get_by_label("Prompt", exact=True)
    expect(prompt).to_be_focused()
    copy(page, *kinds)
    page.keyboard.press("Control+V")
    expect_chosen(page)
    expect(prompt).to_have_value("")
    draw(page)
    wait_for_image(page)


def test_pasted_text_goes_into_the_prompt(clipboard: BrowserContext, page: Page) -> None:
    """Also with its image, as a spreadsheet copies its cells. Outside of a field the image is meant."""
    prompt = page.get_by_label("Prompt", exact=True)
    for kinds, value in ((["text/plain"], "a fox"), (["text/plain", "text/html", "image/png"], "a foxa fox")):
        copy(page, *kinds)
        prompt.press("Control+V")
        expect(prompt).to_have_value(value)
    expect(page.locator("#chosen")).to_be_hidden()
    page.get_by_role("button", name="Draw", exact=True).press("Control+V")
    expect_chosen(page)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [("a.png", make_file(), None), ("a.heic", HEIC, "is HEIC"), ("a.mov", b"\0\0\0\x08wide", "is a video")],
    ids=["png", "heic", "mov"],
)
def test_copied_file_is_pasted(page: Page, name: str, content: bytes, words: str | None) -> None:
    """A file manager copies the name as text, too."""
    script = """(node, [name, text]) => {
        const clipboardData = new DataTransfer();
        clipboardData.items.add(new File([Uint8Array.from(atob(text), (each) => each.charCodeAt(0))], name));
        clipboardData.setData("text/plain", name);
        node.dispatchEvent(new ClipboardEvent("paste", { clipboardData, bubbles: true, cancelable: true }));
    }"""
    page.get_by_label("Prompt", exact=True).evaluate(script, [name, base64.b64encode(content).decode()])
    if words is None:
        expect_chosen(page)
    else:
        expect_refused(page, words)


def test_full_disk_keeps_the_image_on_the_page(page: Page) -> None:
    expect(page.get_by_label("Prompt", exact=True)).to_be_visible()
    session = page.context.new_cdp_session(page)
    origin = page.evaluate("location.origin")
    session.send("Storage.overrideQuotaForOrigin", {"origin": origin, "quotaSize": 1})
    draw(page)
    wait_for_image(page)
    told = "This browser has not kept the image (its storage is full): download it before you leave the page."
    expect(page.locator("#gallery-news")).to_have_text(told)
    assert Image.open(io.BytesIO(download(page))).size == (128, 128)
    page.reload()
    expect(page.get_by_label("Prompt", exact=True)).to_be_visible()
    expect(page.locator("#images li")).to_have_count(0)


def test_transaction_that_fails_after_its_request_is_reported(context: BrowserContext, nginx: LocalProxy) -> None:
    """The request succeeds. Then the disk refuses the data."""
    script = """for (const name of ["add", "delete"]) {
        const act = IDBObjectStore.prototype[name];
        IDBObjectStore.prototype[name] = function (...given) {
            const request = act.apply(this, given);
            if (globalThis.fails) request.addEventListener("success", () => this.transaction.abort());
            return request;
        };
    }"""
    context.add_init_script(script)
    page = open_page(context, nginx, token=nginx.token)
    draw(page)
    wait_for_image(page)
    page.evaluate("globalThis.fails = true")
    page.get_by_role("button", name="Delete").click()
    expect(page.locator("#gallery-news")).to_have_text("This browser has not deleted the image (it was interrupted).")
    draw(page)
    wait_for_image(page, 2)
    expect(page.locator("#gallery-news")).to_contain_text("This browser has not kept the image (it was interrupted)")
    page.reload()
    expect(page.locator("#images li")).to_have_count(1)


@pytest.mark.parametrize(
    ("sizes", "kept"), [([10, 200, 200, 95], [2, 3, 4]), ([200, 200, 600], [3]), ([100] * 6, [2, 3, 4, 5, 6])]
)
def test_gallery_is_bounded_by_bytes(page: Page, sizes: list[int], kept: list[int]) -> None:
    """Sizes in MB. Uploads count; the newest image stays."""
    script = """async (sizes) => {
        const { openGallery } = await import("/gallery.js");
        const gallery = await openGallery();
        for (const size of sizes) {
            const half = { size: 0.5e6 * size }; // like a file
            await gallery.add({ file: half, uploads: { image: half }, parameters: { prompt: "a" } });
        }
        return (await gallery.list()).map(({ id }) => id).reverse();
    }"""
    found = page.evaluate(script, sizes)
    first = found[-1] - len(sizes)
    assert [each - first for each in found] == kept


def test_page_says_that_bytes_are_the_limit(page: Page) -> None:
    script = """async () => {
        const { openGallery, MAX_BYTES } = await import("/gallery.js");
        const file = new Blob(["a"], { type: "image/png" });
        await (await openGallery()).add({ file, uploads: { image: { size: MAX_BYTES } }, parameters: { prompt: "a" } });
    }"""
    page.evaluate(script)
    page.reload()
    expect(page.locator("#images li")).to_have_count(1)
    draw(page)
    expect(page.locator("#gallery-news")).to_contain_text("The gallery holds 500 MB: the oldest was removed")
    wait_for_image(page)


def test_file_that_vanishes_after_its_choice_is_sent(page: Page, tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    path.write_bytes(make_file())
    page.locator("#start-file").set_input_files(path)
    expect_chosen(page)
    path.unlink()
    draw(page, PROMPT)
    wait_for_image(page)


def test_dark_and_light_have_their_colours(browser: Browser, nginx: LocalProxy) -> None:
    for scheme, ground in (("light", "rgb(247, 247, 245)"), ("dark", "rgb(21, 22, 24)")):
        with open_context(browser, color_scheme=scheme) as context:
            page = open_page(context, nginx, token=nginx.token)
            expect(page.locator("html")).to_have_css("background-color", ground, timeout=PATIENCE)
