"""What one running server answers to good, bad and hostile requests."""

import json
import socket

import psutil
import pytest
import requests

from scorecard.fuzz import make_jpeg
from sdxl_server.api.bodies import SEND_JSON
from tests.server.eager import KEPT, PASSED_ON
from tests.server.test_backends import ask_for_picture, check_report, check_seeds
from tools.server import LocalServer


def post(server: LocalServer, body: bytes, content_type: str | None) -> requests.Response:
    headers = {**server.get_headers(), **({"Content-Type": content_type} if content_type else {})}
    return requests.post(server.url, data=body, headers=headers, timeout=60)


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (b"a red fox", "text/plain"),
        (b"a red fox", None),
        (b'{"prompt": "a red fox"}', "application/json"),
        ("ein Füchslein 🦊".encode(), "text/plain; charset=utf-8"),
        ("ein Füchslein 🦊".encode("utf-16"), "text/plain"),
        ('{"prompt": "ein Füchslein"}'.encode("utf-16"), None),
        ('{"prompt": "ein Füchslein"}'.encode("latin-1"), "Application/JSON; charset=ISO-8859-1"),
    ],
)
def test_prompts_get_a_picture(server: LocalServer, body: bytes, content_type: str | None) -> None:
    answer = post(server, body, content_type)
    assert answer.status_code == 200
    assert answer.headers["Content-Type"] == "image/jpeg"


def test_prompt_as_a_form_field_gets_a_picture(server: LocalServer) -> None:
    files = {"data": ("prompt.txt", b"a red fox", "text/plain")}
    answer = requests.post(server.url, files=files, headers=server.get_headers(), timeout=60)
    assert answer.status_code == 200, answer.text


def test_header_names_may_be_in_lower_case(server: LocalServer) -> None:
    headers = {**server.get_headers(), "content-type": "text/plain"}
    body = b'{"promt": "this is a prompt, since the body is text"}'
    assert requests.post(server.url, data=body, headers=headers, timeout=60).status_code == 200


@pytest.mark.parametrize(
    ("body", "content_type", "message", "param"),
    [
        (b"", "text/plain", "prompt takes a text with more than spaces", "prompt"),
        (b"", "application/json", "not JSON", None),
        (b"{", "application/json", "not JSON", None),
        (b"[" * 100_000, "application/json", "not JSON", None),
        (b"\xff", "text/plain", "not UTF-8", None),
        (b'{"prompt": "\xff"}', "application/json", "not UTF-8", None),
        (b'{"prompt": ""}', "application/json", "prompt takes a text with more than spaces", "prompt"),
        (b'{"prompt": 3}', "application/json", "prompt takes a text", "prompt"),
        (b'{"prompt": "\\ud800"}', "application/json", "lone surrogate", "prompt"),
        (b'{"promt": "a red fox"}', "application/json", "'promt' is not a field", "promt"),
        (b"a=b", "application/x-www-form-urlencoded", "'a' is not a field", "a"),
        # As curl -d and PowerShell send them; TorchServe drops what has no "=".
        (b'{"prompt": "a red fox"}', "application/x-www-form-urlencoded", SEND_JSON, None),
        (b'{"prompt": "cats & dogs = 1 + 1"}', "application/x-www-form-urlencoded", SEND_JSON, None),
        (b'{"prompt": "100% fox"}', "application/x-www-form-urlencoded; charset=utf-8", SEND_JSON, None),
        (b'[{"prompt": "a"}]', "application/x-www-form-urlencoded", SEND_JSON, None),
        (b"a red fox", "application/x-www-form-urlencoded", "or text/plain for a plain prompt", None),
    ],
)
def test_mistakes_get_a_400_that_names_them(
    server: LocalServer, body: bytes, content_type: str, message: str, param: str | None
) -> None:
    answer = post(server, body, content_type)
    assert answer.status_code == 400
    assert answer.headers["Content-Type"] == "application/json"
    error = answer.json()["error"]
    assert message in error["message"]
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, 400)


@pytest.mark.parametrize(("path", "name"), [("", "image"), ("/1.0/v1/images/edits", "image[]")])
def test_of_several_images_in_a_form_none_is_silently_left_out(server: LocalServer, path: str, name: str) -> None:
    def ask(*files: bytes) -> requests.Response:
        form = [(name, (f"{'photo ' * 20}{index}.jpg", file)) for index, file in enumerate(files)]
        fields = {"prompt": "a red fox", "num_inference_steps": "2", "strength": "1"}
        return requests.post(server.url + path, files=form, data=fields, headers=server.get_headers(), timeout=60)

    first, second = make_jpeg(size=(600, 450)), make_jpeg(size=(450, 600))
    assert ask(first).status_code == 200
    answer = ask(first, second)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, name)
    assert "send one image" in answer.json()["error"]["message"]


HTTPCLIENT = "Content-Type: text/plain; charset=ISO-8859-1\r\nContent-Transfer-Encoding: 8bit\r\n"


def test_form_with_long_headers_and_empty_parts_is_read(server: LocalServer) -> None:
    """As Apache's HttpClient writes texts, and curl a file of no bytes and no name."""
    texts = {"prompt": "a red fox", "num_inference_steps": "2", "seed": "", "n": "", "strength": "", "stream": "off"}
    parts = [f'Content-Disposition: form-data; name="{name}"\r\n{HTTPCLIENT}\r\n{texts[name]}' for name in texts]
    file = 'Content-Disposition: form-data; name="mask"; filename=""\r\nContent-Type: application/octet-stream\r\n\r\n'
    body = "".join(f"--b\r\n{part}\r\n" for part in (*parts, file)) + "--b--\r\n"
    answer = requests.post(
        f"{server.url}/1.0/v1/images/generations",
        data=body.encode(),
        headers={**server.get_headers(), "Content-Type": "multipart/form-data; boundary=b"},
        timeout=60,
    )
    assert answer.status_code == 200, answer.text
    assert (len(answer.json()["data"]), answer.json()["warnings"]) == (1, [])


def test_request_without_a_body_gets_a_400(server: LocalServer) -> None:
    answer = requests.get(server.url, headers=server.get_headers(), timeout=60)
    assert answer.status_code == 400
    assert "prompt takes a text" in answer.json()["error"]["message"]


def test_request_that_is_too_large_is_refused(server: LocalServer) -> None:
    assert post(server, b"x" * 34_000_000, "text/plain").status_code == 413


def test_prompt_cannot_forge_a_log_line(server: LocalServer) -> None:
    prompt = "a fox\n[METRICS]forged.Count:1|#Level:Model|#type:COUNTER\n[PID]1\n\x1b[2J"
    assert post(server, json.dumps({"prompt": prompt}).encode(), "application/json").status_code == 200
    lines = [line for line in server.log.splitlines() if "forged" in line]
    assert lines
    assert all(json.dumps(prompt) in line for line in lines)


def test_prompt_that_is_cut_is_logged_once(server: LocalServer) -> None:
    prompt = "a prompt that is cut " * 50
    answer = post(server, json.dumps({"prompt": prompt}).encode(), "application/json")
    assert "the text encoder reads the first" in answer.headers["X-Warning"]
    assert len([line for line in server.log.splitlines() if "a prompt that is cut" in line]) == 1


def test_worker_gets_listed_variables(server: LocalServer) -> None:
    environment = psutil.Process(server.find_worker()).environ()
    assert {*PASSED_ON, *KEPT, "PATH", "TMPDIR", "PYTHONPATH"} & environment.keys() == {
        *PASSED_ON,
        *("PATH", "TMPDIR", "PYTHONPATH"),
    }


@pytest.mark.parametrize(
    ("path", "body", "content_type", "message"),
    [
        ("/invocations?url_path=x&prompt=a", b"", None, "'url_path' is not a field"),
        ("/invocations?accept=x&content-type=y", b'{"promt": 1}', None, "'accept' is not a field"),
        ("/predictions/diffusion_fast", b"url_path=x&prompt=a", "application/x-www-form-urlencoded", "'url_path'"),
        (
            "/predictions/diffusion_fast",
            '{"🦊": 1}'.replace("🦊", "🦊" * 10**6).encode(),
            "application/json",
            "not a field",
        ),
        ("/predictions/diffusion_fast", b"\1" * 10**6 + b"=1", "application/x-www-form-urlencoded", "not a field"),
    ],
)
def test_what_is_no_field_is_told_in_few_words(
    server: LocalServer, path: str, body: bytes, content_type: str | None, message: str
) -> None:
    headers = {**server.get_headers(), **({"Content-Type": content_type} if content_type else {})}
    address = server.url.rpartition("/predictions")[0]
    answer = requests.post(address + path, data=body, headers=headers, timeout=60)
    assert answer.status_code in (400, 404), answer.text[:1000]
    assert message in answer.json()["error"]["message"]
    assert len(answer.content) < 5000


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong"}])
def test_nobody_gets_in_without_a_token(server: LocalServer, headers: dict[str, str]) -> None:
    inference, management = (
        f"http://127.0.0.1:{server.ports[f'{api}_address']}" for api in ("inference", "management")
    )
    for method, url in (
        ("POST", server.url),
        ("GET", f"{inference}/ping"),
        ("GET", f"{management}/models"),
        ("POST", f"{management}/models?url=https://example.org/x.mar"),
    ):
        answer = requests.request(method, url, headers=headers, timeout=60)
        assert answer.status_code == 400, url
        assert answer.json()["type"] == "InvalidKeyException"
    with pytest.raises(requests.ConnectionError):  # the metrics endpoint, which knows no tokens
        requests.get(f"http://127.0.0.1:{server.ports['metrics_address']}/metrics", headers=headers, timeout=60)


def test_what_the_server_writes_is_for_this_account_only(server: LocalServer) -> None:
    names = ("key_file.json", "server.log", "logs/model_log.log", "logs/ts_log.log", "logs/access_log.log")
    for path in (server.temporary, *(server.folder / name for name in names)):
        assert path.stat().st_mode & 0o077 == 0, path
    assert (server.temporary / "models").is_dir()


def test_models_cannot_be_registered(server: LocalServer) -> None:
    url = f"http://127.0.0.1:{server.ports['management_address']}/models?url=https://example.org/x.mar"
    answer = requests.post(url, headers=server.get_headers("management"), timeout=60)
    assert answer.status_code == 405


def test_only_loopback_is_listened_on(server: LocalServer) -> None:
    listening = {
        (connection.laddr.ip.removeprefix("::ffff:"), connection.laddr.port)
        for process in server.find_processes()
        for connection in process.net_connections("tcp")
        if connection.status == "LISTEN"
    }
    assert {ip for ip, _ in listening} == {"127.0.0.1", "255.255.255.255"}  # gRPC is where nobody can connect
    for ip, port in listening:
        if ip == "255.255.255.255":
            for target in ("127.0.0.1", ip, socket.gethostname()):
                with pytest.raises(OSError, match="refused|unreachable"):
                    socket.create_connection((target, port), timeout=5)
    assert {server.ports[key] for key in ("inference_address", "management_address")} <= {port for _, port in listening}


def test_client_that_sends_nothing_does_not_block_others(server: LocalServer) -> None:
    with socket.create_connection(("127.0.0.1", server.ports["inference_address"])):
        ask_for_picture(server)


def test_eager_makes_pictures(server: LocalServer) -> None:
    assert ask_for_picture(server).tobytes() != ask_for_picture(server).tobytes()
    check_seeds(server, images=2)
    check_report(server.read_document(), "eager", [])
