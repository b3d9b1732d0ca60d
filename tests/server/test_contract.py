"""The request contract on a live server: the document, several requests in flight, work that stops."""

import base64
import http.client
import io
import json
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import requests
import yaml
from PIL import Image

from scorecard.generated import run_schemathesis
from tests.server.eager import LIMITS, LONG, EagerServer, wait_for
from tests.server.test_backends import ask_for_picture, make_settings
from tools.server import ROOT, LocalServer, make_archive, make_environment


def ask(server: LocalServer, *, accept: str = "*/*", **fields: Any) -> requests.Response:
    headers = {**server.get_headers(), "Accept": accept}
    return requests.post(server.url, json={"prompt": "a red fox", **fields}, headers=headers, timeout=120)


def test_document_holds_for_generated_requests(server: LocalServer) -> None:
    """Schemathesis makes requests that follow the document and requests that break it."""
    document = server.read_document("openapi.json")
    committed = json.loads((ROOT / "docs/openapi.json").read_text())
    assert list(document["components"]["schemas"]["GenerationRequest"]["properties"]) == list(
        committed["components"]["schemas"]["GenerationRequest"]["properties"]
    )
    assert document["components"]["schemas"]["GenerationRequest"]["properties"]["num_inference_steps"]["maximum"] == 150
    run = run_schemathesis(server, examples=40, most_steps=4)
    assert run.passed, run.output
    assert run.count >= 500


def test_pictures_as_json(server: LocalServer) -> None:
    answer = ask(server, num_images_per_prompt=2, seed=7, output_format="png")
    assert (answer.status_code, answer.headers["Content-Type"]) == (200, "application/json")
    assert answer.headers["X-Seed"] == "7"
    images = answer.json()["data"]
    assert [each["seed"] for each in images] == [7, 8]
    for each in images:
        alone = ask(server, **each["parameters"])
        assert alone.headers["Content-Type"] == "image/png"
        assert alone.content == base64.b64decode(each["b64_json"])
    (one,) = ask(server, accept="application/json").json()["data"]
    assert Image.open(io.BytesIO(base64.b64decode(one["b64_json"]))).size == (128, 128)


def test_official_openai_client(server: LocalServer) -> None:
    token = server.get_headers()["Authorization"].removeprefix("Bearer ")
    with openai.OpenAI(base_url=f"{server.url}/1.0/v1", api_key=token, max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["diffusion_fast"]
        extra: dict[str, Any] = {"seed": 7, "negative_prompt": "blue", "guidance_scale": 4, "num_inference_steps": 4}
        made = client.images.generate(model="x", prompt="a red fox", n=2, size="128x64", extra_body=extra)
        pictures = [base64.b64decode(each.b64_json or "") for each in made.data or []]
        assert [each.seed for each in made.data or []] == [7, 8]  # type: ignore[attr-defined]
        assert abs(made.created - time.time()) < 60
        native = ask(server, width=128, height=64, output_format="png", **extra)
        assert native.content == pictures[0]
        mask = io.BytesIO()
        Image.new("RGBA", (128, 64)).save(mask, "PNG")
        edited = client.images.edit(prompt="a blue fox", image=pictures[0], mask=mask.getvalue())
        (only,) = edited.data or []
        assert Image.open(io.BytesIO(base64.b64decode(only.b64_json or ""))).size == (128, 64)
        events = list(client.images.generate(prompt="x", stream=True, partial_images=2, extra_body=extra))
        kinds = ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
        assert [event.type for event in events] == kinds
        sizes = [Image.open(io.BytesIO(base64.b64decode(event.b64_json))).size for event in events]
        assert sizes == [(128, 128)] * 3
        assert events[2].model_extra["parameters"]["seed"] == 7  # type: ignore[index]
        with pytest.raises(openai.BadRequestError) as caught:
            client.images.generate(prompt="a red fox", size="3x4")
        assert caught.value.param == "size"
        assert "a multiple of 8, not 3" in caught.value.message


def read_events(answer: requests.Response) -> list[tuple[str, dict[str, Any]]]:
    """Return the server-sent events of an answer by their names, with the JSON in them."""
    assert answer.headers["Content-Type"] == "text/event-stream"
    return [
        (name, json.loads(data)) for name, data in re.findall(r"event: (\S+)\ndata: (.+)\n\n", answer.content.decode())
    ]


def test_stream_tells_every_step(server: LocalServer) -> None:
    fields: dict[str, Any] = {"num_inference_steps": 4, "num_images_per_prompt": 2, "seed": 5, "output_format": "png"}
    events = read_events(ask(server, stream=True, partial_images=1, **fields))
    steps = [data for name, data in events if name == "progress"]
    assert [(each["step"], each["total"]) for each in steps] == [(i, 8) for i in range(1, 8)]
    assert steps[0]["seconds_left"] > steps[-1]["seconds_left"] > 0
    partial = [data["seed"] for name, data in events if name == "image_generation.partial_image"]
    assert partial == [5, 6]
    completed = [data for name, data in events if name == "image_generation.completed"]
    plain = ask(server, **fields).json()["data"]
    assert [each["b64_json"] for each in completed] == [each["b64_json"] for each in plain]


def test_stream_ends_with_an_error(server: LocalServer) -> None:
    answer = ask(server, stream=True, num_inference_steps=150, timeout=1, scheduler="HeunDiscreteScheduler")
    assert read_events(answer)[-1][0] == "error"
    assert read_events(answer)[-1][1]["error"]["code"] == 504
    refused = ask(server, stream=True, width=3)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "width")


def test_seed_that_was_chosen_is_told(server: LocalServer) -> None:
    answer = ask(server, output_format="png")
    assert ask(server, output_format="png", seed=int(answer.headers["X-Seed"])).content == answer.content


def test_long_prompt_is_told(server: LocalServer) -> None:
    assert "X-Warning" not in ask(server).headers
    assert "the text encoder reads the first 77" in ask(server, prompt="fox " * 50).headers["X-Warning"]


def test_prompts_in_other_programs_words_are_told_everywhere(server: LocalServer) -> None:
    fields: dict[str, Any] = {"prompt": "a (red:1.3) fox BREAK <lora:x:1>", "output_format": "png", "seed": 1}
    warnings = [
        "prompt: '<lora:x:1>' left out; this server has no adapters",
        "prompt: '(red:1.3)', 'BREAK' have no special meaning here and are read as plain words",
    ]
    told = "; ".join(warnings)
    plain = ask(server, **fields)
    assert plain.headers["X-Warning"] == told
    address, headers = f"{server.url}/1.0/metadata", server.get_headers()
    kind = {"Content-Type": plain.headers["Content-Type"]}
    for described in (
        requests.post(address, plain.content, headers={**headers, **kind}, timeout=60),
        requests.post(address, files={"image": plain.content}, headers=headers, timeout=60),
    ):
        assert described.json()["warnings"] == warnings
    whole = ask(server, accept="application/json", **fields)
    assert (whole.headers["X-Warning"], whole.json()["warnings"]) == (told, warnings)
    assert base64.b64decode(whole.json()["data"][0]["b64_json"]) == plain.content
    stream = ask(server, stream=True, **fields)
    assert (stream.headers["X-Warning"], read_events(stream)[-1][1]["warnings"]) == (told, warnings)
    for more in ({}, {"stream": True}):
        url = f"{server.url}/1.0/v1/images/generations"
        answer = requests.post(url, json={**fields, **more}, headers=server.get_headers(), timeout=60)
        assert (answer.headers["X-Warning"], warnings[1] in answer.text) == (told, True)


def test_form_with_an_image(server: LocalServer) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (72, 64), "red").save(buffer, "PNG")
    answer = requests.post(
        server.url,
        data={"prompt": "a red fox", "strength": "0.7"},
        files={"image": ("red.png", buffer.getvalue(), "image/png")},
        headers=server.get_headers(),
        timeout=60,
    )
    assert answer.status_code == 200, answer.text
    assert Image.open(io.BytesIO(answer.content)).size == (128, 112)


def test_bad_requests_leave_their_neighbours_alone(server: LocalServer) -> None:
    good: list[dict[str, Any]] = [{"seed": seed, "num_inference_steps": 10 + seed} for seed in range(5)]
    bad: list[dict[str, Any]] = [{"width": 3}, {"promt": "x"}, {"scheduler": "PNDMScheduler", "num_inference_steps": 1}]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda fields: ask(server, output_format="png", **fields), [*good, *bad]))
    assert [answer.status_code for answer in answers] == [200] * 5 + [400] * 3
    assert [answer.json()["error"]["param"] for answer in answers[5:]] == ["width", "promt", "num_inference_steps"]
    for fields, answer in zip(good, answers, strict=False):
        assert answer.content == ask(server, output_format="png", **fields).content


def test_work_ends_when_the_client_leaves(server: LocalServer) -> None:
    fields = {"prompt": "a red fox", "num_inference_steps": 150}
    with requests.post(server.url, json=fields, headers=server.get_headers(), stream=True, timeout=60) as answer:
        assert answer.status_code == 200  # sent after the first step
    ask_for_picture(server)
    (done,) = re.findall(r"has ended after step (\d+) of 150", server.log)
    assert int(done) <= 3


def test_who_has_left_leaves_the_queue(server: EagerServer) -> None:
    """Nine requests of one address are given up while a picture is under way; another address gets its own before."""
    place = ("127.0.0.1", server.ports["inference_address"])
    headers = {**server.get_headers(), "Content-Type": "application/json"}

    def send(address: str, **fields: Any) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection(*place, timeout=60, source_address=(address, 0))
        connection.request(
            "POST", f"/predictions/{server.model}", json.dumps({"prompt": "a red fox", **fields}), headers
        )
        return connection

    server.wait_until_idle()
    under_way = send("127.0.0.1", **LONG, stream=True).getresponse()
    for _ in range(9):
        connection = send("127.0.0.2", **LONG)
        wait_for(lambda: server.read_metrics()["sdxl_requests_in_flight"] > 1)
        connection.close()
        wait_for(lambda: server.read_metrics()["sdxl_requests_in_flight"] == 1)
    answer = send("127.0.0.3", num_inference_steps=1).getresponse()
    assert (answer.status, len(answer.read()) > 100) == (200, True)
    told = under_way.read1()
    assert b"completed" not in told
    assert b"image_generation.completed" in under_way.read()


def test_a_wait_is_told(server: LocalServer) -> None:
    """In JSON by white space, in streams by the place, by comments on OpenAI's path; a mistake does not wait."""
    headers, fields = server.get_headers(), {"prompt": "a red fox", "num_inference_steps": 2}
    left = server.log.count("The client has left the queue")

    def send(path: str = "", **more: Any) -> requests.Response:
        accept = {**headers, "Accept": "application/json"}
        return requests.post(server.url + path, json={**fields, **more}, headers=accept, timeout=60, stream=True)

    long = [send(stream=True, num_inference_steps=150, num_images_per_prompt=2) for _ in range(3)]
    waiting = [send(), send(stream=True), send("/1.0/v1/images/generations", stream=True)]
    assert [answer.status_code for answer in waiting] == [200] * 3
    assert send(width=3).status_code == 400
    assert waiting[0].raw.read1(1) == b" "
    last = send("/1.0/v1/images/generations", num_inference_steps=150, timeout=1, scheduler="HeunDiscreteScheduler")
    assert b"completed" not in long[0].raw.read1()
    for each in long:
        each.close()
    assert len(json.loads(waiting[0].raw.read())["data"]) == 1
    places = [data["place"] for name, data in read_events(waiting[1]) if name == "queue"]
    assert (places[0], places[-1], places) == (4, 1, sorted(set(places), reverse=True))
    assert b": 5 requests are before this one\n\n" in waiting[2].content
    error = last.json()["error"]
    assert (last.content[:1], error["code"], error["type"]) == (b" ", None, "timeout_error")
    assert server.log.count("The client has left the queue") == left


def test_work_ends_when_its_time_is_up(server: LocalServer) -> None:
    start = time.monotonic()
    answer = ask(server, num_inference_steps=150, timeout=1, scheduler="HeunDiscreteScheduler")
    assert time.monotonic() - start < 3
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["type"]) == (200, 504, "timeout_error")
    assert "the timeout of 1 s has passed" in error["message"]


def start_query(server: LocalServer, folder: Path, *options: str | Path) -> subprocess.Popen[str]:
    key_file = server.folder / "key_file.json"
    return subprocess.Popen(
        [sys.executable, ROOT / "query.py", "--url", server.url, "--key-file", key_file, *options],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job ignores the signal, and so would its children
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def test_program_repeats_a_picture(server: LocalServer, tmp_path: Path) -> None:
    for options in (("--prompt", "a red fox", "--seed", "7", "--preview", "2"), ("--like", "a.png")):
        name = "b.png" if "--like" in options else "a.png"
        out, err = start_query(server, tmp_path, *options, "--filename", name).communicate(timeout=60)
        assert (out, err.splitlines()[-1:]) == (f"{name}\n", [f"{name}: seed 7"])
    names = {"a.png", "a-preview-1.png", "a-preview-2.png", "b.png"}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_program_makes_a_file_of_prompts(server: LocalServer, tmp_path: Path) -> None:
    """Twenty, of which one is wrong."""
    lines = [json.dumps({"prompt": "a fox", "seed": seed, "width": 3 if seed == 9 else 64}) for seed in range(1, 21)]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    program = start_query(server, tmp_path, "--prompts", "list.txt", "--filename", "fox.jpg")
    out, err = program.communicate(timeout=60)
    assert program.returncode == 2
    assert "query.py: line 9: the server answered 400: width takes a whole number" in err
    assert sorted(out.split()) == [f"fox-{seed:02}.jpg" for seed in range(1, 21) if seed != 9]
    assert ask(server, seed=20, width=64, prompt="a fox").content == (tmp_path / "fox-20.jpg").read_bytes()


def test_interrupted_program_stops_the_work(server: LocalServer, tmp_path: Path) -> None:
    scheduler = "HeunDiscreteScheduler"  # two calls of the UNet a step
    options = ("--prompt", "to be interrupted", "--steps", "149", "-n", "2", "--scheduler", scheduler)
    with start_query(server, tmp_path, *options) as program:
        while "to be interrupted" not in server.log:
            assert program.poll() is None
            time.sleep(0.05)
        program.send_signal(signal.SIGINT)
        assert program.wait(timeout=5) == 130
    ask_for_picture(server)
    (done,) = re.findall(r"has ended after step (\d+) of 594", server.log)
    assert int(done) < 100
    assert list(tmp_path.iterdir()) == []


def test_readme_snippets(server: LocalServer, tmp_path: Path) -> None:
    """What README and docs/requests.md tell to type works as it stands, but for the address and a smaller size."""
    pages = "".join((ROOT / name).read_text() for name in ("README.md", "docs/requests.md"))
    blocks = re.findall(r"```(bash|python)\n(.+?)```", pages, re.DOTALL)
    snippets = [(kind, text) for kind, text in blocks if "localhost:8080" in text or "query.py" in text]
    assert [kind for kind, _ in snippets] == ["bash", "bash", "python", "bash", "bash", "python", "python", "bash"]
    (tmp_path / "key_file.json").write_bytes((server.folder / "key_file.json").read_bytes())
    (tmp_path / "list.txt").write_text("a cat\na dog\n")
    address = server.url.rpartition("/predictions")[0]
    (tmp_path / "query.py").write_text((ROOT / "query.py").read_text().replace("http://localhost:8080", address))
    for kind, text in snippets:
        here = text.replace("http://localhost:8080", address).replace("1024x1024", "128x128").replace("=1024", "=128")
        shell = [sys.executable, "-c"] if kind == "python" else ["bash", "-ec"]
        done = subprocess.run([*shell, here], cwd=tmp_path, env=make_environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    made = {path.name for path in tmp_path.glob("*.[jp][pn]g") if not path.name.startswith("output-")}
    previews = {f"fox-preview-{i}.png" for i in (1, 2, 3)}
    assert made == {"fox.png", "fox-3.png", *previews, "curl.jpg", "requests.jpg", "openai.png", "a1111.png"}
    assert json.loads((tmp_path / "metadata.json").read_text())["request"]["seed"] == 7
    assert len(list(tmp_path.glob("output-*.jpg"))) == 3
    Image.open(tmp_path / "openai.png").save(tmp_path / "openai.jpg", quality=90)
    names = ("curl.jpg", "requests.jpg", "openai.jpg")
    assert len({Image.open(tmp_path / name).tobytes() for name in names}) == 1


def test_documents_below_the_models_address(server: LocalServer) -> None:
    with requests.Session() as session:
        for _ in range(2):  # on one connection, which stays in step
            for path, status in (("describe", 200), ("openapi.json", 200), ("nothing", 404)):
                answer = session.get(f"{server.url}/1.0/{path}", headers=server.get_headers(), timeout=60)
                assert (answer.status_code, answer.headers["Content-Type"]) == (status, "application/json")
    assert server.read_document()["backend"] == "eager"
    for url in (server.url, f"{server.url.rpartition('/predictions')[0]}/invocations"):
        answer = requests.get(url, headers={**server.get_headers(), "describe": "True"}, timeout=60)
        assert answer.status_code == 400  # a client cannot pass for the management API
    question = {**server.get_headers(), "describe": "True"}
    answer = requests.post(url, json={"prompt": "a cat", "num_inference_steps": 2}, headers=question, timeout=60)
    assert answer.headers["Content-Type"] == "image/jpeg"
    form = {**question, "Content-Type": "multipart/form-data; boundary=b"}
    assert requests.post(url, data=b"--b--\r\n", headers=form, timeout=60).status_code == 400


def test_without_continuous_batching(tmp_path: Path, tiny_model: Path) -> None:
    settings = yaml.safe_load(make_settings(None, **LIMITS))
    make_archive(tmp_path, tiny_model, yaml.safe_dump(settings | {"continuousBatching": False}, sort_keys=False))
    with LocalServer(tmp_path) as running:
        with ThreadPoolExecutor(3) as pool:
            answers = list(pool.map(lambda width: ask(running, seed=3, width=width), (128, 3, 128)))
        assert [answer.status_code for answer in answers] == [200, 400, 200]
        assert answers[0].content == answers[2].content
        stream = ask(running, num_inference_steps=3, stream=True, partial_images=2)
        kinds = re.findall(r"^event: (\S+)", stream.text, re.MULTILINE)
        assert kinds.count("progress") == kinds.count("image_generation.partial_image") == 2
        assert kinds[-1] == "image_generation.completed"
        assert ask(running, num_inference_steps=150, timeout=1, scheduler="HeunDiscreteScheduler").status_code == 504
        address = f"http://127.0.0.1:{running.ports['management_address']}/models/{running.model}?customized=true"
        answer = requests.get(address, headers=running.get_headers("management"), timeout=60)
        assert answer.json()[0]["customizedMetadata"]["backend"] == "eager"
