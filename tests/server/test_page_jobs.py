"""The web UI in a real browser with jobs: PostgreSQL, their API, a worker and TorchServe, behind nginx."""

import base64
import contextlib
import io
import secrets
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from PIL import Image
from playwright.sync_api import Browser, BrowserContext, Page, Route, expect

from tests.newer_browsers import DELETE_APIS
from tests.server.browser import (
    CHROMIUM,
    PROMPT,
    download,
    draw,
    drop,
    make_file,
    needs_browser,
    open_context,
    open_page,
    wait_for_image,
)
from tests.server.test_jobs import Site, is_up
from tools.postgres import find_postgres
from tools.proxy import LocalProxy
from web.server import PageServer

pytestmark = [needs_browser, pytest.mark.skipif(find_postgres() is None, reason="postgresql is not installed")]
OTHER = secrets.token_hex(32)  # another holder's API key
LONG: dict[str, Any] = {"num_inference_steps": 50, "num_images_per_prompt": 2}  # for some seconds
ENDLESS: dict[str, Any] = {"num_inference_steps": 150, "num_images_per_prompt": 10}  # until it is cancelled


@pytest.fixture(scope="module")
def nginx(site: Site) -> Iterator[LocalProxy]:
    with LocalProxy(site.instances[0].ports["inference_address"], jobs=site.api_port) as running:
        running.write_tokens({running.token: "ann", OTHER: "ben"})
        running.command("-s", "reload")
        site.wait(lambda: is_accepted(running, OTHER))
        yield running


@pytest.fixture(autouse=True)
def _no_job_is_left(site: Site) -> Iterator[None]:
    yield
    site.database.run_sql("DELETE FROM image_jobs")


def is_accepted(nginx: LocalProxy, token: str) -> bool:
    """Say whether nginx takes an API key."""
    headers = {"Authorization": f"Bearer {token}"}
    return requests.get(f"{nginx.url}/1.0/openapi.json", headers=headers, verify=str(nginx.certificate), timeout=30).ok


def list_jobs(site: Site, holder: str = "ann") -> requests.Response:
    return requests.get(f"http://127.0.0.1:{site.api_port}/jobs", headers={"X-Holder": holder}, timeout=30)


def read_states(site: Site, holder: str = "ann") -> list[str]:
    """Return the states of a holder's jobs, the newest first."""
    return [job["state"] for job in list_jobs(site, holder).json()]


def expect_step(page: Page) -> None:
    expect(page.locator("#work .said")).to_contain_text("Step")


def count_orders(page: Page) -> int:
    """Return how many orders the browser remembers."""
    count: int = page.evaluate("Object.keys(localStorage).length")
    return count


@contextlib.contextmanager
def kill_api(site: Site) -> Iterator[None]:
    site.kill("api")
    yield
    site.start("api")
    site.wait(lambda: is_up(site))


def test_order_outlives_a_reload(context: BrowserContext, nginx: LocalProxy, site: Site) -> None:
    """In an older browser. It is drawn once, each image comes once, and previews and steps come on the way."""
    context.add_init_script(DELETE_APIS)
    page = open_page(context, nginx, token=nginx.token)
    draw(page, **LONG)
    expect_step(page)
    page.reload()
    expect_step(page)
    expect(page.get_by_role("img", name=f"In work: {PROMPT}")).to_be_visible()
    wait_for_image(page, 2)
    assert Image.open(io.BytesIO(download(page))).size == (128, 128)
    expect(page.locator("figcaption summary")).to_contain_text("Seed")
    expect(page.locator("figcaption dl")).to_contain_text("UNet calls")
    page.reload()
    wait_for_image(page, 2)
    assert read_states(site) == ["done"]
    assert count_orders(page) == 0


def test_closed_browser_returns_for_its_images(browser: Browser, nginx: LocalProxy, site: Site, tmp_path: Path) -> None:
    """Also without the API key, which the browser forgets, and with the image that it started from."""
    photo = make_file()
    with open_profile(browser, tmp_path) as context:
        page = open_page(context, nginx, token=nginx.token)
        drop(page, "photo.png", photo)
        draw(page, num_inference_steps=3)
        site.wait(lambda: read_states(site))
    site.wait(lambda: read_states(site) == ["done"])
    with open_profile(browser, tmp_path) as context:
        page = open_page(context, nginx, token=None)
        page.get_by_role("textbox", name="API key").fill(nginx.token)
        page.keyboard.press("Enter")
        wait_for_image(page)
        assert count_orders(page) == 0
        requested: list[Any] = []
        page.on("request", lambda each: requested.append(each.post_data_json) if each.method == "PUT" else None)
        page.get_by_role("button", name="New seed").click()
        wait_for_image(page, 2)
        assert base64.b64decode(requested[0]["image"]) == photo


@contextlib.contextmanager
def open_profile(browser: Browser, folder: Path) -> Iterator[BrowserContext]:
    """Open a browser that keeps its data in a folder."""
    context = browser.browser_type.launch_persistent_context(folder, executable_path=CHROMIUM, ignore_https_errors=True)
    yield context
    context.close()


def test_order_that_the_server_has_not_got_is_sent_after_a_return(page: Page, nginx: LocalProxy, site: Site) -> None:
    expect(page.locator("#server")).to_have_text("Ready")
    with kill_api(site):
        draw(page, num_inference_steps=2)
        expect(page.locator("#work .said")).to_contain_text("Asks again")
        page.close()
    page = open_page(page.context, nginx, token=nginx.token)
    wait_for_image(page)
    assert read_states(site) == ["done"]


def test_two_tabs_show_the_same_and_keep_it_once(page: Page, nginx: LocalProxy, site: Site) -> None:
    expect(page.locator("#server")).to_have_text("Ready")
    other = open_page(page.context, nginx, token=nginx.token)
    draw(other, **LONG)
    expect(page.locator("#work .prompt")).to_have_text(PROMPT)
    for tab in (page, other):
        wait_for_image(tab, 2)
        tab.reload()
        wait_for_image(tab, 2)
    draw(other, **ENDLESS)
    expect_step(page)
    page.get_by_role("button", name="Cancel").click()
    for tab in (page, other):
        expect(tab.locator("#work li")).to_have_count(0)
    site.wait(lambda: read_states(site) == ["cancelled", "done"])


def test_cancel_reaches_the_server(page: Page, nginx: LocalProxy, site: Site) -> None:
    """Also a waiting order, and one that is cancelled while the API is away and the page is left."""
    for _ in range(3):
        draw(page, **ENDLESS)
    said = page.locator("#work .said")
    expect(said.nth(0)).to_contain_text("Step")
    expect(said.nth(1)).to_have_text("Is next")
    expect(said.nth(2)).to_have_text("1 request is before this one")
    assert list_jobs(site).headers["Retry-After"] == "1"
    page.get_by_role("button", name="Cancel").nth(1).click()
    expect(said.nth(1)).to_have_text("Is next")
    page.get_by_role("button", name="Cancel").nth(1).click()
    site.wait(lambda: read_states(site) == ["cancelled", "cancelled", "running"])
    with kill_api(site):
        page.get_by_role("button", name="Cancel").click()
        expect(page.locator("#work li")).to_have_count(0)
        page.close()
    page = open_page(page.context, nginx, token=nginx.token)
    site.wait(lambda: set(read_states(site)) == {"cancelled"})
    assert "Retry-After" not in list_jobs(site).headers
    expect(page.locator("#work li")).to_have_count(0)


def test_another_holder_sees_nothing(browser: Browser, page: Page, nginx: LocalProxy, site: Site) -> None:
    """Also in the same browser, where the order stays its holder's."""
    draw(page, **ENDLESS)
    expect_step(page)
    with open_context(browser) as elsewhere:
        for context in (elsewhere, page.context):
            other = open_page(context, nginx, token=OTHER)
            expect(other.locator("#server")).to_have_text("Ready")
            assert other.locator("#work li").count() == 0  # at once
            other.close()
    assert (read_states(site), read_states(site, "ben")) == (["running"], [])
    page.goto(f"{page.url}#token={OTHER}")  # the same tab changes its key, and changes it back
    expect(page.locator("#work li")).to_have_count(0)
    page.goto(f"{page.url}#token={nginx.token}")
    expect_step(page)
    held: list[Route] = []

    def hold(route: Route) -> None:
        is_other = route.request.headers.get("authorization") == f"Bearer {OTHER}"
        held.append(route) if is_other else route.fallback()

    page.route("**/jobs", hold)
    page.goto(f"{page.url}#token={OTHER}")  # changes back before the server has answered
    while not held:
        page.wait_for_timeout(50)
    page.goto(f"{page.url}#token={nginx.token}")
    with page.expect_response("**/jobs"):
        held[0].continue_()
    page.wait_for_timeout(500)  # the page has read it
    expect_step(page)
    page.get_by_role("button", name="Cancel").click()
    site.wait(lambda: read_states(site) == ["cancelled"])


def test_web_ui_of_one_machine_orders(browser: Browser, site: Site) -> None:
    with PageServer(site.instances[0].address, port=0, jobs=f"http://127.0.0.1:{site.api_port}") as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        page = browser.new_page()
        page.goto(server.make_url("key"))
        draw(page, **LONG)
        expect_step(page)
        page.reload()
        wait_for_image(page, 2)
        page.close()
        server.shutdown()
    assert read_states(site, "") == ["done"]


def test_api_that_is_killed_loses_nothing(page: Page, site: Site) -> None:
    draw(page, **LONG)
    expect_step(page)
    with kill_api(site):
        expect(page.locator("#work .said")).to_have_text(
            "The server does not answer. Asks again in 10 s: the order is kept"
        )
    wait_for_image(page, 2)


def test_order_that_the_server_has_forgotten_is_lost(page: Page, site: Site) -> None:
    draw(page, **ENDLESS)
    expect_step(page)
    site.database.run_sql("DELETE FROM image_jobs")
    told = "The server no longer has this order: it removes orders some time after their end. Its images are lost."
    expect(page.locator("#work .lost .said")).to_have_text(told)
    page.reload()
    expect(page.locator("#work .lost .said")).to_have_text(told)
    page.get_by_role("button", name="Dismiss").click()
    assert count_orders(page) == 0


def test_image_that_the_browser_has_no_room_for_comes_back(page: Page) -> None:
    expect(page.locator("#server")).to_have_text("Ready")
    session = page.context.new_cdp_session(page)
    origin = page.evaluate("location.origin")
    session.send("Storage.overrideQuotaForOrigin", {"origin": origin, "quotaSize": 1})
    draw(page, num_inference_steps=2)
    expect(page.locator("#gallery-news")).to_contain_text("This browser has not kept the image")
    wait_for_image(page)
    session.send("Storage.overrideQuotaForOrigin", {"origin": origin})
    for _ in range(2):
        page.reload()
        wait_for_image(page)
    assert count_orders(page) == 0


def test_mistake_stands_at_its_field_and_is_not_kept(page: Page) -> None:
    draw(page, width=100)
    told = "width takes a whole number from 64 to 2048 that is a multiple of 8, not 100"
    expect(page.locator("#field-width-error")).to_have_text(told)
    expect(page.locator("#work .failed .said")).to_have_text(told)
    assert count_orders(page) == 0


def test_browser_that_blocks_storage_orders(context: BrowserContext, nginx: LocalProxy) -> None:
    refuse = 'get() { throw new DOMException("blocked", "SecurityError"); }'
    for name in ("sessionStorage", "localStorage", "indexedDB"):
        context.add_init_script(f"Object.defineProperty(globalThis, '{name}', {{ {refuse} }});")
    page = open_page(context, nginx, token=nginx.token)
    drop(page, "photo.png", make_file())
    draw(page, num_inference_steps=2)
    wait_for_image(page)
    expect(page.locator("#gallery-news")).to_contain_text("download it before you leave the page")
