"""Marks of image files, as Pillow and c2pa's own reader see them."""

import base64
import datetime
import io
import json
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from c2pa import Reader
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from PIL import Image

from sdxl_server.api.http import HttpRequest
from sdxl_server.api.marking import SOURCES, Marker
from sdxl_server.api.metadata import read_metadata
from sdxl_server.config.settings import HandlerConfig
from sdxl_server.errors import ConfigError
from sdxl_server.model.loaded_pipeline import LoadedPipeline
from sdxl_server.service import Service

FIELDS: dict[str, Any] = {"prompt": "a fox", "num_inference_steps": 2, "height": 64, "width": 64, "seed": 1}


def make_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def write_key(path: Path, key: ec.EllipticCurvePrivateKey) -> str:
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return str(path)


def make_chain(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Return a certificate for signing by C2PA's rules and its authority's, in PEM."""
    authority, now = make_key(), datetime.datetime.now(datetime.UTC)

    def build(name: str, public: ec.EllipticCurvePublicKey, *, is_authority: bool) -> x509.CertificateBuilder:
        def make_name(common: str) -> x509.Name:
            organization = x509.NameAttribute(NameOID.ORGANIZATION_NAME, "tests")
            return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common), organization])

        usages = dict.fromkeys(
            (
                "content_commitment",
                "key_encipherment",
                "data_encipherment",
                "key_agreement",
                "encipher_only",
                "decipher_only",
            ),
            False,
        )
        usage = x509.KeyUsage(
            digital_signature=not is_authority, key_cert_sign=is_authority, crl_sign=is_authority, **usages
        )
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key())
        return (
            x509.CertificateBuilder(make_name("authority"), make_name(name), public, x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=2))
            .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(issuer, critical=False)
        )

    purpose = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION])
    leaf = build("server", key.public_key(), is_authority=False).add_extension(purpose, critical=False)
    chain = (leaf, build("authority", authority.public_key(), is_authority=True))
    return b"".join(each.sign(authority, hashes.SHA256()).public_bytes(serialization.Encoding.PEM) for each in chain)


@pytest.fixture(scope="module")
def signing(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder, key = tmp_path_factory.mktemp("c2pa"), make_key()
    (folder / "chain.pem").write_bytes(make_chain(key))
    return {"c2pa_certificate": str(folder / "chain.pem"), "c2pa_key": write_key(folder / "key.pem", key)}


def ask(loaded: LoadedPipeline, marker: Marker, path: str = "", **fields: Any) -> bytes:
    """Return the whole response at a path."""
    values = {"body": json.dumps(fields).encode()}
    response = Service(loaded, marker=marker).answer(HttpRequest(values, path=path, content_type="application/json"))
    sent = b""
    try:
        while True:
            sent += next(response.steps) or b""
    except StopIteration as end:
        return sent + bytes(end.value)


def draw(loaded: LoadedPipeline, marker: Marker, **fields: Any) -> list[bytes]:
    """Return the files that a stream sends: previews, then the image."""
    sent = ask(loaded, marker, **{**FIELDS, "stream": True, **fields})
    events = [json.loads(line[6:]) for line in sent.splitlines() if line.startswith(b"data: ")]
    return [base64.b64decode(event["b64_json"]) for event in events if "b64_json" in event]


def find_source(file: bytes) -> str | None:
    packet = Image.open(io.BytesIO(file)).info.get("xmp")
    if packet is None:
        return None
    name = "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType"
    return next((each.attrib[name] for each in ElementTree.fromstring(packet).iter() if name in each.attrib), None)


@pytest.mark.parametrize("output_format", ["jpeg", "png", "webp"])
def test_images_and_previews_say_that_a_model_made_them(eager: LoadedPipeline, output_format: str) -> None:
    files = draw(eager, Marker(HandlerConfig()), output_format=output_format, partial_images=1)
    assert [find_source(file) for file in files] == [f"{SOURCES}trainedAlgorithmicMedia"] * 2
    files = draw(eager, Marker(HandlerConfig(marking="none")), output_format=output_format, partial_images=1)
    assert [find_source(file) for file in files] == [None, None]


@pytest.mark.parametrize("has_mask", [False, True])
def test_an_uploaded_image_makes_a_composite(eager: LoadedPipeline, has_mask: bool) -> None:
    upload = io.BytesIO()
    Image.new("RGB", (64, 64)).save(upload, "png")
    content = base64.b64encode(upload.getvalue()).decode()
    fields = {"image": content, **({"mask_image": content} if has_mask else {})}
    assert [find_source(file) for file in draw(eager, Marker(HandlerConfig()), **fields)] == [
        f"{SOURCES}compositeWithTrainedAlgorithmicMedia"
    ]


@pytest.mark.parametrize("output_format", ["jpeg", "png", "webp"])
def test_a_signed_manifest(eager: LoadedPipeline, signing: dict[str, Any], output_format: str) -> None:
    marker = Marker(HandlerConfig(marking="c2pa", **signing))
    plain = draw(eager, Marker(HandlerConfig()), output_format=output_format, partial_images=1)
    for file, unsigned in zip(draw(eager, marker, output_format=output_format, partial_images=1), plain, strict=True):
        reader = Reader(f"image/{output_format}", io.BytesIO(file))
        assert reader.get_validation_state() == "Valid"
        actions = [
            each for each in reader.get_active_manifest()["assertions"] if each["label"].startswith("c2pa.actions")
        ]
        (action,) = actions[0]["data"]["actions"]
        assert action["digitalSourceType"] == f"{SOURCES}trainedAlgorithmicMedia"
        assert (action["softwareAgent"]["name"], action["parameters"]["model"]) == (
            "sdxl_server",
            "Base_Diffusion_model",
        )
        assert find_source(file) == f"{SOURCES}trainedAlgorithmicMedia"
        assert len(file) - len(unsigned) < 20_000
        pixels = [Image.open(io.BytesIO(each)).convert("RGB").tobytes() for each in (file, unsigned)]
        assert pixels[0] == pixels[1]
        changed = bytearray(file)
        changed[-40] ^= 1
        assert Reader(f"image/{output_format}", io.BytesIO(changed)).get_validation_state() == "Invalid"
    assert FIELDS.items() <= read_metadata(file, eager.contract.limits)["request"].items()


def test_every_api_signs(eager: LoadedPipeline, signing: dict[str, Any]) -> None:
    marker = Marker(HandlerConfig(marking="c2pa", **signing))
    native = ask(eager, marker, **FIELDS, output_format="png")
    openai = json.loads(ask(eager, marker, "v1/images/generations", **FIELDS))["data"][0]["b64_json"]
    others: dict[str, Any] = {"prompt": "a fox", "steps": 2, "height": 64, "width": 64}
    a1111 = json.loads(ask(eager, marker, "sdapi/v1/txt2img", **others))["images"][0]
    for file in (native, base64.b64decode(openai), base64.b64decode(a1111)):
        assert Reader("image/png", io.BytesIO(file)).get_validation_state() == "Valid"
        assert find_source(file) == f"{SOURCES}trainedAlgorithmicMedia"


def test_wrong_certificates_are_refused_at_the_start(signing: dict[str, Any], tmp_path: Path) -> None:
    for fields, words in (
        ({"c2pa_certificate": signing["c2pa_certificate"]}, "needs handler.c2pa_key, a PEM file"),
        ({**signing, "c2pa_key": "/no/key.pem"}, "handler.c2pa_key takes a PEM file, and /no/key.pem: No such file"),
        ({**signing, "c2pa_key": write_key(tmp_path / "other.pem", make_key())}, "its es256 key, in PEM"),
        ({**signing, "c2pa_key": signing["c2pa_certificate"]}, "its es256 key, in PEM"),
        ({**signing, "c2pa_algorithm": "ps256"}, "its ps256 key, in PEM"),
    ):
        with pytest.raises(ConfigError, match=words):
            Marker(HandlerConfig(marking="c2pa", **fields))
    with pytest.raises(ConfigError, match="need marking: c2pa, not xmp"):
        Marker(HandlerConfig(**signing))


def test_c2pa_is_not_installed(signing: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "c2pa", None)
    with pytest.raises(ConfigError, match="pip install c2pa-python"):
        Marker(HandlerConfig(marking="c2pa", **signing))
