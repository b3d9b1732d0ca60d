"""Folders and settings that cannot be loaded."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdxl_server.errors import ConfigError
from sdxl_server.model.loaded_pipeline import LoadedPipeline
from tests.unit.pipelines import load, make_picture


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"scheduler": "Eule"}, ["handler.scheduler", "such as Euler", "'Eule'"]),
        ({"scheduler": {"name": "Euler", "solver_order": 2}}, ["handler.scheduler takes for Euler", "'solver_order'"]),
        (
            {"scheduler": {"name": "UniPC", "solver_type": "bh1"}},
            ["handler.scheduler", "takes for solver_type one of bh2"],
        ),
        ({"max_side": 64}, ["handler.width", "width takes a whole number from 64 to 64", "not 128"]),
        ({"allowed_sizes": ["64x64"]}, ["handler.width", "take one of 64x64 here, not 128x128"]),
        ({"is_xl": False}, ["handler.is_xl: false", "StableDiffusionPipeline", "StableDiffusionXLPipeline"]),
    ],
)
def test_settings_that_do_not_fit_the_model(tiny_model: Path, settings: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tiny_model, **settings)
    for part in parts:
        assert part in str(caught.value)


def test_missing_model_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"handler.model_path.*Download_model.py"):
        load(tmp_path / "nothing")


NEVER_LOADED = [
    *(".cache/huggingface/.gitignore", ".cache/huggingface/download/unet/config.json.metadata"),
    *(".cache/huggingface/download/unet/x.safetensors.lock", ".git/config", ".git/hooks/post-checkout"),
    *(".gitattributes", ".DS_Store", "unet/.DS_Store", "Thumbs.db", "vae/Thumbs.db", "desktop.ini", "unet/desktop.ini"),
    *("LICENSE.TXT", "unet/LICENSE", "README", "preview.gif", "assets/teaser.mp4", "unet/preview.svg"),
    *("__MACOSX/unet/._config.json", "unet/._config.json", "unet/._diffusion_pytorch_model.safetensors"),
    *("unet/._diffusion_pytorch_model.safetensors.index.json", "tokenizer/._tokenizer.json"),
    *("unet/.ipynb_checkpoints/config-checkpoint.json", "unet/config.json:Zone.Identifier", "unet/.nfs000"),
    *("unet/diffusion_pytorch_model.bin", "text_encoder/pytorch_model.bin"),
    *("text_encoder/pytorch_model.bin.index.json",),
    *("unet/model.onnx", "unet/openvino_model.xml", "text_encoder/flax_model.msgpack", "text_encoder/tf_model.h5"),
    *("unet/diffusion_pytorch_model.non_ema.safetensors", "sd_xl_base_1.0.safetensors", "model.ckpt", "model.gguf"),
    *("convert.py", "unet/model.py", "pipeline.py", "scheduler/my_scheduler.py", "vae_1_0/diffusion_pytorch_model.bin"),
    *("safety_checker/pytorch_model.bin", "feature_extractor/preprocessor_config.json", "unet/onnx/weights.pb"),
]


@pytest.mark.parametrize("variant", [False, True])
def test_files_that_are_never_loaded_do_no_harm(
    tiny_model: Path, tmp_path: Path, eager: LoadedPipeline, variant: bool
) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    if variant:
        for path in list(folder.glob("*/*.safetensors")):
            path.rename(path.with_suffix(".fp16.safetensors"))
    for name in NEVER_LOADED:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"\x80\x04never loaded")
    assert np.array_equal(make_picture(load(folder)), make_picture(eager))


def test_snapshot_of_the_hubs_cache(tiny_model: Path, tmp_path: Path, eager: LoadedPipeline) -> None:
    """Its files are links to blobs without suffixes."""
    root = tmp_path / "models--owner--name"
    blobs, snapshot = root / "blobs", root / "snapshots/0a1b"
    blobs.mkdir(parents=True)
    for number, path in enumerate(path for path in sorted(tiny_model.rglob("*")) if path.is_file()):
        shutil.copy(path, blobs / str(number))
        link = snapshot / path.relative_to(tiny_model)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blobs / str(number), link.parent))
    assert np.array_equal(make_picture(load(snapshot)), make_picture(eager))
    inner = "snapshots/0a1b"
    assert refuse(root).endswith(f"the pipeline is in {inner}. Set model_path to models--owner--name/{inner}")


def refuse(folder: Path, **settings: Any) -> str:
    """Return the message that refuses the folder, in one line."""
    with pytest.raises(ConfigError) as caught:
        load(folder, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("path", "pickle"),
    [
        ("unet/diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"),
        ("unet/diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.BIN"),
        ("text_encoder/model.safetensors", "pytorch_model.bin"),
        ("vae/diffusion_pytorch_model.safetensors", "vae.ckpt"),
    ],
)
def test_pickles_instead_of_safetensors_are_refused(tiny_model: Path, tmp_path: Path, path: str, pickle: str) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    (folder / path).rename((folder / path).with_name(pickle))
    message = refuse(folder)
    assert message.startswith(f"{(folder / path).with_name(pickle)} is a pickle, which can run code when it is read")
    assert "convert it with torch.load(..., weights_only=True)" in message


def test_shards_that_are_pickles_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    """diffusers and transformers read all that is named here, by its suffix."""
    for name, index in (
        ("unet", "diffusion_pytorch_model.safetensors.index.json"),
        ("text_encoder", "model.safetensors.index.json"),
    ):
        folder = shutil.copytree(tiny_model, tmp_path / name)
        (path,) = (folder / name).glob("*.safetensors")
        path.rename(folder / name / "shard.bin")
        content = {"metadata": {}, "weight_map": {"a": "shard.bin"}}
        (folder / name / index).write_text(json.dumps(content))
        assert f"{index}: {folder / name / 'shard.bin'} is read as a pickle" in refuse(folder)
    folder = shutil.copytree(tiny_model, tmp_path / "config")
    config = json.loads((folder / "text_encoder/config.json").read_text())
    (folder / "text_encoder/adapter_model.bin").touch()
    (folder / "text_encoder/config.json").write_text(json.dumps(config | {"transformers_weights": "adapter_model.bin"}))
    assert "config.json: " in (message := refuse(folder))
    assert "adapter_model.bin is read as a pickle" in message


def test_index_of_another_variant_is_not_read(tiny_model: Path, tmp_path: Path, eager: LoadedPipeline) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    content = json.dumps({"metadata": {}, "weight_map": {"a": "not_there.fp16.safetensors"}})
    (folder / "unet/diffusion_pytorch_model.safetensors.index.fp16.json").write_text(content)
    assert np.array_equal(make_picture(load(folder)), make_picture(eager))


@pytest.mark.parametrize(("name", "module"), [("unet", "my_unet"), ("tokenizer", "os"), ("scheduler", "unet.my_unet")])
def test_code_of_a_model_is_never_run(tiny_model: Path, tmp_path: Path, name: str, module: str) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    mark = tmp_path / "has run"
    for path in (folder / name / "my_unet.py", folder / "None.py"):
        path.write_text(f"open({str(mark)!r}, 'w')\nclass Model: pass")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {name: [module, "Model"]}))
    message = refuse(folder)
    assert f"names a class of the Python module {module!r} for {name}" in message
    assert "code is not run" in message
    assert not mark.exists()


def test_own_adapter_of_a_text_encoder_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    """transformers would add it silently."""
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    (folder / "text_encoder/adapter_config.json").write_text("{}")
    assert "adapter_config.json would add an adapter to text_encoder" in refuse(folder)


def test_missing_component_is_named(tiny_model: Path, tmp_path: Path) -> None:
    """diffusers would look for its weights next to model_index.json."""
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    shutil.rmtree(folder / "unet")
    (folder / "diffusion_pytorch_model.safetensors").touch()
    assert refuse(folder).startswith(f"{folder}/unet is missing. Make the whole folder by: python Download_model.py")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model_index.json", "[" * 100_000),
        ("model_index.json", json.dumps({"_class_name": ["StableDiffusionXLPipeline"]})),
        ("model_index.json", json.dumps({"_class_name": "StableDiffusionXLPipeline"})),
        ("model_index.json", json.dumps({"_class_name": "StableDiffusionXLPipeline", "unet": 5})),
        ("scheduler/scheduler_config.json", "[]"),
        ("unet/config.json", "{}"),
        ("unet/config.json", json.dumps({"sample_size": None})),
        ("unet/config.json", "\0"),
        ("vae/config.json", json.dumps({"block_out_channels": "x"})),
        ("text_encoder/config.json", json.dumps({"num_hidden_layers": -1})),
        ("tokenizer/tokenizer.json", "{}"),
    ],
)
def test_odd_files_of_a_pipeline_are_told(tiny_model: Path, tmp_path: Path, name: str, content: str) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    (folder / name).write_text(content)
    with pytest.raises(ConfigError, match=r"^(cannot read the pipeline in|handler.model_path takes)"):
        load(folder)


def test_truncated_weights_are_told(tiny_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ConfigError, match=r"is damaged, or was not fetched whole.*python Download_model.py"):
        load(folder)
