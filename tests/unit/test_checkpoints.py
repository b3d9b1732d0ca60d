"""Single-file checkpoints: recognised, refused by name, and converted into folders that draw the same image."""

import copy
import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import Download_model
from sdxl_server.convert import conversion, recognition
from sdxl_server.convert.digests import digest_file
from sdxl_server.model.folders import describe_original
from tests.hub import Hub

ROOT = Path(__file__).parents[2]
UNET = "model.diffusion_model."
INPUT = UNET + "input_blocks.0.0.weight"
CLIP, OPEN_CLIP = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
SIZES = {"sdxl": "tiny", "sd1": "tiny-sd", "sd2": "tiny-sd"}
LDM_V = b'model:\n  target: ldm.models.diffusion.ddpm.LatentDiffusion\n  params:\n    parameterization: "v"\n'
SCALING = "model: {params: {denoiser_config: {params: {scaling_config: {target: sgm.denoiser_scaling.%s}}}}}"
ZERO_SNR = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


def make_pipeline(layout: str, channels: int = 4) -> Any:
    """Return a tiny pipeline with CLIP's whole vocabulary. Its text encoders differ in width. Tests may change it."""
    return copy.deepcopy(_make_pipeline(layout, channels))


@functools.cache
def _make_pipeline(layout: str, channels: int) -> Any:
    from tools import random_model

    original = random_model.CONFIGURATIONS
    size = SIZES[layout]
    config = copy.deepcopy(original[size])
    for text in config["text"]:
        text["vocab_size"] = 49408
    if layout == "sdxl":
        config["text"][1] |= {"hidden_size": 48, "projection_dim": 48}
        config["unet"] |= {"cross_attention_dim": 80, "projection_class_embeddings_input_dim": 6 * 8 + 48}
    if layout == "sd2":
        config["text"][0]["hidden_act"] = "gelu"
    random_model.CONFIGURATIONS = {size: config}
    try:
        pipeline = random_model.make_pipeline(size)
    finally:
        random_model.CONFIGURATIONS = original
    if channels != 4:
        pipeline.register_modules(unet=type(pipeline.unet).from_config(pipeline.unet.config, in_channels=channels))
    return pipeline


def write_tiny_settings(pipeline: Any, layout: str, folder: Path) -> None:
    """Write this package's settings of a layout, changed to a pipeline's sizes."""
    settings = json.loads((recognition.SETTINGS_FOLDER / f"{layout}.json").read_text())
    for part in settings.keys() & {"unet", "vae", "text_encoder", "text_encoder_2"}:
        model = getattr(pipeline, part)
        settings[part] = json.loads((model.config if part.startswith("text") else model).to_json_string())
    folder.mkdir(exist_ok=True)
    (folder / f"{layout}.json").write_text(json.dumps(settings))


@pytest.fixture
def make_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Return a function that writes a tiny model into one file, `tiny.safetensors`, and has it recognised."""

    def make(layout: str, *, keys: tuple[str, ...] = (), channels: int = 4, name: str = "tiny.safetensors") -> Any:
        from tools.single_file import convert_pipeline, save_single_file

        pipeline = make_pipeline(layout, channels)
        write_tiny_settings(pipeline, layout, tmp_path / "settings")
        save_single_file(convert_pipeline(pipeline, keys=keys), tmp_path / name)
        monkeypatch.setattr(recognition, "SETTINGS_FOLDER", tmp_path / "settings")
        return pipeline

    monkeypatch.chdir(tmp_path)
    return make


def check_same_weights(folder: Path, pipeline: Any) -> Any:
    """Check that diffusers reads these weights from the folder, bit by bit, and return its pipeline."""
    import diffusers
    import torch

    loaded = diffusers.DiffusionPipeline.from_pretrained(folder, use_safetensors=True)
    for part in ("unet", "vae", "text_encoder", *(["text_encoder_2"] if hasattr(pipeline, "text_encoder_2") else [])):
        expected, actual = (getattr(each, part).state_dict() for each in (pipeline, loaded))
        assert expected.keys() == actual.keys()
        assert [name for name in expected if not torch.equal(expected[name], actual[name])] == []
    return loaded


def draw(pipeline: Any) -> Any:
    import torch

    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline("a cat", width=64, height=64, num_inference_steps=2, generator=generator, output_type="pt").images[
        0
    ]


@pytest.mark.parametrize(
    ("layout", "keys", "scheduler"),
    [
        ("sdxl", (), {"_class_name": "EulerDiscreteScheduler", "prediction_type": "epsilon"}),
        ("sdxl", ("v_pred",), {"prediction_type": "v_prediction", "rescale_betas_zero_snr": False}),
        ("sdxl", ("v_pred", "ztsnr"), ZERO_SNR),
        ("sd1", (), {"_class_name": "PNDMScheduler", "prediction_type": "epsilon"}),
        ("sd2", (), {"_class_name": "PNDMScheduler", "prediction_type": "epsilon"}),
    ],
)
def test_file_becomes_a_folder_that_draws_the_same(
    make_file: Callable[..., Any], tmp_path: Path, layout: str, keys: tuple[str, ...], scheduler: dict[str, Any]
) -> None:
    import torch

    pipeline = make_file(layout, keys=keys)
    assert Download_model.main(["--model", "tiny.safetensors", "--output-dir", "model", "--dtype", "fp32"]) == 0
    loaded = check_same_weights(tmp_path / "model", pipeline)
    assert scheduler.items() <= {**loaded.scheduler.config, "_class_name": type(loaded.scheduler).__name__}.items()
    pipeline.register_modules(scheduler=type(loaded.scheduler).from_config(loaded.scheduler.config))
    for name in ("tokenizer", *(["tokenizer_2"] if layout == "sdxl" else [])):
        pipeline.register_modules(**{name: getattr(loaded, name)})
    assert torch.equal(draw(loaded), draw(pipeline))


@pytest.mark.parametrize("layout", ["sdxl", "sd1"])
def test_inpainting_model_has_nine_channels(make_file: Callable[..., Any], tmp_path: Path, layout: str) -> None:
    pipeline = make_file(layout, channels=9)
    assert Download_model.main(["--model", "tiny.safetensors", "--output-dir", "model", "--dtype", "fp32"]) == 0
    loaded = check_same_weights(tmp_path / "model", pipeline)
    assert type(loaded).__name__.endswith("InpaintPipeline")


def test_user_names_the_prediction_type(make_file: Callable[..., Any], tmp_path: Path) -> None:
    make_file("sd2")
    arguments = ["--model", "tiny.safetensors", "--output-dir", "model", "--prediction-type", "v_prediction"]
    assert Download_model.main(arguments) == 0
    scheduler = json.loads((tmp_path / "model/scheduler/scheduler_config.json").read_text())
    assert scheduler["prediction_type"] == "v_prediction"
    assert json.loads((tmp_path / "model/unet/config.json").read_text())["sample_size"] == 96


WHOLE = {INPUT: (320, 4, 3, 3), f"{CLIP}a": (2, 2), f"{OPEN_CLIP}a": (2, 2)}
BY_YAML = "by the .yaml next to the file"


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (LDM_V, f"v_prediction ({BY_YAML})"),
        (b"model: {params: {parameterization: V}}", f"v_prediction ({BY_YAML})"),
        (b"model: {params: {parameterization: eps}}", f"epsilon ({BY_YAML})"),
        (b"model: {params: {parameterization: v, zero_terminal_snr: true}}", f"v_prediction_ztsnr ({BY_YAML})"),
        (b"model: {params: {parameterization: v, ztsnr: false}}", f"v_prediction ({BY_YAML})"),
        ((SCALING % "VScaling").encode("utf-16"), f"v_prediction ({BY_YAML})"),
        ((SCALING % "EpsScaling").encode(), f"epsilon ({BY_YAML})"),
        (b"model: {params: {scale_factor: 0.13}}", "v_prediction (by the file's modelspec.prediction_type)"),
        (b"- a list", "v_prediction (by the file's modelspec.prediction_type)"),
        (b"", "v_prediction (by the file's modelspec.prediction_type)"),
    ],
)
def test_yaml_next_to_a_file_names_the_prediction_type(tmp_path: Path, config: bytes, told: str) -> None:
    path = save_shapes(WHOLE, tmp_path / "a.b.safetensors", {"modelspec.prediction_type": "v"})
    (tmp_path / "a.b.yaml").write_bytes(config)
    (tmp_path / "a.yaml").write_bytes(b"[of another file")
    assert recognition.recognise_checkpoint(path).describe() == f"Stable Diffusion XL, {told}"


@pytest.mark.parametrize("name", ["model.yml", "model.YAML"])
def test_yaml_has_other_endings(tmp_path: Path, name: str) -> None:
    path = save_shapes(WHOLE, tmp_path / "model.safetensors")
    (tmp_path / name).write_bytes(LDM_V)
    assert recognition.recognise_checkpoint(path).prediction == "v_prediction"


def test_keys_and_the_user_come_before_the_yaml(tmp_path: Path) -> None:
    path = save_shapes({**WHOLE, "v_pred": (0,)}, tmp_path / "model.safetensors")
    (tmp_path / "model.yaml").write_bytes(b"model: {params: {parameterization: eps}}")
    assert recognition.recognise_checkpoint(path).reason == "by the file's key v_pred"
    named = recognition.recognise_checkpoint(path, prediction="epsilon")
    assert (named.prediction, named.reason) == ("epsilon", "as asked")


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (b"model: {params: [", "cannot be read as the configuration of the checkpoint next to it: 'while parsing"),
        (b"model: \xff", "cannot be read"),
        (b"!!python/object/apply:os.getcwd []", "cannot be read"),
        (b"[" * 5000, "cannot be read"),
        (b"a" * (1 << 20) + b"a", "has 1,048,577 bytes, and a checkpoint's configuration has at most 1,048,576"),
        (b"model: {params: {parameterization: x0}}", "names the prediction type 'x0', and v and eps are served"),
        (b"model: {params: {parameterization: [v]}}", "names the prediction type ['v']"),
        ((SCALING % "VScalingWithEDMcNoise").encode(), "VScalingWithEDMcNoise', and v and eps are served"),
    ],
)
def test_unusable_yaml_is_reported_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], config: bytes, told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = save_shapes(WHOLE, tmp_path / "file.safetensors")
    (tmp_path / "file.yaml").write_bytes(config)
    check_refused(capsys, told)
    assert recognition.recognise_checkpoint(path, prediction="v_prediction").reason == "as asked"


def test_a_yaml_that_comes_later_makes_another_folder(
    make_file: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_file("sdxl")
    arguments = ["--model", "tiny.safetensors", "--output-dir", "model"]
    assert Download_model.main(arguments) == 0
    (tmp_path / "tiny.yaml").write_bytes(LDM_V)
    assert Download_model.main(arguments) == 1
    assert "tiny.yaml" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "model")
    assert Download_model.main(arguments) == 0
    assert f"v_prediction ({BY_YAML})" in capsys.readouterr().out
    scheduler = json.loads((tmp_path / "model/scheduler/scheduler_config.json").read_text())
    assert scheduler["prediction_type"] == "v_prediction"


def test_source_is_recorded_and_a_second_run_does_nothing(
    make_file: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import safetensors.torch
    import torch

    make_file("sdxl")
    arguments = ["--model", "tiny.safetensors", "--output-dir", "model"]
    assert Download_model.main(arguments) == 0
    digest = digest_file(tmp_path / "tiny.safetensors")
    record = {"model": "tiny.safetensors", "revision": digest, "dtype": "fp16"}
    assert json.loads((tmp_path / "model/source.json").read_text()) == {**record, "sha256": digest}
    told = {"model_name": "tiny", "model_sha256": digest, "model_autov2": digest[:10]}
    assert describe_original(tmp_path / "model") == told
    weights = safetensors.torch.load_file(tmp_path / "model/text_encoder/model.safetensors")
    assert {each.dtype for each in weights.values()} == {torch.float16}
    assert all(name.startswith("text_model.") for name in weights)
    assert "unet: 0.00 GB" in capsys.readouterr().out
    assert Download_model.main(arguments) == 0
    assert "nothing to do" in capsys.readouterr().out
    make_file("sdxl", keys=("v_pred",))
    assert Download_model.main(arguments) == 1
    assert f"model holds tiny.safetensors {digest} fp16, not" in capsys.readouterr().err
    assert not list((tmp_path / "model").glob(".*"))


def test_interrupted_conversion_continues(
    make_file: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = make_file("sdxl")
    save = conversion.save_component

    def stop(module: Any, folder: Path) -> None:
        if folder.name == "vae":
            (folder.parent / ".vae.incomplete").mkdir()
            raise KeyboardInterrupt
        save(module, folder)

    arguments = ["--model", "tiny.safetensors", "--output-dir", "model", "--dtype", "fp32"]
    monkeypatch.setattr(conversion, "save_component", stop)
    assert Download_model.main(arguments) == 130
    assert not (tmp_path / "model/model_index.json").exists()
    made = (tmp_path / "model/unet/config.json").stat().st_mtime_ns
    monkeypatch.setattr(conversion, "save_component", save)
    assert Download_model.main(arguments) == 0
    assert (tmp_path / "model/unet/config.json").stat().st_mtime_ns == made
    check_same_weights(tmp_path / "model", pipeline)
    assert not list((tmp_path / "model").glob(".*"))


def test_full_disk_is_refused_before_anything_is_made(
    make_file: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_file("sdxl")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: os.terminal_size((0, 0)) and type("U", (), {"free": 1000}))
    assert Download_model.main(["--model", "tiny.safetensors", "--output-dir", "model"]) == 1
    assert "GB needed, 0.00 GB free" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


def test_files_on_the_hub(make_file: Callable[..., Any], tmp_path: Path) -> None:
    """One is named by its page and has a configuration next to it. The other one's folder has none."""
    pipeline = make_file("sdxl")
    content = (tmp_path / "tiny.safetensors").read_bytes()
    name, other, revision = "sub/tiny.safetensors", "other/tiny.safetensors", "a" * 40
    program = (
        "import pathlib, sys; from sdxl_server.convert import conversion, recognition; import Download_model\n"
        "recognition.SETTINGS_FOLDER = pathlib.Path('settings')\n"
        "for number, model in enumerate(sys.argv[1:]):\n"
        "    ended = Download_model.main(['--model', model, '--dtype', 'fp32', '--output-dir', f'model{number}'])\n"
        "    assert ended == 0\n"
    )
    models = f"https://huggingface.co/somebody/model/blob/{revision}/{name}", f"somebody/model/{other}"
    files = {name: content, other: content, "sub/tiny.yml": LDM_V, "tiny.yaml": b"other", "README.md": b""}
    with Hub("somebody/model", revision, files) as hub:
        result = subprocess.run(
            [sys.executable, "-c", program, *models],
            cwd=tmp_path,
            env={**os.environ, "HF_ENDPOINT": hub.url, "NO_PROXY": "127.0.0.1", "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        assert hub.get_fetched() == ["sub/tiny.yml", name, other]
    told = [line for line in result.stdout.splitlines() if "Stable Diffusion XL" in line]
    assert ["v_prediction (by the .yml next to the file)" in line for line in told] == [True, False]
    for number, each in enumerate((name, other)):
        check_same_weights(tmp_path / f"model{number}", pipeline)
        record = json.loads((tmp_path / f"model{number}/source.json").read_text())
        assert (record["model"], record["revision"]) == (f"somebody/model/{each}", revision)
        assert record["sha256"] == hashlib.sha256(content).hexdigest()
        assert not list((tmp_path / f"model{number}").glob("single_file*"))


@pytest.mark.parametrize("kind", ["file", "file of diffusers", "folder", "pipeline"])
def test_another_vae_takes_the_place(make_file: Callable[..., Any], tmp_path: Path, kind: str) -> None:
    from safetensors.torch import save_file

    from tools.single_file import convert_vae, save_single_file

    pipeline = make_file("sdxl")
    for weight in pipeline.vae.parameters():
        weight.data += 0.25
    other = tmp_path / ("vae.safetensors" if kind.startswith("file") else "other")
    if kind == "file":
        save_single_file(convert_vae(pipeline.vae), other)
    elif kind == "file of diffusers":
        save_file(pipeline.vae.state_dict(), other)
    else:
        pipeline.vae.save_pretrained(other / "vae" if kind == "pipeline" else other)
    arguments = ["--model", "tiny.safetensors", "--output-dir", "model", "--dtype", "fp32", "--vae", str(other)]
    assert Download_model.main(arguments) == 0
    check_same_weights(tmp_path / "model", pipeline)
    assert json.loads((tmp_path / "model/source.json").read_text())["vae"].startswith(f"{other.name} ")


def rewrite_file(change: Callable[[dict[str, Any]], dict[str, Any]], path: str = "tiny.safetensors") -> None:
    """Change the tensors of a file."""
    from safetensors.torch import load_file, save_file

    save_file({name: each.contiguous() for name, each in change(load_file(path)).items()}, path)


def test_names_of_wrappers_are_removed(make_file: Callable[..., Any], tmp_path: Path) -> None:
    def wrap(tensors: dict[str, Any]) -> dict[str, Any]:
        wrapped = {
            UNET: f"{UNET}_orig_mod.",
            CLIP: f"module.{CLIP}",
            "encoder.": "encoder._orig_mod.",
            "resblocks.0.": "resblocks.0._checkpoint_wrapped_module.",
        }
        for new, old in wrapped.items():
            tensors = {name.replace(new, old, 1): each for name, each in tensors.items()}
        return tensors

    pipeline = make_file("sdxl")
    rewrite_file(wrap)
    assert Download_model.main(["--model", "tiny.safetensors", "--output-dir", "model", "--dtype", "fp32"]) == 0
    check_same_weights(tmp_path / "model", pipeline)


@pytest.mark.parametrize(("spread", "prediction"), [(0.05, "epsilon"), (0.2, "v_prediction")])
def test_a_compiled_model_of_version_2_is_recognised_by_its_weight(
    tmp_path: Path, spread: float, prediction: str
) -> None:
    import torch
    from safetensors.torch import save_file

    unet = f"{UNET}_orig_mod."
    bias = torch.tensor([spread, -spread]).to(torch.float8_e5m2)
    held = {f"{unet}input_blocks.0.0.weight": torch.zeros(320, 4, 3, 3), "cond_stage_model.model.a": torch.zeros(2)}
    held[f"{unet}output_blocks.11.1.transformer_blocks.0.norm1.bias"] = bias
    save_file(held, tmp_path / "model.safetensors")
    found = recognition.recognise_checkpoint(tmp_path / "model.safetensors")
    assert (found.layout, found.prediction) == ("sd2", prediction)


def test_two_tensors_of_one_name_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save_shapes({"a.b": SMALL, "a._orig_mod.b": SMALL}, tmp_path / "file.safetensors")
    check_refused(capsys, "holds two tensors for one name: a.")


@pytest.mark.parametrize("kind", ["plain", "ComfyUI's old", "ComfyUI's", "for each output"])
def test_fp8_is_read_with_its_scales(
    make_file: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    import torch

    fp8 = torch.float8_e5m2 if kind == "plain" else torch.float8_e4m3fn
    scale_name = "scale_weight" if kind == "ComfyUI's old" else "weight_scale"
    extras = {
        "ComfyUI's old": {"scale_input": torch.ones(()), "scaled_fp8": torch.zeros(2, dtype=fp8)},
        "ComfyUI's": {"input_scale": torch.ones(()), "comfy_quant": torch.tensor([123, 125], dtype=torch.uint8)},
    }.get(kind, {})

    def quantise(weight: Any) -> tuple[Any, Any]:
        largest = weight.flatten(1).abs().amax(1) if kind == "for each output" else weight.abs().max()
        scale = torch.ones(()) if kind == "plain" else largest.clamp(min=1e-6) / 448
        return (weight / scale.reshape(-1, *[1] * (weight.ndim - 1))).to(fp8), scale

    def is_quantised(name: str, weight: Any) -> bool:
        return name.endswith(".weight") and weight.ndim > 1

    def convert(tensors: dict[str, Any]) -> dict[str, Any]:
        converted = dict(tensors)
        for name, weight in tensors.items():
            if name.startswith((UNET, CLIP)) and is_quantised(name, weight):
                converted[name], scale = quantise(weight)
                layer = name.removesuffix("weight")
                converted |= {f"{layer}{mark}": each.clone() for mark, each in extras.items()}
                if kind != "plain":
                    converted[layer + scale_name] = scale
        return converted

    pipeline = make_file("sdxl")
    for part in (pipeline.unet, pipeline.text_encoder):
        for name, weight in part.named_parameters():
            if is_quantised(name, weight):
                held, scale = quantise(weight.data)
                weight.data = held.float() * scale.reshape(-1, *[1] * (weight.ndim - 1))
    rewrite_file(convert)
    assert Download_model.main(["--model", "tiny.safetensors", "--output-dir", "model", "--dtype", "fp32"]) == 0
    out = capsys.readouterr().out
    assert f"tensors are in {'fp8' if kind == 'plain' else 'scaled fp8'}. Precision was lost" in out
    check_same_weights(tmp_path / "model", pipeline)


LAYER = f"{UNET}input_blocks.4.1.proj_in."


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        ({"weight": "uint8", "weight.absmax": "float32", "weight.quant_map": "float32"}, "NF4 or FP4 of bitsandbytes"),
        ({"weight": "uint8", "weight.quant_state.bitsandbytes__nf4": "uint8"}, "NF4 or FP4 of bitsandbytes"),
        ({"weight": "int8", "SCB": "float32"}, "int8 of bitsandbytes"),
        ({"weight": "int8", "weight_scale": "float32"}, "int8"),
        ({"weight": "int8"}, "int8"),
        ({"weight": "uint8", "weight_scale": "float8_e4m3fn", "weight_scale_2": "float32"}, "NVFP4"),
        ({"qweight": "int32", "qzeros": "int32"}, "GPTQ or AWQ"),
        ({"qweight": "int8", "wscales": "float32"}, "SVDQuant of Nunchaku"),
        ({"weight._data": "int8", "weight._scale": "float32"}, "Quanto"),
        ({"weight": "float8_e4m3fn", "weight_scale": "float32"}, "8 bits with a scale for each block"),
        ({"weight": "float8_e4m3fn", "weight_scale_inv": "float32"}, "8 bits with a scale for each block"),
    ],
)
def test_quantised_weights_are_refused_by_name(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tensors: dict[str, str],
    told: str,
) -> None:
    import torch
    from safetensors.torch import save_file

    monkeypatch.chdir(tmp_path)
    held = {f"{LAYER}{name}": torch.zeros(4, 2).to(getattr(torch, dtype)) for name, dtype in tensors.items()}
    save_file({**held, **{name: torch.zeros(shape) for name, shape in WHOLE.items()}}, "file.safetensors")
    check_refused(capsys, f"holds quantised weights ({told}), which are not served: use the model's file in fp16")


def test_float64_is_no_quantised_type(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    path = tmp_path / "file.safetensors"
    save_file({name: torch.zeros(shape).double() for name, shape in WHOLE.items()}, path)
    assert recognition.recognise_checkpoint(path).note == ""


SMALL = (2, 2)
REFUSED: dict[str, tuple[dict[str, tuple[int, ...]], str]] = {
    "kohya": ({"lora_unet_down_blocks_1_attentions_0_proj_in.lora_down.weight": SMALL}, "a LoRA or another adapter"),
    "peft": ({"base_model.model.unet.proj_in.lora_A.weight": SMALL}, "a LoRA or another adapter"),
    "diffusers": ({"unet.mid_block.attentions.0.proj_in.lora.down.weight": SMALL}, "a LoRA or another adapter"),
    "loha": ({"lora_te1_text_model_encoder_layers_0.hada_w1_a": SMALL}, "a LoRA or another adapter"),
    "controlnet": ({"control_model.time_embed.0.weight": SMALL}, "a ControlNet"),
    "ip": ({"image_proj.proj.weight": SMALL}, "an IP-Adapter"),
    "embedding": ({"clip_g": SMALL, "clip_l": SMALL}, "a textual inversion"),
    "diffusers unet": ({"down_blocks.0.resnets.0.conv1.weight": SMALL}, "a UNet alone, in diffusers' naming"),
    "unet": ({INPUT: (320, 4, 3, 3)}, "a UNet alone"),
    "taesd": ({"decoder.layers.1.weight": SMALL}, "a tiny VAE"),
    "vae": ({"decoder.conv_in.weight": SMALL}, "a VAE alone"),
    "vae of a model": ({"first_stage_model.encoder.conv_in.weight": SMALL}, "a VAE alone"),
    "text": ({"text_model.encoder.layers.0.mlp.fc1.weight": SMALL}, "a text encoder alone"),
    "flux": ({f"{UNET}double_blocks.0.img_attn.norm.key_norm.scale": SMALL}, "another kind of model (flux-schnell)"),
    "sd3.5": ({"joint_blocks.37.x_block.mlp.fc1.weight": SMALL}, "another kind of model (sd35_large)"),
    "refiner": ({INPUT: (384, 4, 3, 3), "conditioner.embedders.0.model.ln_final.bias": SMALL}, "the refiner of"),
    "pix2pix": ({INPUT: (320, 8, 3, 3), f"{CLIP}a": SMALL, f"{OPEN_CLIP}a": SMALL}, "instruct-pix2pix"),
    "depth": ({INPUT: (320, 5, 3, 3), "cond_stage_model.model.a": SMALL}, "depth-to-image"),
    "playground": (
        {INPUT: (320, 4, 3, 3), f"{CLIP}a": SMALL, f"{OPEN_CLIP}a": SMALL, "edm_mean": (4,)},
        "Playground v2.5",
    ),
    "cosxl": ({INPUT: (320, 4, 3, 3), f"{CLIP}a": SMALL, f"{OPEN_CLIP}a": SMALL, "edm_vpred.sigma_max": ()}, "CosXL"),
    "ia3": ({"lora_unet_down_blocks_1_attentions_0_proj_in.on_input": SMALL}, "a LoRA or another adapter"),
    "unknown": ({"a.b": SMALL}, "1 tensors of unknown kind, such as a.b"),
    "empty": ({}, "0 tensors of unknown kind"),
    "no vae": ({INPUT: (320, 4, 3, 3), f"{CLIP}a": SMALL, f"{OPEN_CLIP}a": SMALL}, "no VAE: name one by --vae"),
    "distilled": (
        {
            INPUT: (320, 4, 3, 3),
            f"{CLIP}a": SMALL,
            f"{OPEN_CLIP}a": SMALL,
            "first_stage_model.decoder.conv_in.bias": SMALL,
        },
        "a unet of 11,520 weights, and that of Stable Diffusion XL, epsilon (nothing in the file says otherwise) has "
        "2,567,463,684",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_contents_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    shapes, words = REFUSED[case]
    monkeypatch.chdir(tmp_path)
    save_shapes(shapes, tmp_path / "file.safetensors")
    check_refused(capsys, words)


def save_shapes(shapes: dict[str, tuple[int, ...]], path: Path, metadata: dict[str, str] | None = None) -> Path:
    """Write a file with tensors of these shapes."""
    import torch
    from safetensors.torch import save_file

    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, path, metadata)
    return path


def check_refused(capsys: pytest.CaptureFixture[str], words: str, model: str = "file.safetensors") -> None:
    """Check that a file is refused in one line and that nothing was made of it."""
    assert Download_model.main(["--model", model, "--output-dir", "model"]) == 1
    error = capsys.readouterr().err
    assert words in error
    assert error.startswith("Download_model.py: ")
    assert error.count("\n") == 1
    assert not Path("model").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"PK\x03\x04" + bytes(100), "is a pickle of PyTorch's, which can run code"),
        (b"\x80\x02}q\x00." + bytes(100), "is a pickle, which can run code"),
        (b"GGUF" + bytes(100), "weights in GGUF"),
        (b"\n<!DOCTYPE html><html>" + bytes(100), "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"", "is damaged, or was not fetched whole"),
        (
            b'\x40\x00\x00\x00\x00\x00\x00\x00{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}      ',
            "not fetched whole",
        ),
    ],
)
def test_other_formats_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], content: bytes, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file.safetensors").write_bytes(content)
    check_refused(capsys, words)


@pytest.mark.parametrize("model", ["model.ckpt", "somebody/model/model.ckpt", "https://hf.co/a/b/resolve/main/m.pt"])
def test_pickle_is_refused_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("model.ckpt").write_bytes(b"")
    check_refused(capsys, "weights_only=True", model)


def test_file_that_lacks_tensors_is_refused(
    make_file: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lost = f"{CLIP}text_model.encoder.layers.1.mlp.fc1.bias"
    make_file("sdxl")
    rewrite_file(lambda tensors: {name: each for name, each in tensors.items() if name != lost})
    assert Download_model.main(["--model", "tiny.safetensors", "--output-dir", "model"]) == 1
    assert "lacks 1 tensors of its text_encoder, such as encoder.layers.1.mlp.fc1.bias" in capsys.readouterr().err
    assert not (tmp_path / "model/model_index.json").exists()


@pytest.mark.parametrize(
    ("layout", "counts"),
    [
        ("sdxl", {"unet": 2567463684, "vae": 83653863, "text_encoder": 123060480, "text_encoder_2": 694659840}),
        ("sd1", {"unet": 859520964, "vae": 83653863, "text_encoder": 123060480}),
        ("sd2", {"unet": 865910724, "vae": 83653863, "text_encoder": 340387840}),
    ],
)
def test_shipped_settings_are_those_of_the_published_models(layout: str, counts: dict[str, int]) -> None:
    settings = json.loads((recognition.SETTINGS_FOLDER / f"{layout}.json").read_text())
    assert {part: conversion.count_weights(part, settings[part]) for part in counts} == counts


def test_tokenizer_is_clips(tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    settings = json.loads((recognition.SETTINGS_FOLDER / "sdxl.json").read_text())
    with conversion.write_temporary_settings(settings) as folder:
        first, second = (CLIPTokenizer.from_pretrained(folder / name) for name in ("tokenizer", "tokenizer_2"))
    assert len(first) == 49408
    assert first("A photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert (first.pad_token_id, second.pad_token_id, first.model_max_length) == (49407, 0, 77)
