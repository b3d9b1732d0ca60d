"""Incomplete model folders: each loads correctly, or is refused with the command that repairs it."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from Download_model import DownloadError, open_folder
from sdxl_server.errors import ConfigError
from sdxl_server.model.adapters.lora_files import load_lora
from sdxl_server.model.families import FAMILIES, find_family
from sdxl_server.model.folders import write_redownload_command
from sdxl_server.model.vaes import load_vae
from tests.unit.pipelines import load, make_picture
from tools.server import ROOT


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_model, tmp_path / "model")


def edit(path: Path, **values: object) -> None:
    """Change a JSON file. None removes a key."""
    content = json.loads(path.read_text()) | values
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def refuse(folder: Path) -> str:
    """Return the message that refuses the folder."""
    with pytest.raises(ConfigError) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("part", ["tokenizer", "tokenizer_2"])
def test_tokenizer_without_a_vocabulary(folder: Path, part: str) -> None:
    (folder / part / "tokenizer.json").unlink()
    message = refuse(folder)
    assert f"{part} knows 2 tokens and text_encoder{part.removeprefix('tokenizer')} 514" in message
    assert message.endswith(f"python Download_model.py --model '<its id on the hub>' --output-dir {folder}-whole")


def test_tokenizer_of_another_model(folder: Path) -> None:
    shutil.copy(ROOT / "demo/model/tokenizer/tokenizer.json", folder / "tokenizer")
    edit(folder / "model_index.json", _name_or_path="owner/name")
    message = refuse(folder)
    assert "tokenizer knows 619 tokens and text_encoder 514" in message
    assert message.endswith(f"python Download_model.py --model owner/name --output-dir {folder}-whole")


def test_half_a_vocabulary(folder: Path) -> None:
    (folder / "tokenizer/tokenizer.json").unlink()
    (folder / "tokenizer/vocab.json").write_text("{}")
    assert re.search(r"^cannot read the pipeline in .*\(download it again: python Download_model.py ", refuse(folder))


def test_remedy_names_the_source_of_the_model(folder: Path) -> None:
    (folder / "source.json").write_text(json.dumps({"model": "owner/name", "revision": "0" * 40, "dtype": "fp16"}))
    told = ["--model", "owner/name", "--revision", "0" * 40, "--output-dir", f"{folder}-whole"]
    assert shlex.split(write_redownload_command(folder)) == ["python", "Download_model.py", *told]
    for odd in ("$(x)/y", "a/b/c", 3, "x" * 99 + "/y"):
        (folder / "source.json").write_text(json.dumps({"model": odd, "revision": "a b"}))
        assert "<its id on the hub>" in write_redownload_command(folder)


def test_length_that_is_not_said(folder: Path, tiny_model: Path) -> None:
    for part in ("tokenizer", "tokenizer_2"):
        edit(folder / part / "tokenizer_config.json", model_max_length=None)
    loaded = load(folder)
    assert (loaded.pipeline.tokenizer.model_max_length, loaded.pipeline.tokenizer_2.model_max_length) == (77, 77)
    long = "a red fox " * 20
    assert np.array_equal(make_picture(loaded, prompt=long), make_picture(load(tiny_model), prompt=long))


@pytest.mark.parametrize("parts", [("unet", "vae", "text_encoder", "text_encoder_2"), ("text_encoder_2",)])
def test_fp16_only(folder: Path, tiny_model: Path, parts: tuple[str, ...]) -> None:
    for part in parts:
        for path in list((folder / part).glob("*.safetensors")):
            path.rename(path.with_name(path.name.replace(".safetensors", ".fp16.safetensors")))
    assert np.array_equal(make_picture(load(folder)), make_picture(load(tiny_model)))


def test_the_hubs_own_folder(folder: Path, tiny_model: Path, tmp_path: Path) -> None:
    """It also has other programs' weights. They do no harm, and a copy leaves them out."""
    weights = list(folder.glob("*/*.safetensors"))
    for path in weights:
        shutil.copy(path, path.with_name(path.name.replace(".safetensors", ".fp16.safetensors")))
        for name in ("openvino_model.bin", "openvino_model.xml", "model.onnx", "flax_model.msgpack"):
            (path.parent / name).write_bytes(b"x")
    (folder / "vae_decoder").mkdir()
    (folder / "vae_decoder/openvino_model.bin").write_bytes(b"x")
    (folder / "sd_xl_base_1.0.safetensors").write_bytes(b"x")
    (folder / "01.png").write_bytes(b"x")
    copy = tmp_path / "copy"
    command = [sys.executable, str(ROOT / "Download_model.py"), "--model", str(folder), "--output-dir", str(copy)]
    subprocess.run(command, check=True, capture_output=True)
    assert not list(copy.rglob("*openvino*"))
    for each in (folder, copy):
        assert np.array_equal(make_picture(load(each)), make_picture(load(tiny_model)))


@pytest.mark.parametrize(
    "name", ["model_index.json", "unet", "unet/diffusion_pytorch_model.safetensors", "tokenizer/tokenizer.json", ""]
)
def test_links_that_lead_nowhere(folder: Path, name: str) -> None:
    """As in a snapshot of the hub's cache that is mounted without its blobs."""
    (folder / name).rename(folder.parent / "moved")
    (folder / name).symlink_to("../../blobs/0123")
    message = refuse(folder)
    assert f"{folder / name} is a link to ../../blobs/0123, which is not there" in message
    assert message.endswith("mount the whole cache, or copy the model by cp --recursive --dereference")
    if name == "model_index.json":
        with pytest.raises(DownloadError, match="is a link to ../../blobs/0123"):
            open_folder(folder)


def test_link_of_a_file_that_is_not_read_does_no_harm(folder: Path) -> None:
    for name in ("unet/diffusion_pytorch_model.fp16.safetensors", "unet/openvino_model.xml", "model.safetensors"):
        (folder / name).symlink_to("../../blobs/0123")
    make_picture(load(folder))


@pytest.mark.parametrize("name", ["config.json", "diffusion_pytorch_model.safetensors"])
def test_link_in_a_vae_that_leads_nowhere(folder: Path, name: str, tmp_path: Path) -> None:
    vae = shutil.copytree(folder / "vae", tmp_path / "vae")
    (vae / name).unlink()
    (vae / name).symlink_to("../../blobs/0123")
    with pytest.raises(ConfigError, match=f"{name} is a link to ../../blobs/0123, which is not there"):
        load_vae(vae, torch.float32)


def test_adapter_that_is_a_link_without_its_file(tmp_path: Path) -> None:
    (tmp_path / "fox.safetensors").symlink_to("../../blobs/0123")
    with pytest.raises(ConfigError, match=r"fox.safetensors is a link to ../../blobs/0123, which is not there"):
        load_lora(tmp_path / "fox.safetensors", {})


def test_pointers_of_git_lfs(folder: Path) -> None:
    """A clone without LFS holds them."""
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5135149760\n")
    message = refuse(folder)
    assert message.startswith(f"{path} is a pointer of Git LFS")
    assert message.endswith(f"git -C {folder} lfs pull")


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2", "unet", "vae"])
@pytest.mark.parametrize("prefix", [None, "_orig_mod."])
def test_weights_that_are_missing(folder: Path, part: str, prefix: str | None) -> None:
    """Both libraries would fill them with random numbers."""
    (path,) = (folder / part).glob("*.safetensors")
    weights = load_file(path)
    lost = weights.pop(max(weights))
    save_file({f"{prefix or ''}{name}": each for name, each in weights.items()}, path, {"format": "pt"})
    assert lost.numel()
    others = ", and has others such as _orig_mod" if prefix else r"\. Its files are incomplete"
    assert re.search(rf"{part} lacks [\d]+ weights of its \w+, such as [\w.]+{others}", refuse(folder))


def save_quantised(path: Path, **more: torch.Tensor) -> None:
    weights = load_file(path)
    name = next(name for name, each in weights.items() if name.endswith("weight") and each.dim() > 1)
    weights[name] = weights[name].to(torch.float8_e4m3fn)
    more = {name.removesuffix("weight") + key: each for key, each in more.items()}
    save_file({**weights, **more}, path, {"format": "pt"})


def test_fp8(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is read, with a note. Its scales are not read from folders, and diffusers would leave them out."""
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    save_quantised(path)
    make_picture(load(folder))
    assert f"{path}: 1 of " in caplog.text
    assert "tensors are in fp8. Precision was lost" in caplog.text
    save_quantised(path, scale_weight=torch.tensor(2.0))
    assert refuse(folder).startswith(f"{path} is in scaled fp8")
    save_quantised(path, **{"weight.absmax": torch.ones(1)})
    assert "holds quantised weights (NF4 or FP4 of bitsandbytes)" in refuse(folder)


def test_a_damaged_file_that_is_not_loaded_does_no_harm(folder: Path, tiny_model: Path) -> None:
    (folder / "unet/diffusion_pytorch_model.fp16.safetensors").write_bytes(b"x")
    assert np.array_equal(make_picture(load(folder)), make_picture(load(tiny_model)))
    (folder / "unet/diffusion_pytorch_model.safetensors").write_bytes(b"x")
    assert "is damaged, or was not fetched whole" in refuse(folder)


def test_quantization_config(folder: Path) -> None:
    edit(folder / "unet/config.json", quantization_config={"quant_method": "bitsandbytes"})
    assert "unet/config.json has a quantization_config ({'quant_method': 'bitsandbytes'})" in refuse(folder)


def test_shard_that_is_missing(folder: Path) -> None:
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    path.rename(path.with_name("diffusion_pytorch_model-00001-of-00002.safetensors"))
    names = {"a": "diffusion_pytorch_model-00001-of-00002.safetensors", "b": "x-00002-of-00002.safetensors"}
    path.with_name(f"{path.name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    message = refuse(folder)
    assert "index.json names x-00002-of-00002.safetensors, which is not there: python Download_model.py" in message


@pytest.mark.parametrize(
    ("held", "told"),
    [
        ("StableDiffusionXLImg2ImgPipeline", "the refiner of Stable Diffusion XL"),
        ("StableDiffusionXLInstructPix2PixPipeline", "an instruct-pix2pix model"),
    ],
)
def test_a_pipeline_that_is_not_served_is_named(folder: Path, held: str, told: str) -> None:
    edit(folder / "model_index.json", _class_name=held)
    line = refuse(folder)
    assert told in line
    assert f"({held}); that is not served" in line


@pytest.mark.parametrize(
    ("held", "channels", "family"),
    [
        ("StableDiffusionXLInpaintPipeline", 9, "sdxl-inpainting"),
        ("StableDiffusionXLPipeline", 9, "sdxl-inpainting"),
        ("StableDiffusionXLInpaintPipeline", 4, "sdxl"),
        ("StableDiffusionInpaintPipeline", 9, "sd-inpainting"),
    ],
)
def test_channels_tell_an_inpainting_model(folder: Path, held: str, channels: int, family: str) -> None:
    edit(folder / "model_index.json", _class_name=held)
    edit(folder / "unet/config.json", in_channels=channels)
    assert find_family(folder, is_xl=None) is find_family(folder, is_xl="XL" in held) is FAMILIES[family]
    edit(folder / "unet/config.json", in_channels=8)
    assert "holds a UNet of 8 channels; those of 4, and of 9 for inpainting, are served" in refuse(folder)
