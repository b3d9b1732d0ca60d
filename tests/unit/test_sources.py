"""Places without a pipeline: one line names what is there, and the right path or command."""

import shlex
import shutil
from pathlib import Path

import pytest

from sdxl_server.errors import ConfigError
from sdxl_server.model.sources import check_has_pipeline, explain_address, explain_listing, read_hub_page
from tools import serve

DOWNLOAD = "python Download_model.py --model"


def refuse(given: str, folder: Path) -> str:
    """Return the message that refuses a model_path in an archive, without its beginning."""
    with pytest.raises(ConfigError) as caught:
        check_has_pipeline(given, folder)
    message = str(caught.value)
    assert message.startswith("handler.model_path takes the folder of a diffusers pipeline. ")
    assert "\n" not in message
    return message.partition("pipeline. ")[2]


@pytest.mark.parametrize(
    ("address", "model", "revision"),
    [
        ("https://huggingface.co/owner/name", "owner/name", None),
        ("https://huggingface.co/owner/name/?library=diffusers#use", "owner/name", None),
        ("huggingface.co/owner/name/tree/main", "owner/name", None),
        ("https://hf.co/owner/name/tree/v1.5/unet", "owner/name", "v1.5"),
        ("https://huggingface.co/owner/name/commit/abc", "owner/name", "abc"),
        ("https://huggingface.co/owner/name/discussions/7", "owner/name", None),
        ("https://huggingface.co/owner/name/blob/main/README.md", "owner/name", None),
        ("https://huggingface.co/owner/name/blob/main/a%20b.safetensors", "owner/name/a b.safetensors", None),
        ("https://huggingface.co/owner/name/resolve/refs%2Fpr%2F3/x/a.safetensors?download=true",)
        + ("owner/name/x/a.safetensors", "refs/pr/3"),
        *((text, text, None) for text in ("owner/name", "owner/name/a.safetensors", "./a.safetensors", "demo")),
        *((text, text, None) for text in ("https://huggingface.co/datasets/owner/name", "https://example.org/a/b")),
    ],
)
def test_page_of_the_hub_names_a_model(address: str, model: str, revision: str | None) -> None:
    assert read_hub_page(address) == (model, revision)


@pytest.mark.parametrize(
    ("address", "file"),
    [
        ("https://civitai.com/models/133005?modelVersionId=456194", "model.safetensors"),
        ("civitai.com/models/133005/juggernaut-xl", "model.safetensors"),
        ("https://civitai.com/api/download/models/456194?type=Model&format=SafeTensor", "model.safetensors"),
        ("https://huggingface.co/spaces/owner/name", "model.safetensors"),
        ("https://example.org/files/photo%20v2.safetensors?token=1", "photo v2.safetensors"),
        ("s3://bucket/photo.safetensors", "photo.safetensors"),
    ],
)
def test_other_addresses_are_refused(address: str, file: str, tmp_path: Path) -> None:
    explained = explain_address(address)
    assert explained is not None
    assert explained[1] == file
    message = refuse(address, tmp_path)
    assert message.startswith(f"{address} is no page of a model on huggingface.co")
    assert message.endswith(f": {DOWNLOAD} {shlex.quote(file)}")


def test_long_address(tmp_path: Path) -> None:
    assert f"{DOWNLOAD} model.safetensors" in refuse(f"https://civitai.com/models/1?token={'x' * 5000}", tmp_path)
    assert f"{DOWNLOAD} owner/name" in refuse(f"https://huggingface.co/owner/name?token={'x' * 5000}", tmp_path)


@pytest.mark.parametrize("text", ["owner/name", "./x.safetensors", "/srv/model", "demo", "huggingface.co"])
def test_other_texts_are_no_addresses(text: str) -> None:
    assert explain_address(text) is None


def test_make_sdxl_proposes_its_own_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["serve", "--model", "https://example.org/photo%20v2.safetensors"])
    assert serve.main() == 1
    assert capsys.readouterr().err.endswith(". Run: make sdxl MODEL='photo v2.safetensors'\n")


def test_one_file_in_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "Base_Diffusion_model"
    folder.mkdir()
    for name in ("photo.safetensors", ".DS_Store", "README.md", "photo.yaml", "._photo.safetensors"):
        (folder / name).touch()
    expected = "has no model_index.json: it holds a model in one file, photo.safetensors. Make a folder of it by: "
    command = f"{DOWNLOAD} {folder}/photo.safetensors --output-dir {folder}-whole"
    assert refuse("Base_Diffusion_model", tmp_path) == f"{folder} {expected}{command}"
    (folder / "anime.safetensors").touch()
    message = refuse("Base_Diffusion_model", tmp_path)
    assert "it holds models in one file each, anime.safetensors, photo.safetensors. " in message
    assert f"{DOWNLOAD} {folder}/anime.safetensors" in message


def test_file(tmp_path: Path) -> None:
    (tmp_path / "photo v2.safetensors").touch()
    command = f"{DOWNLOAD} '{tmp_path}/photo v2.safetensors' --output-dir '{tmp_path}/photo v2'"
    message = refuse("photo v2.safetensors", tmp_path)
    assert message == f"photo v2.safetensors is a model in one file. Make a folder of it by: {command}"
    assert refuse("no.safetensors", tmp_path).endswith(f"{DOWNLOAD} no.safetensors")
    assert refuse("https://hf.co/a/b/blob/main/c.safetensors", tmp_path).endswith(f"{DOWNLOAD} a/b/c.safetensors")
    assert "is a pickle, which can run code" in refuse("photo.ckpt", tmp_path)
    assert "is in GGUF, which is not read: use the model's .safetensors file" in refuse("photo.gguf", tmp_path)


@pytest.mark.parametrize(("suffix", "told"), [(".ckpt", "is a pickle, which can run code"), (".gguf", "is in GGUF")])
def test_one_file_of_another_format(tmp_path: Path, suffix: str, told: str) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / f"model/photo{suffix}").touch()
    assert told in refuse("model", tmp_path)


def test_above_and_below_the_pipeline(tiny_model: Path, tmp_path: Path) -> None:
    inner = shutil.copytree(tiny_model, tmp_path / "outer/inner")
    message = "has no model_index.json: the pipeline is in inner. Set model_path to"
    assert refuse("outer", tmp_path) == f"{tmp_path}/outer {message} outer/inner"
    assert refuse(f"{tmp_path}/outer", tmp_path / "archive") == f"{tmp_path}/outer {message} {inner}"
    above = f"the pipeline's folder {inner}. Set model_path to outer/inner"
    assert refuse("outer/inner/unet", tmp_path).endswith(f"it is inside {above}")
    weights = "outer/inner/unet/diffusion_pytorch_model.safetensors"
    assert refuse(weights, tmp_path) == f"{tmp_path}/{weights} is a file inside {above}"
    assert refuse("outer/inner/model_index.json", tmp_path).endswith(above)
    shutil.copytree(tiny_model, tmp_path / "outer/other")
    assert "the pipeline is in inner, other. Set" in refuse("outer", tmp_path)


@pytest.mark.parametrize("given", ["owner/name", "https://huggingface.co/owner/name/tree/main"])
def test_model_on_the_hub(tmp_path: Path, given: str) -> None:
    expected = f"There is no folder {given}. If it is a model on the hub, download it by: {DOWNLOAD} owner/name"
    assert refuse(given, tmp_path) == expected


def test_nothing(tmp_path: Path) -> None:
    advice = "python Download_model.py downloads one"
    assert refuse("model", tmp_path) == f"There is none in {tmp_path}/model. {advice}"
    (tmp_path / "model").mkdir()
    assert refuse("model", tmp_path) == f"{tmp_path}/model has no model_index.json: it is another folder. {advice}"


def test_component_is_named() -> None:
    names = ["config.json", "diffusion_pytorch_model.safetensors", "sdxl_vae.safetensors"]
    assert explain_listing(names) == ("it holds one component of a pipeline, not the whole", None)
    assert explain_listing(["config.json", "photo.safetensors"])[1] == "photo.safetensors"
    assert explain_listing(["model.safetensors"])[1] == "model.safetensors"
