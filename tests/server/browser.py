"""The web UI in a real browser: how the tests open it and what they do there."""

import base64
import contextlib
import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import Browser, BrowserContext, Page, expect

from tools.proxy import LocalProxy, find_nginx

CHROMIUM = shutil.which("chromium")
needs_browser = pytest.mark.skipif(
    None in (CHROMIUM, find_nginx()), reason="chromium, nginx and openssl are not all installed"
)
PROMPT = "a large yellow star on a blue background, left"
PATIENCE = 20_000  # ms
SIDE = 128  # pixels of the models' own images
expect.set_options(timeout=PATIENCE)


@contextlib.contextmanager
def open_context(browser: Browser, **options: Any) -> Iterator[BrowserContext]:
    """Open a browser without a history. A request to another host or an error in a page fails the test."""
    chosen: dict[str, Any] = {"viewport": {"width": 1280, "height": 860}, **options}
    context = browser.new_context(ignore_https_errors=True, reduced_motion="reduce", **chosen)
    context.set_default_timeout(PATIENCE)
    problems: list[str] = []
    context.on("weberror", lambda error: problems.append(str(error.error)))
    context.on("dialog", lambda dialog: problems.append(f"somebody's script ran: {dialog.message}"))
    context.on("request", lambda request: problems.extend(find_foreign(request.url)))
    yield context
    context.close()
    assert problems == []


def find_foreign(url: str) -> list[str]:
    return [] if url.startswith(("https://localhost:", "blob:https://localhost:", "data:,")) else [url]


def open_page(context: BrowserContext, nginx: LocalProxy, *, token: str | None) -> Page:
    page = context.new_page()
    page.goto(f"https://localhost:{nginx.port}/" + (f"#token={token}" if token else ""))
    return page


def draw(page: Page, prompt: str = PROMPT, **fields: Any) -> None:
    page.get_by_label("Prompt", exact=True).fill(prompt)
    for name, value in fields.items():
        page.locator(f"#field-{name}").fill(str(value))
    page.get_by_role("button", name="Draw", exact=True).click()


def wait_for_image(page: Page, count: int = 1) -> None:
    """Wait until the gallery holds so many images and nothing is in work."""
    expect(page.locator("#images li")).to_have_count(count, timeout=30_000)
    expect(page.locator("#work li")).to_have_count(0)


def download(page: Page) -> bytes:
    """Return the file of the shown image."""
    with page.expect_download() as coming:
        page.get_by_role("link", name="Download").click()
    return Path(coming.value.path()).read_bytes()


def read_form(page: Page) -> dict[str, str]:
    names = ("prompt", "negative_prompt", "width", "num_inference_steps", "guidance_scale", "seed")
    return {name: page.locator(f"#field-{name}").input_value() for name in names}


def make_file(kind: str = "PNG", *, side: int = SIDE) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((side, side), 60).convert("RGB").save(buffer, kind)
    return buffer.getvalue()


def drop(page: Page, name: str, content: bytes, kind: str = "") -> None:
    """Drop a file onto the page, as from a folder."""
    script = """([name, text, type]) => {
        const files = new DataTransfer();
        files.items.add(new File([Uint8Array.from(atob(text), (each) => each.charCodeAt(0))], name, { type }));
        document.body.dispatchEvent(new DragEvent("drop", { dataTransfer: files, bubbles: true, cancelable: true }));
    }"""
    page.evaluate(script, [name, base64.b64encode(content).decode(), kind])


def paint_mask(page: Page) -> None:
    """Paint a line from top to bottom, a quarter from the left."""
    page.get_by_role("button", name="Paint a mask").click()
    box = page.locator("#mask-canvas").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 0.25 * box["width"], box["y"] + 5)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.25 * box["width"], box["y"] + box["height"] - 5, steps=5)
    page.mouse.up()
