"""A1111's API of a served model through nginx: the unchanged client webuiapi, and requests of other clients."""

import base64
import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import requests
import webuiapi
from PIL import Image

from tests.a1111_clients import OPEN_WEBUI, OPEN_WEBUI_ASKS, SILLY_TAVERN, SILLY_TAVERN_ASKS
from tests.server.eager import EagerServer, wait_for
from tools.proxy import LocalProxy

HOLDERS = ("local", "other")
LONG = {"prompt": "a red fox", "steps": 150, "sampler_name": "Heun", "width": 128, "height": 128}


class Unlimited(LocalProxy):
    """The proxy for clients that ask for progress more often than any other does."""

    def make_configuration(self) -> str:
        return super().make_configuration().replace("rate=2r/s", "rate=200r/s")


@pytest.fixture(scope="module")
def nginx(server: EagerServer) -> Iterator[LocalProxy]:
    with Unlimited(server.ports["inference_address"], key_file=server.key_file) as running:
        yield running


def trust(session: requests.Session, nginx: LocalProxy) -> None:
    """Trust nginx's certificate, whatever the environment says."""
    session.trust_env, session.verify = False, str(nginx.certificate)


@pytest.fixture(scope="module")
def passwords(nginx: LocalProxy) -> dict[str, str]:
    """The holders, each with a key."""
    keys = {"local": nginx.token, "other": "f" * 64}
    basic = {name: base64.b64encode(f"{name}:{key}".encode()).decode() for name, key in keys.items()}
    nginx.write_tokens({nginx.token: "local", **{f"basic:{basic[name]}": name for name in HOLDERS}})
    nginx.command("-s", "reload")
    url = f"https://localhost:{nginx.port}/sdapi/v1/options"

    def is_known() -> bool:
        answer = requests.get(url, auth=("other", keys["other"]), verify=str(nginx.certificate), timeout=30)
        return answer.status_code == 200

    wait_for(is_known)
    return keys


@pytest.fixture(scope="module")
def clients(nginx: LocalProxy, passwords: dict[str, str]) -> dict[str, Any]:
    """A client of each holder."""
    made = {}
    for name in HOLDERS:
        made[name] = client = webuiapi.WebUIApi(baseurl=f"https://localhost:{nginx.port}/sdapi/v1", steps=3)
        trust(client.session, nginx)
        client.set_auth(name, passwords[name])
    return made


@pytest.fixture(scope="module")
def client(clients: dict[str, Any]) -> Any:
    return clients["local"]


def test_webuiapi_draws(client: Any) -> None:
    result = client.txt2img(prompt="a red fox", negative_prompt="blurry", seed=3, width=64, height=128, batch_size=2)
    assert [image.size for image in result.images] == [(64, 128)] * 2
    assert (result.info["all_seeds"], result.info["sampler_name"]) == ([3, 4], "Euler a")
    assert result.parameters["steps"] == 3
    assert result.info["warnings"] == []
    assert client.png_info(result.image).info == result.info["infotexts"][0]
    again = client.txt2img(prompt="a red fox", negative_prompt="blurry", seed=4, width=64, height=128)
    assert np.array_equal(np.asarray(again.image), np.asarray(result.images[1]))


def test_webuiapi_inpaints(client: Any) -> None:
    photo = Image.effect_noise((120, 96), 90).convert("RGB")
    mask = Image.new("L", photo.size)
    mask.paste(255, (40, 30, 70, 60))
    fields = {"images": [photo], "mask_image": mask, "prompt": "a red fox", "width": 64, "height": 64, "seed": 1}
    result = client.img2img(**fields, inpaint_full_res_padding=8, inpainting_fill=1)
    drawn, is_kept = np.asarray(result.image), np.asarray(mask) == 0
    assert np.array_equal(drawn[is_kept], np.asarray(photo)[is_kept])
    assert not np.array_equal(drawn, np.asarray(photo))
    whole = client.img2img(images=[photo], prompt="a red fox", width=64, height=64)
    assert whole.image.size == (64, 64)


def test_webuiapi_reads_lists(client: Any) -> None:
    assert client.util_get_current_model() == client.util_get_model_names()[0]
    client.util_set_model(client.util_get_current_model())  # the model that is there
    assert "Euler a" in client.util_get_sampler_names()
    assert "karras" in client.util_get_scheduler_names()
    for each in (client.get_loras, client.get_upscalers, client.get_embeddings, client.get_memory, client.get_scripts):
        assert each() is not None
    assert client.refresh_checkpoints() is None
    lists = (client.controlnet_version(), client.controlnet_model_list(), client.controlnet_module_list())
    assert lists == (3, [], ["none"])  # without controls
    with pytest.raises(RuntimeError, match="steps takes a whole number from 1 to 150, not 999"):
        client.txt2img(prompt="a red fox", steps=999, width=64, height=64)


def test_webuiapi_works_without_nginx(server: EagerServer) -> None:
    client = webuiapi.WebUIApi(baseurl=f"{server.url}/1.0/sdapi/v1", steps=2)
    client.session.headers.update(server.get_headers())
    client.check_extensions()
    assert client.txt2img(prompt="a red fox", width=64, height=64).image.size == (64, 64)


def test_progress_and_interrupt_of_ones_own_drawing(server: EagerServer, clients: dict[str, Any]) -> None:
    own, other = clients["local"], clients["other"]
    with ThreadPoolExecutor(1) as pool:
        drawing = pool.submit(own.txt2img, **LONG, n_iter=2)
        wait_for(lambda: own.get_progress()["current_image"])
        told = own.get_progress()
        assert 0 < told["progress"] < 1
        assert told["state"]["job_count"] == 2
        assert Image.open(io.BytesIO(base64.b64decode(told["current_image"]))).size == (128, 128)
        assert other.get_progress()["state"]["job_count"] == 0
        assert other.get_progress()["current_image"] is None
        other.interrupt()
        before = own.get_progress()["progress"]
        wait_for(lambda: own.get_progress()["progress"] > before)  # it goes on
        own.interrupt()
        result = drawing.result(timeout=60)
    assert (result.images, result.info["all_seeds"]) == ([], [])
    own.util_wait_for_ready(check_interval=0.1)
    server.wait_until_idle()


def test_progress_takes_its_query(nginx: LocalProxy, client: Any) -> None:
    with ThreadPoolExecutor(1) as pool:
        drawing = pool.submit(client.txt2img, **LONG)
        wait_for(lambda: client.get_progress()["current_image"])
        told = client.session.get(f"{client.baseurl}/progress", params={"skip_current_image": "true"}).json()
        assert (told["current_image"], told["progress"] > 0) == (None, True)
        client.skip()  # the only image
        assert drawing.result(timeout=60).images == []


@pytest.mark.parametrize(
    ("asked", "body"),
    [(SILLY_TAVERN_ASKS, SILLY_TAVERN), (OPEN_WEBUI_ASKS, OPEN_WEBUI)],
    ids=["SillyTavern", "Open WebUI"],
)
def test_recorded_clients_get_their_images(
    nginx: LocalProxy, passwords: dict[str, str], asked: tuple[str, ...], body: dict[str, Any]
) -> None:
    with requests.Session() as session:
        trust(session, nginx)
        session.auth = ("local", passwords["local"])
        url = f"https://localhost:{nginx.port}/sdapi/v1"
        for path in asked:
            assert session.get(f"{url}/{path}", timeout=30).status_code == 200, path
        options = session.get(f"{url}/options", timeout=30).json()
        assert session.post(f"{url}/options", json=options, timeout=30).json() is None
        answer = session.post(f"{url}/txt2img", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    assert len(answer.json()["images"]) == body.get("batch_size", 1)
    assert json.loads(answer.json()["info"])["infotexts"][0].startswith("a red fox\nNegative prompt: blurry\nSteps: 3")
