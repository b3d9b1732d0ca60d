"""Forms as programs write them: headers of parts, parts without a value, and values as texts."""

import re
from dataclasses import dataclass
from email.mime.multipart import MIMEMultipart
from email.mime.text import MIMEText
from email.policy import HTTP
from typing import Any

import pytest
import requests

from sdxl_server.api.bodies import FILE_HEADERS, TEXT_HEADERS, check_form
from sdxl_server.api.native import NativeApi
from sdxl_server.api.openai import OpenAIApi, OpenAIEditApi
from sdxl_server.errors import RequestError
from tests.unit.test_request import CONTRACT, parse
from tests.unit.test_uploads import FILE

KIND = "multipart/form-data; boundary=x"


@dataclass(frozen=True)
class FormWriter:
    """How a program writes the headers of a form's parts, from its source.

    Attributes:
        boundary: as long as the program's own.
        text, file: the headers of a part. `{name}`, `{length}` and `{file}` are replaced.
    """

    boundary: str
    text: str
    file: str

    def write(self, *parts: tuple[str, bytes, str]) -> tuple[str, bytes]:
        """Return the content type and the body of a form. A part is a name, a value, and a file name or nothing."""
        body = b""
        for name, value, file in parts:
            headers = (self.file if file else self.text).format(name=name, length=len(value), file=file)
            lines = f"--{self.boundary}\n{headers}\n\n".replace("\n", "\r\n")
            body += lines.encode() + value + b"\r\n"
        return f'multipart/form-data; boundary="{self.boundary}"', body + f"--{self.boundary}--\r\n".encode()


PLAIN = 'Content-Disposition: form-data; name="{name}"'
WRITERS = {
    "Apache HttpClient 4 and 5": FormWriter(
        "-" * 8 + "a" * 32,
        f"{PLAIN}\nContent-Type: text/plain; charset=ISO-8859-1\nContent-Transfer-Encoding: 8bit",
        f'{PLAIN}; filename="{{file}}"\nContent-Type: application/octet-stream\nContent-Transfer-Encoding: binary',
    ),
    "Retrofit's scalars": FormWriter(
        "3f0f1a3e-3a8e-4a0b-9b39-0d7b8d9e9f11",
        f"{PLAIN}\nContent-Transfer-Encoding: binary\nContent-Type: text/plain; charset=UTF-8\n"
        "Content-Length: {length}",
        f'{PLAIN}; filename="{{file}}"\nContent-Type: image/png\nContent-Length: {{length}}',
    ),
    "OkHttp": FormWriter(
        "3f0f1a3e-3a8e-4a0b-9b39-0d7b8d9e9f11",
        f"{PLAIN}\nContent-Length: {{length}}",
        f'{PLAIN}; filename="{{file}}"\nContent-Type: image/png\nContent-Length: {{length}}',
    ),
    "Spring": FormWriter(
        "x" * 40,
        f"{PLAIN}\nContent-Type: text/plain;charset=UTF-8\nContent-Length: {{length}}",
        f'{PLAIN}; filename="{{file}}"\nContent-Type: application/octet-stream\nContent-Length: {{length}}',
    ),
    "Symfony": FormWriter(
        "_=_symfony_1700000000_abcdef0123456789abcdef0123456789_=_",
        f"Content-Type: text/plain; charset=utf-8\nContent-Transfer-Encoding: 8bit\n{PLAIN}",
        f'Content-Type: image/png\nContent-Transfer-Encoding: 8bit\n{PLAIN}; filename="{{file}}"',
    ),
    "Guzzle": FormWriter(
        "a" * 40,
        f"{PLAIN}\nContent-Length: {{length}}",
        f'{PLAIN}; filename="{{file}}"\nContent-Length: {{length}}\nContent-Type: image/png',
    ),
    "Dart's http": FormWriter(
        "dart-http-boundary-" + "a" * 51,
        'content-disposition: form-data; name="{name}"\ncontent-type: text/plain; charset=utf-8\n'
        "content-transfer-encoding: binary",
        'content-type: application/octet-stream\ncontent-disposition: form-data; name="{name}"; filename="{file}"',
    ),
    ".NET": FormWriter(
        "3f0f1a3e-3a8e-4a0b-9b39-0d7b8d9e9f11",
        "Content-Type: text/plain; charset=utf-8\nContent-Disposition: form-data; name={name}",
        "Content-Type: image/png\n"
        "Content-Disposition: form-data; name={name}; filename={file}; filename*=utf-8''{file}",
    ),
    "Go": FormWriter("a" * 60, PLAIN, f'{PLAIN}; filename="{{file}}"\nContent-Type: application/octet-stream'),
    "curl": FormWriter("-" * 24 + "a" * 22, PLAIN, f'{PLAIN}; filename="{{file}}"\nContent-Type: image/png'),
    "aiohttp": FormWriter(
        "a" * 32,
        f"Content-Type: text/plain; charset=utf-8\n{PLAIN}",
        f'Content-Type: image/png\n{PLAIN}; filename="{{file}}"',
    ),
    "form-data of Node.js": FormWriter(
        "-" * 26 + "1" * 24, PLAIN, f'{PLAIN}; filename="{{file}}"\nContent-Type: image/png'
    ),
    "Chrome": FormWriter(
        "----WebKitFormBoundary" + "a" * 16, PLAIN, f'{PLAIN}; filename="{{file}}"\nContent-Type: image/png'
    ),
}
TEXTS = {"prompt": "a red fox", "seed": "7", "num_inference_steps": "3", "guidance_scale": "2", "width": "64"}
LONG_NAME = "a" * 251 + ".png"


def pass_on(content_type: str, body: bytes) -> dict[str, bytearray]:
    """Return the parts of a form as TorchServe passes them: the last of each name."""
    found = re.search(r'boundary="?([^";]+)', content_type)
    assert found
    values = {}
    for part in body.split(f"--{found[1]}".encode())[1:-1]:
        head, _, value = part.partition(b"\r\n\r\n")
        name = re.search(rb'\bname="?([^";\r]+)', head)
        assert name
        values[name[1].decode()] = bytearray(value.removesuffix(b"\r\n"))
    return values


def check(content_type: str, body: bytes) -> list[str]:
    return check_form(pass_on(content_type, body), content_type=content_type, length=str(len(body)))


def write_texts(fields: dict[str, str]) -> list[tuple[str, bytes, str]]:
    return [(name, value.encode(), "") for name, value in fields.items()]


@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
def test_form_of_a_program_is_read(writer: FormWriter) -> None:
    """Neither headers nor a file's name are mistaken for a lost part."""
    texts = write_texts(TEXTS)
    kind, body = writer.write(*texts)
    assert check(kind, body) == []
    assert parse(pass_on(kind, body), kind) == parse(
        {"prompt": b"a red fox", **{k: v.encode() for k, v in TEXTS.items()}}
    )
    assert check(*writer.write(("image", FILE, "a.png"), ("mask_image", FILE, "photo of a fox.png"), *texts)) == []
    assert check(*writer.write(("prompt", b"a", ""))) == []
    for name in (LONG_NAME, "%E7%8B%90" * 100 + ".png"):  # 100 Chinese characters, encoded
        check(*writer.write(("image", FILE, name), ("mask_image", FILE, name), *texts))


def test_allowances_are_those_of_the_programs() -> None:
    empty = len("\r\n".join((PLAIN.format(name="image"), "", "")))

    def measure(name: str) -> list[int]:
        bodies = [(writer, writer.write(("image", FILE, name))[1]) for writer in WRITERS.values()]
        return [body.index(b"\r\n\r\n") + 4 - len(writer.boundary) - 4 - empty for writer, body in bodies]

    assert 90 <= max(measure("")) <= TEXT_HEADERS
    assert (
        max(length for length, name in zip(measure(LONG_NAME), WRITERS, strict=True) if name != ".NET") <= FILE_HEADERS
    )


@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
@pytest.mark.parametrize("name", ["image", "image[]", "mask"])
def test_lost_image_is_refused(writer: FormWriter, name: str) -> None:
    file = FILE + bytes(6_000)
    with pytest.raises(RequestError, match="send one image") as caught:
        check(*writer.write((name, file, "a.png"), (name, file, "b.png"), *write_texts(TEXTS)))
    assert caught.value.param == name


@pytest.mark.parametrize("lost", [("image", bytes(1_500), "a.png"), ("prompt", b"a red fox" * 300, "")])
def test_small_part_that_may_be_lost_is_reported(lost: tuple[str, bytes, str]) -> None:
    (warning,) = check(*WRITERS["curl"].write(lost, ("image", bytes(1_500), "b.png"), *write_texts(TEXTS)))
    assert "only the last of them is read" in warning


def test_text_that_is_lost_is_no_reason_to_refuse() -> None:
    """`num_images_per_prompt` has an image in its name only."""
    fields = write_texts({**TEXTS, "num_images_per_prompt": "1", "partial_images": "0"})
    assert len(check(*WRITERS["curl"].write(("prompt", bytes(100_000), ""), *fields))) == 1


def make_mime_form(policy: Any) -> tuple[str, bytes]:
    form = MIMEMultipart("form-data", policy=policy)
    for name, value in TEXTS.items():
        part = MIMEText(value, "plain", "us-ascii", policy=policy)
        part.add_header("Content-Disposition", "form-data", name=name)
        form.attach(part)
    body = form.as_bytes(policy=policy)
    return str(form["Content-Type"]).replace("\r\n", ""), body[body.index(b"\r\n--") + 2 :]


def test_form_of_pythons_email_is_read() -> None:
    kind, body = make_mime_form(HTTP)
    assert b"MIME-Version" in body
    assert check(kind, body) == []
    assert pass_on(kind, body) == {name: value.encode() for name, value in TEXTS.items()}


def test_form_of_requests_is_read() -> None:
    files = {"image": (LONG_NAME, FILE + bytes(9_000), "image/png")}
    sent = requests.Request("POST", "http://localhost", data=TEXTS, files=files).prepare()
    assert isinstance(sent.body, bytes)
    assert check(sent.headers["Content-Type"], sent.body) == []


@pytest.mark.parametrize("value", [b"", b" ", b"None", b"null", b"undefined", b" NULL\r\n"])
@pytest.mark.parametrize(
    "name",
    [
        *(
            "seed",
            "num_images_per_prompt",
            "strength",
            "scheduler",
            "guidance_scale",
            "width",
            "stream",
            "original_size",
        ),
        *("timesteps", "adapters", "output_format", "resize_mode", "image", "mask_image", "denoising_end"),
    ],
)
def test_part_without_a_value_is_absent(name: str, value: bytes) -> None:
    plain = {"prompt": b"a red fox", "seed": b"1"} if name != "seed" else {"prompt": b"a red fox", "width": b"64"}
    expected, read = parse(plain), parse({**plain, name: value})
    assert {**vars(read), "seed": 1} == {**vars(expected), "seed": 1}


@pytest.mark.parametrize("value", [b"", b"None", b"undefined"])
@pytest.mark.parametrize(
    "name", ["n", "size", "mask", "rng_seed", "output_compression", "quality", "background", "style", "user", "model"]
)
@pytest.mark.parametrize("kind", [KIND, "application/x-www-form-urlencoded"])
def test_openais_part_without_a_value_is_absent(name: str, value: bytes, kind: str) -> None:
    form = {"prompt": b"a red fox", "seed" if name != "rng_seed" else "width": b"64", name: value}
    request, warnings = OpenAIApi().read(form, content_type=kind, contract=CONTRACT)
    del form[name]
    expected, _ = OpenAIApi().read(form, content_type=kind, contract=CONTRACT)
    assert {**vars(request), "seed": 1} == {**vars(expected), "seed": 1}
    assert warnings == []


@pytest.mark.parametrize("writer", [WRITERS["curl"], WRITERS[".NET"]], ids=["curl", ".NET"])
@pytest.mark.parametrize("kind", ["multipart/form-data", "multipart/mixed; boundary=x", "text/plain", ""])
@pytest.mark.parametrize("api", [NativeApi(), OpenAIApi()], ids=["native", "openai"])
def test_form_without_its_boundary_is_no_prompt(writer: FormWriter, kind: str, api: NativeApi) -> None:
    """TorchServe passes it as a body. Programs that set the Content-Type themselves leave out the boundary."""
    for parts in (write_texts(TEXTS), [("image", FILE, "a.png")]):
        with pytest.raises(RequestError, match="the form was not read: its boundary is missing or wrong"):
            api.read({"body": writer.write(*parts)[1]}, content_type=kind, contract=CONTRACT)
    with pytest.raises(RequestError, match="its boundary is missing or wrong"):
        api.read({}, content_type="multipart/form-data; boundary=other", contract=CONTRACT)


def test_file_in_an_unknown_field_is_no_wrong_text() -> None:
    with pytest.raises(RequestError, match="'images' is not a field; did you mean 'image'"):
        parse({"prompt": b"a", "images": FILE})
    _, warnings = OpenAIApi().read({"prompt": b"a", "image[1]": FILE}, content_type=KIND, contract=CONTRACT)
    assert warnings == ["ignored, since there is no such field: 'image[1]'"]


@pytest.mark.parametrize("name", ["image", "image[]", "image[0]"])
def test_names_of_an_edits_image(name: str) -> None:
    """PHP numbers the files of a list."""
    request, _ = OpenAIEditApi().read({"prompt": b"a", name: FILE}, content_type=KIND, contract=CONTRACT)
    assert request.image is not None


def test_text_keeps_such_words() -> None:
    """Only an empty text is absent: `None` and `null` are words of a prompt."""
    request = parse({"prompt": b"None", "negative_prompt": b"null", "prompt_2": b""})
    assert (request.prompt, request.negative_prompt, request.prompt_2) == ("None", "null", None)
    with pytest.raises(RequestError, match="prompt is missing"):
        parse({"prompt": b""})
    with pytest.raises(RequestError, match="'sede' is not a field"):
        parse({"prompt": b"a", "sede": b""})
    with pytest.raises(RequestError, match="image is missing"):
        OpenAIEditApi().read({"prompt": b"a", "image": b""}, content_type=KIND, contract=CONTRACT)


@pytest.mark.parametrize("word", ["true", "True", "TRUE", "on", "yes", "1", " true\n"])
@pytest.mark.parametrize("api", [NativeApi(), OpenAIApi()])
def test_switch_of_a_form(word: str, api: NativeApi) -> None:
    assert api.read({"prompt": b"a", "stream": word.encode()}, content_type=KIND, contract=CONTRACT)[0].stream
    for no in ("false", "False", "off", "no", "0"):
        assert not api.read({"prompt": b"a", "stream": no.encode()}, content_type=KIND, contract=CONTRACT)[0].stream
    for wrong in ("maybe", "2", "truefalse"):
        with pytest.raises(RequestError, match="stream takes true or false, not"):
            api.read({"prompt": b"a", "stream": wrong.encode()}, content_type=KIND, contract=CONTRACT)


@pytest.mark.parametrize(
    ("field", "value", "read"),
    [
        *[("width", value, 128) for value in (" 128", "+128", "128.0", "1.28e2", "0128", "128.", "128\r\n")],
        *[("guidance_scale", value, 0.5) for value in (".5", "+0.5", "5e-1", " 0.50 ")],
        ("seed", "-1.0", None),
        ("seed", "4294967295.0", 4294967295),
        ("original_size", "[32.0, 64]", (32, 64)),
    ],
)
def test_number_of_a_form(field: str, value: str, read: Any) -> None:
    found = getattr(parse({"prompt": b"a", field: value.encode()}), field)
    assert read is None or (found, type(found)) == (read, type(read))


@pytest.mark.parametrize(
    "value", ["1_28", "0x80", "128px", "1,28", "NaN", "Infinity", "1e400", "\u0661\u0662\u0668", "9" * 5000]
)
def test_text_that_is_no_number(value: str) -> None:
    with pytest.raises(RequestError, match="width takes a whole number from 64 to 256 that is a multiple of 8, not "):
        parse({"prompt": b"a", "width": value.encode()})


def test_empty_text_of_json() -> None:
    """OpenAI's clients send it for a value that they do not have. The native path takes null."""
    body = b'{"prompt": "a", "size": "", "n": "", "seed": "", "style": "", "response_format": "", "mask": ""}'
    request, warnings = OpenAIApi().read({"body": body}, content_type="application/json", contract=CONTRACT)
    assert (request.width, request.num_images_per_prompt, request.mask_image, warnings) == (128, 1, None, [])
    with pytest.raises(RequestError, match="seed takes a whole number from -1 to 4294967295, not ''"):
        parse({"body": b'{"prompt": "a", "seed": ""}'}, "application/json")
    with pytest.raises(RequestError, match="prompt takes a text"):
        OpenAIApi().read({"body": b'{"prompt": ""}'}, content_type="application/json", contract=CONTRACT)
