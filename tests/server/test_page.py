"""The web UI in a real browser, behind the nginx of deploy/, with the demonstration model."""

import io
import re
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
import requests
from axe_playwright_python.sync_playwright import Axe
from PIL import Image, PngImagePlugin
from playwright.sync_api import Browser, BrowserContext, Page, Route, expect

from demo.measure import GUIDANCE
from demo.oracle import judge_picture
from demo.shapes import Scene, Thing
from tests.server.browser import (
    PROMPT,
    SIDE,
    download,
    draw,
    drop,
    make_file,
    needs_browser,
    open_context,
    open_page,
    paint_mask,
    read_form,
    wait_for_image,
)
from tests.server.eager import wait_for
from tests.server.test_backends import make_settings
from tools.proxy import LocalProxy
from tools.server import ROOT, LocalServer, make_archive

pytestmark = needs_browser
SCENE = Scene("blue", (Thing("yellow", "star", "large", "left"),))
LONG = 149  # steps: some seconds, in which a test does something else


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    folder = tmp_path_factory.mktemp("server")
    make_archive(folder, ROOT / "demo/model", make_settings(None, guidance_scale=GUIDANCE, num_inference_steps=30))
    with LocalServer(folder) as running:
        yield running


def test_new_user_draws_in_two_actions(context: BrowserContext, nginx: LocalProxy) -> None:
    """After the token: words, and the key. Previews come on the way."""
    page = open_page(context, nginx, token=None)
    page.get_by_role("textbox", name="API key").fill(nginx.token)
    page.keyboard.press("Enter")
    expect(page.get_by_label("Prompt", exact=True)).to_be_focused()
    page.keyboard.type(PROMPT)
    page.keyboard.press("Control+Enter")
    expect(page.get_by_role("img", name=f"In work: {PROMPT}")).to_be_visible()
    expect(page.locator("#work .said")).to_have_text(re.compile(r"Step \d+ of 30, \d+ s left"))
    wait_for_image(page)
    expect(page.locator("#shown > img")).to_have_attribute("alt", PROMPT)
    image = Image.open(io.BytesIO(download(page)))
    verdict = judge_picture(image, SCENE)
    assert verdict.background
    assert verdict.colour


def test_form_is_the_servers(page: Page, server: LocalServer) -> None:
    """A field that the server gains appears, and what it says to a value stands at the field."""
    schema = server.read_document("openapi.json")["components"]["schemas"]["GenerationRequest"]["properties"]
    page.locator("summary", has_text="More settings").click()
    others = {"image", "mask_image", "strength", "invert_mask", "resize_mode", "stream", "response_format"}
    others |= {"adapters", "control", "upscale"}
    assert schema["adapters"]["maxItems"] == schema["control"]["maxItems"] == 0
    assert schema["upscale"]["enum"] == [None]
    expect(page.locator(".field.upscale")).to_have_count(0)
    for name, each in schema.items():
        if name not in others:
            field = page.locator(f".field.{name}")
            expect(field).to_be_visible()
            assert each["description"].replace("`", "") in (field.text_content() or "")
    limits = page.locator("#field-num_inference_steps")
    assert (limits.get_attribute("min"), limits.get_attribute("max"), limits.input_value()) == ("1", "150", "30")
    draw(page, width=100)
    width = page.locator("#field-width")
    expect(width).to_be_focused()
    expect(width).to_have_attribute("aria-invalid", "true")
    told = "width takes a whole number from 64 to 2048 that is a multiple of 8, not 100"
    expect(page.locator("#field-width-error")).to_have_text(told)
    expect(page.locator("#work .failed .said")).to_have_text(told)


def test_field_of_tomorrow_appears_by_itself(page: Page) -> None:
    """The kind that adapters are: a list of objects, left out where there is nothing to choose."""
    expect(page.locator("#field-width")).to_be_visible()
    expect(page.locator(".field.adapters")).to_have_count(0)
    items = {
        "type": "object",
        "required": ["name"],
        "properties": {"name": {"type": "string", "enum": ["ink"]}, "scale": {"type": "number", "default": 1}},
    }
    added = {"adapters": {"type": ["array", "null"], "items": items, "maxItems": 2, "description": "styles"}}
    sent: list[Any] = []

    def add_field(route: Route) -> None:
        document = route.fetch().json()
        document["components"]["schemas"]["GenerationRequest"]["properties"] |= added
        route.fulfill(json=document)

    page.route("**/openapi.json", add_field)
    page.on("request", lambda each: sent.append(each.post_data_json) if each.method == "POST" else None)
    page.reload()
    group = page.get_by_role("group", name="Adapters")
    group.get_by_role("button", name="Add").click()
    group.get_by_role("button", name="Add").click()
    group.get_by_label("Name").nth(0).select_option("ink")
    group.get_by_role("button", name="Remove").nth(1).click()
    draw(page)
    expect(page.locator("#field-adapters-error")).to_contain_text("adapters")  # this server's own words
    assert sent == [{"prompt": PROMPT, "adapters": [{"name": "ink", "scale": 1}], "partial_images": 3, "stream": True}]


def test_cancel_ends_the_work_on_the_server(page: Page, server: LocalServer) -> None:
    draw(page, num_inference_steps=LONG)
    expect(page.locator("#work .said")).to_contain_text("Step")
    ended = server.log.count("The client has left; its work has ended")
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator("#work li")).to_have_count(0)
    draw(page, num_inference_steps=2)
    wait_for_image(page)
    # the handler learns of it with the next request
    wait_for(lambda: server.log.count("The client has left; its work has ended") > ended)


def test_several_wait_in_a_queue_with_their_place(page: Page) -> None:
    for steps in (LONG, 3, 3, 3, 3, 3):
        draw(page, num_inference_steps=steps)
    said = page.locator("#work .said")
    expect(said).to_have_count(6)
    expect(said.nth(0)).to_contain_text("Step")
    expect(said.nth(1)).to_have_text("1 request is before this one")
    expect(said.nth(2)).to_have_text("2 requests are before this one")
    expect(said.nth(5)).to_have_text("Waits in this page")
    page.locator("#work li").nth(5).get_by_role("button", name="Cancel").click()
    page.locator("#work li").nth(0).get_by_role("button", name="Cancel").click()
    wait_for_image(page, 4)


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_dropped_image_brings_its_settings_back(page: Page, server: LocalServer, kind: str) -> None:
    fields = {"prompt": 'a ring "ä" 🦊', "seed": 7, "num_inference_steps": 2, "negative_prompt": "snow", "width": 64}
    body = {**fields, "output_format": kind, "scheduler": {"name": "DPM++ 2M", "use_karras_sigmas": True}}
    made = requests.post(server.url, json=body, headers=server.get_headers(), timeout=60).content
    drop(page, f"made.{kind}", made)
    expect(page.get_by_label("Prompt", exact=True)).to_have_value(str(fields["prompt"]))
    assert read_form(page) == {name: str(value) for name, value in {**fields, "guidance_scale": GUIDANCE}.items()}
    page.get_by_role("button", name="Draw", exact=True).click()
    wait_for_image(page)
    assert Image.open(io.BytesIO(download(page))).tobytes() == Image.open(io.BytesIO(made)).tobytes()


def test_dropped_image_of_a1111_brings_its_settings(page: Page) -> None:
    texts = PngImagePlugin.PngInfo()
    sampling = "Steps: 4, Sampler: Euler a, Schedule type: Karras, CFG scale: 6.5, Seed: 7, Size: 64x64"
    texts.add_text("parameters", f"a fox\nNegative prompt: snow\n{sampling}, RNG: CPU")
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "png", pnginfo=texts)
    drop(page, "other.png", file.getvalue())
    expect(page.locator("#start-error")).to_have_text("Without an equivalent here, left out: 'RNG: CPU'.")
    form = read_form(page)
    assert {"prompt": "a fox", "negative_prompt": "snow", "seed": "7", "guidance_scale": "6.5"}.items() <= form.items()


def test_photo_with_a_comment_is_where_to_start_from(page: Page) -> None:
    """The server finds no metadata of a request in it."""
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"ASCII\0\0\0holiday"
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "jpeg", exif=exif)
    drop(page, "photo.jpg", file.getvalue())
    expect(page.get_by_alt_text("The image to start from")).to_be_visible()


def test_gallery_survives_a_reload_and_gives_all_back(page: Page) -> None:
    draw(page, num_inference_steps=3, seed=5, negative_prompt="snow")
    wait_for_image(page)
    first = download(page)
    made = page.locator("figcaption summary")
    expect(made).to_contain_text("Seed 5,")
    page.get_by_role("button", name="New seed").click()
    wait_for_image(page, 2)
    expect(made).not_to_contain_text("Seed 5,")
    page.reload()
    expect(page.locator("#images li")).to_have_count(2)
    page.locator("#images button").nth(1).click()
    page.get_by_role("button", name="Use settings").click()
    assert read_form(page)["seed"] == "5"
    page.get_by_role("button", name="Draw", exact=True).click()
    wait_for_image(page, 3)
    assert Image.open(io.BytesIO(download(page))).tobytes() == Image.open(io.BytesIO(first)).tobytes()
    assert count_action_rows(page, 375, 812) == 2
    assert count_action_rows(page, 1280, 600) == 1
    page.get_by_role("button", name="Delete").click()
    expect(page.locator("#images li")).to_have_count(2)


def count_action_rows(page: Page, width: int, height: int) -> int:
    page.set_viewport_size({"width": width, "height": height})
    tops = page.locator("figcaption .wrap > *").evaluate_all("nodes => nodes.map((node) => node.offsetTop)")
    return len(set(tops))


def test_full_gallery_says_so(page: Page) -> None:
    script = """async () => {
        const { openGallery, MAX_IMAGES } = await import("/gallery.js");
        const gallery = await openGallery();
        for (let seed = 0; seed < MAX_IMAGES; seed += 1) {
            await gallery.add({ file: new Blob(["a"], { type: "image/png" }), parameters: { prompt: "a", seed } });
        }
    }"""
    page.evaluate(script)
    page.reload()
    expect(page.locator("#images li")).to_have_count(200)
    draw(page, num_inference_steps=2)
    expect(page.locator("#gallery-news")).to_contain_text("The gallery holds 200 images: the oldest was removed")
    page.reload()
    expect(page.locator("#images li")).to_have_count(200)


def test_any_other_image_is_where_to_start_from_and_a_mask_is_painted(page: Page) -> None:
    """What the mask protects comes back bit by bit."""
    photo = make_file()
    drop(page, "photo.png", photo)
    expect(page.get_by_alt_text("The image to start from")).to_be_visible()
    paint_mask(page)
    page.get_by_role("button", name="Clear").click()
    page.get_by_role("button", name="Undo").click()
    page.get_by_role("button", name="Use the mask").click()
    expect(page.get_by_alt_text("The mask: white is painted anew")).to_be_visible()
    page.locator("summary", has_text="More settings").click()
    page.locator("#field-output_format").select_option("png")
    draw(page, num_inference_steps=6)
    wait_for_image(page)
    before, after = (Image.open(io.BytesIO(file)).convert("RGB") for file in (photo, download(page)))
    right, middle = (SIDE // 2, 0, SIDE, SIDE), (28, 20, 36, 108)
    assert after.crop(right).tobytes() == before.crop(right).tobytes()
    assert after.crop(middle).tobytes() != before.crop(middle).tobytes()
    page.get_by_role("button", name="Start from it").click()
    expect(page.locator("#start-mask")).to_be_hidden()


def test_mask_is_painted_by_keyboard_and_by_touch(page: Page) -> None:
    drop(page, "photo.png", make_file())
    page.get_by_role("button", name="Paint a mask").press("Enter")
    canvas = page.locator("#mask-canvas")
    canvas.focus()
    for key in ("ArrowLeft", "Space", "ArrowRight", "Space"):
        canvas.press(key)
    touch = {"pointerType": "touch", "pointerId": 9, "button": 0, "isPrimary": True, "bubbles": True}
    box = canvas.bounding_box()
    assert box is not None
    canvas.evaluate("(node) => { node.setPointerCapture = () => {}; }")  # a made event has no pointer to capture
    for kind, y in (("pointerdown", 10), ("pointermove", 60), ("pointerup", 60)):
        canvas.dispatch_event(kind, {**touch, "clientX": box["x"] + 10, "clientY": box["y"] + y})
    page.get_by_label("Erase").check()
    canvas.press("Space")
    page.get_by_role("button", name="Invert").click()
    page.get_by_role("button", name="Use the mask").press("Enter")
    mask = page.get_by_alt_text("The mask: white is painted anew")
    expect(mask).to_be_visible()
    script = """async (node) => {
        const canvas = new OffscreenCanvas(node.naturalWidth, node.naturalHeight);
        const context = canvas.getContext("2d");
        context.drawImage(await createImageBitmap(node), 0, 0);
        return [[3, 22], [64, 64], [47, 64], [120, 120]].map(([x, y]) => context.getImageData(x, y, 1, 1).data[0]);
    }"""
    touched, erased, painted, bare = mask.evaluate(script)
    assert (touched, erased, painted, bare) == (0, 255, 0, 255)  # inverted at the end


def test_wrong_and_missing_tokens_are_told_plainly(context: BrowserContext, nginx: LocalProxy) -> None:
    page = open_page(context, nginx, token="wrong")
    dialog = page.get_by_role("dialog", name="API key")
    expect(dialog).to_contain_text("its API key is unknown or revoked")
    assert "token" not in page.url
    dialog.get_by_role("textbox").fill(nginx.token)
    dialog.get_by_role("button", name="Use it").click()
    draw(page, num_inference_steps=2)
    wait_for_image(page)
    assert page.evaluate("JSON.stringify(localStorage)") == "{}"  # for this tab only
    assert not any(nginx.token in line for line in nginx.log)


def test_hostile_texts_stay_texts(page: Page) -> None:
    hostile = "<img src=x onerror=alert(1)><script>alert(2)</script>\"'><b>a ring</b>"
    draw(page, hostile, num_inference_steps=3)
    wait_for_image(page)
    page.get_by_role("button", name="Use settings").click()
    assert read_form(page)["prompt"] == hostile
    draw(page, hostile, width=100)
    expect(page.locator("#work .failed .prompt")).to_have_text(hostile)
    expect(page.locator("figcaption .prompt")).to_have_text(hostile)
    assert page.locator("b, main script").count() == 0


def test_reload_says_what_became_of_the_work(page: Page) -> None:
    draw(page, num_inference_steps=LONG)
    expect(page.locator("#work .said")).to_contain_text("Step")
    page.reload()
    told = re.compile(r"The page was left during this request \(Step \d+ of 149, .+ left\)\. .* there is no image")
    expect(page.locator("#work .lost .said")).to_have_text(told)
    page.get_by_role("button", name="Dismiss").click()
    page.reload()
    expect(page.get_by_label("Prompt", exact=True)).to_be_visible()
    expect(page.locator("#work li")).to_have_count(0)


def test_axe_finds_nothing(browser: Browser, nginx: LocalProxy) -> None:
    """On a telephone and on a desk, in both colours, in each state, with everything open."""
    # axe is a script of the test's, which the page's policy would refuse
    with open_context(browser, bypass_csp=True) as context:
        page = open_page(context, nginx, token=None)
        expect(page.get_by_role("dialog", name="API key")).to_be_visible()
        check_with_axe(page)
        page.get_by_role("textbox", name="API key").fill(nginx.token)
        page.keyboard.press("Enter")
        draw(page, num_inference_steps=3)
        wait_for_image(page)
        for summary in page.locator("summary").all():
            summary.click()
        drop(page, "photo.png", make_file())
        draw(page, width=100)
        expect(page.locator("#work .failed")).to_be_visible()
        check_with_axe(page)
        page.get_by_role("button", name="Paint a mask").click()
        check_with_axe(page)


def check_with_axe(page: Page) -> None:
    for width, scheme in ((375, "light"), (1280, "dark")):
        page.set_viewport_size({"width": width, "height": 800})
        page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
        results = Axe().run(page)
        assert results.violations_count == 0, results.generate_report()
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_keyboard_reaches_everything(page: Page) -> None:
    """Tab walks through what can be used, each in sight with its name."""
    expect(page.get_by_label("Prompt", exact=True)).to_be_focused()
    script = """() => {
        const node = document.activeElement;
        return (node.labels?.[0] ?? node).textContent || node.getAttribute("aria-label");
    }"""
    names = []
    for _ in range(40):
        page.keyboard.press("Tab")
        names.append(page.evaluate(script))
        if names[-1] == "Draw":
            break
    assert [name for name in names if name is None] == []
    assert {"Negative prompt", "Width", "Steps", "Scheduler", "Seed", "Choose an image", "More settings"} <= set(names)
    assert names[-1] == "Draw"
    page.keyboard.press("Enter")
    expect(page.locator("#field-prompt-error")).to_contain_text("prompt")
    expect(page.get_by_label("Prompt", exact=True)).to_be_focused()


def test_addresses_of_the_page_are_open_without_a_token(nginx: LocalProxy) -> None:
    origin = nginx.url.removesuffix("/predictions/diffusion_fast")
    for path in ("", "main.js", "style.css", "icon.svg"):
        answer = requests.get(f"{origin}/{path}", verify=str(nginx.certificate), timeout=10)
        assert answer.status_code == 200, path
        assert "script-src 'self'" in answer.headers["Content-Security-Policy"]
        assert "unsafe" not in answer.headers["Content-Security-Policy"]
    contract = f"{nginx.url}/1.0/openapi.json"
    assert requests.get(contract, verify=str(nginx.certificate), timeout=10).status_code == 401


def test_worker_that_dies_in_mid_image_is_told_and_asked_again(page: Page, server: LocalServer) -> None:
    """It ends when another worker is ready."""
    draw(page, num_inference_steps=LONG)
    expect(page.locator("#work .said")).to_contain_text("Step")
    psutil.Process(server.find_worker()).kill()
    lost = page.locator("#work .lost, #work .failed")
    expect(lost).to_be_visible()
    page.locator("#field-num_inference_steps").fill("2")
    page.get_by_role("button", name="Draw", exact=True).click()  # it waits for the next worker by itself
    expect(page.locator("#images li")).to_have_count(1, timeout=60_000)
    expect(lost.locator(".said")).to_contain_text(re.compile("The connection to the server broke|worker"))
    expect(page.locator("#server")).to_have_text("Ready")
    page.get_by_role("button", name="Draw again").click()
    expect(page.locator("#work .said")).to_contain_text("Step")
    page.get_by_role("button", name="Cancel").click()
