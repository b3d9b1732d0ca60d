"""Download_model.py as its user runs it, with the real client library, against a hub on loopback."""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

import Download_model
from tests.hub import Hub

ROOT = Path(__file__).parents[2]
WRITTEN_AT_ONCE = 10 << 20  # the client library writes the body in pieces of this many bytes
UNET = "unet/diffusion_pytorch_model.safetensors"
UNET_FP16 = "unet/diffusion_pytorch_model.fp16.safetensors"
INDEX = {
    "_class_name": "StableDiffusionXLPipeline",
    "_diffusers_version": "0.19.0",
    "force_zeros_for_empty_prompt": True,
    "image_encoder": [None, None],
    "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
}
NEEDED = {
    "model_index.json": json.dumps(INDEX).encode(),
    "scheduler/scheduler_config.json": b"{}",
    "text_encoder/config.json": b"{}",
    "tokenizer/merges.txt": b"a b",
    "tokenizer/tokenizer.model": b"sentencepiece",
    "tokenizer/vocab.json": b"{}",
    "unet/config.json": b"{}",
}
WEIGHTS = {
    "text_encoder/model.fp16.safetensors": b"text, half",
    "text_encoder/model.safetensors": b"text, single",
    UNET_FP16: b"unet, half",
    UNET: b"unet, single",
}
UNNEEDED = [
    "README.md",
    "01.png",
    "sd_xl_base_1.0.safetensors",
    "pipeline.py",
    "text_encoder/flax_model.msgpack",
    "text_encoder/model.onnx",
    "text_encoder/openvino_model.xml",
    "text_encoder/pytorch_model.bin",
    "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_pytorch_model.non_ema.safetensors",
    "unet/diffusion_pytorch_model.bin.index.json",
    "unet/model.py",
    "vae_1_0/config.json",
    "vae_1_0/diffusion_pytorch_model.fp16.safetensors",
]
FILES = {**NEEDED, **WEIGHTS, **dict.fromkeys(UNNEEDED, b"not needed")}
Download = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub(Download_model.DEFAULT_MODEL, Download_model.DEFAULT_REVISION, dict(FILES)) as hub:
        yield hub


@pytest.fixture
def environment(hub: Hub, tmp_path: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return {**kept, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1"}


@pytest.fixture
def download(environment: dict[str, str], tmp_path: Path) -> Download:
    """Return what runs the program in an empty folder; more environment as keywords."""

    def run(*arguments: str, **more: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, str(ROOT / "Download_model.py"), *arguments]
        return subprocess.run(
            command, cwd=tmp_path, env=environment | more, capture_output=True, text=True, timeout=60, check=False
        )

    return run


def read_folder(folder: Path) -> dict[str, bytes]:
    """Return every file under the folder but source.json, by name."""
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    files.pop("source.json", None)
    return files


def check_refused(result: "subprocess.CompletedProcess[str]", *parts: str) -> None:
    """Check that the program ended with one line that has these parts."""
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert [part for part in parts if part not in result.stderr] == [], result.stderr


def test_import_does_no_work() -> None:
    check = "import Download_model, sys; sys.exit(bool({'torch', 'huggingface_hub', 'diffusers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=False).returncode == 0


def test_default_is_the_pinned_model_in_half_precision(hub: Hub, download: Download, tmp_path: Path) -> None:
    result = download()
    assert result.returncode == 0, result.stderr
    listing = "/api/models/stabilityai/stable-diffusion-xl-base-1.0/revision/462165984030d82259a11f4367a4eed129e94a7b"
    assert listing in dict(hub.requests)
    fetched = hub.get_fetched()
    assert set(fetched) == {*NEEDED, *(name for name in WEIGHTS if ".fp16" in name)}
    assert fetched[-1] == "model_index.json"
    half = {"text_encoder/model.safetensors": b"text, half", UNET: b"unet, half"}
    assert read_folder(tmp_path / "Base_Diffusion_model") == {**NEEDED, **half}


def test_single_precision(hub: Hub, download: Download, tmp_path: Path) -> None:
    result = download("--dtype", "fp32", "--output-dir", "parent/model")
    assert result.returncode == 0, result.stderr
    single = {name: content for name, content in WEIGHTS.items() if ".fp16" not in name}
    assert read_folder(tmp_path / "parent/model") == {**NEEDED, **single}
    assert not any(".fp16" in path for path, _ in hub.requests)


def test_plain_weights_where_there_is_no_variant(hub: Hub, download: Download, tmp_path: Path) -> None:
    del hub.files[UNET_FP16]
    result = download()
    assert "no fp16 variant of unet:" in result.stdout
    assert (tmp_path / "Base_Diffusion_model" / UNET).read_bytes() == b"unet, single"
    assert (tmp_path / "Base_Diffusion_model/text_encoder/model.safetensors").read_bytes() == b"text, half"


def test_killed_download_continues(hub: Hub, download: Download, environment: dict[str, str], tmp_path: Path) -> None:
    hub.files[UNET_FP16] = random.Random(0).randbytes(2 * WRITTEN_AT_ONCE + 1000)
    hub.stop_at, hub.hang = (UNET_FP16, WRITTEN_AT_ONCE + 1000), True
    folder = tmp_path / "Base_Diffusion_model"
    partial = folder / f"{UNET}.incomplete"
    with subprocess.Popen([sys.executable, str(ROOT / "Download_model.py")], cwd=tmp_path, env=environment) as process:
        deadline = time.monotonic() + 30
        while not (partial.exists() and partial.stat().st_size >= WRITTEN_AT_ONCE) and time.monotonic() < deadline:
            time.sleep(0.02)
        process.kill()
    assert partial.stat().st_size == WRITTEN_AT_ONCE
    assert not (folder / "model_index.json").exists()

    hub.requests.clear()
    result = download()
    assert result.returncode == 0, result.stderr
    assert (f"/storage/{UNET_FP16}", f"bytes={WRITTEN_AT_ONCE}-") in hub.requests
    assert "text_encoder/model.fp16.safetensors" not in hub.get_fetched()
    assert "0.01 GB to download" in result.stdout
    assert (folder / UNET).read_bytes() == hub.files[UNET_FP16]
    assert not list(folder.rglob("*.incomplete"))


def test_broken_connection_is_taken_up_again(hub: Hub, download: Download, tmp_path: Path) -> None:
    hub.files[UNET_FP16] = random.Random(0).randbytes(2 * WRITTEN_AT_ONCE)
    hub.stop_at = (UNET_FP16, WRITTEN_AT_ONCE + 1000)
    result = download()
    assert result.returncode == 0, result.stderr
    assert [asked for path, asked in hub.requests if path == f"/storage/{UNET_FP16}"] == [
        None,
        f"bytes={WRITTEN_AT_ONCE}-",
    ]
    assert (tmp_path / "Base_Diffusion_model" / UNET).read_bytes() == hub.files[UNET_FP16]


def test_damaged_rest_is_noticed(hub: Hub, download: Download, tmp_path: Path) -> None:
    assert download().returncode == 0
    unet = tmp_path / "Base_Diffusion_model" / UNET
    unet.rename(f"{unet}.incomplete")
    Path(f"{unet}.incomplete").write_bytes(b"XXXX")
    check_refused(download(), UNET_FP16, "damaged")
    assert download().returncode == 0
    assert unet.read_bytes() == b"unet, half"


def test_second_run_fetches_nothing(hub: Hub, download: Download) -> None:
    download()
    hub.requests.clear()
    result = download()
    assert result.returncode == 0, result.stderr
    assert "nothing to download" in result.stdout
    assert hub.get_fetched() == ["model_index.json"]


@pytest.mark.parametrize("other", [("--dtype", "fp32"), ("--model", "another/model", "--revision", "main")])
def test_another_model_does_not_mix_in(hub: Hub, download: Download, tmp_path: Path, other: tuple[str, ...]) -> None:
    assert download().returncode == 0
    before = read_folder(tmp_path / "Base_Diffusion_model")
    if "another/model" in other:
        hub.model = "another/model"
    check_refused(download(*other), "Base_Diffusion_model holds", Download_model.DEFAULT_REVISION, "remove the folder")
    assert read_folder(tmp_path / "Base_Diffusion_model") == before


def test_folder_of_another_origin_is_left_alone(download: Download, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    check_refused(download("--output-dir", "mine"), "mine holds files of another origin")
    assert read_folder(tmp_path / "mine") == {"notes.txt": b"mine"}


def test_full_disk_is_refused_before_the_first_byte(hub: Hub, download: Download, tmp_path: Path) -> None:
    hub.stated_sizes[UNET_FP16] = 10**18
    check_refused(download(), "1000000000.00 GB needed", "GB free")
    assert not (tmp_path / "Base_Diffusion_model").exists()
    assert hub.get_fetched() == ["model_index.json"]


def test_pickled_weights_are_refused(hub: Hub, download: Download) -> None:
    del hub.files[UNET], hub.files[UNET_FP16], hub.files["scheduler/scheduler_config.json"]
    check_refused(download(), "scheduler is missing", "unet has no fp16 weights", "diffusion_pytorch_model.bin")


def test_names_outside_the_folder_are_not_taken(hub: Hub, download: Download, tmp_path: Path) -> None:
    hub.files["model_index.json"] = json.dumps(INDEX | {"..": ["diffusers", "Model"]}).encode()
    hub.files["../evil.json"] = b"{}"
    assert download().returncode == 0
    assert not (tmp_path / "evil.json").exists()


def test_not_a_pipeline(hub: Hub, download: Download) -> None:
    del hub.files["model_index.json"]
    check_refused(download(), "not a diffusers pipeline")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--model", "nobody/nothing"], "nobody/nothing is no local file or folder and no public model on the hub"),
        (["--revision", "v0"], "has no revision v0"),
        (["--model", "./no/such/folder"], "./no/such/folder"),
        (["--model", ".", "--revision", "v0"], "local folder"),
    ],
)
def test_unknown_model(download: Download, arguments: list[str], part: str) -> None:
    check_refused(download(*arguments), part)


def test_gated_model_needs_a_token(hub: Hub, download: Download) -> None:
    hub.token = "hf_secret"
    check_refused(download(), "gated", "HF_TOKEN")
    assert download(HF_TOKEN="hf_secret").returncode == 0


def test_hub_is_down(hub: Hub, download: Download) -> None:
    hub.server.shutdown()
    hub.server.server_close()
    check_refused(download(), "cannot reach the hub", hub.url)


def test_offline(download: Download) -> None:
    check_refused(download(HF_HUB_OFFLINE="1"), "offline")


@pytest.fixture(scope="module")
def pipeline() -> Any:
    from tools.random_model import make_pipeline

    return make_pipeline("tiny")


def check_loads(folder: Path, pipeline: Any) -> None:
    """Check that diffusers loads the folder, told of no variant, and finds this pipeline's weights."""
    import diffusers
    import torch

    loaded = diffusers.DiffusionPipeline.from_pretrained(folder, use_safetensors=True)
    for component in ("unet", "vae", "text_encoder", "text_encoder_2"):
        expected, actual = (getattr(each, component).state_dict() for each in (pipeline, loaded))
        assert expected.keys() == actual.keys()
        for name, weight in expected.items():
            torch.testing.assert_close(actual[name], weight)  # as exact as the saved type, which both have


@pytest.mark.parametrize("shard", ["10GB", "100KB"])
def test_downloaded_pipeline_loads(hub: Hub, download: Download, pipeline: Any, tmp_path: Path, shard: str) -> None:
    pipeline.save_pretrained(tmp_path / "hub", safe_serialization=True, variant="fp16", max_shard_size=shard)
    hub.files = read_folder(tmp_path / "hub")
    assert (len(list((tmp_path / "hub/unet").glob("*.safetensors"))) > 1) is (shard == "100KB")
    result = download()
    assert result.returncode == 0, result.stderr
    assert not list((tmp_path / "Base_Diffusion_model").rglob("*fp16*"))
    check_loads(tmp_path / "Base_Diffusion_model", pipeline)


def test_local_folder_is_copied(hub: Hub, download: Download, pipeline: Any, tmp_path: Path) -> None:
    local = tmp_path / "local"
    pipeline.save_pretrained(local, safe_serialization=True, variant="fp16")
    for name in ("unet/diffusion_pytorch_model.bin", "code.py"):
        (local / name).write_bytes(b"not needed")
    result = download("--model", "local")
    assert result.returncode == 0, result.stderr
    assert hub.requests == []
    copied = tmp_path / "Base_Diffusion_model"
    assert not {"code.py", "unet/diffusion_pytorch_model.bin"} & read_folder(copied).keys()
    assert "nothing to download" in download("--model", "local").stdout
    check_loads(copied, pipeline)

    (copied / UNET).rename(copied / f"{UNET}.incomplete")
    os.truncate(copied / f"{UNET}.incomplete", 1000)
    assert download("--model", "local").returncode == 0
    assert (copied / UNET).read_bytes() == (local / UNET_FP16).read_bytes()

    (local / "unet/config.json").write_text("{}")
    check_refused(download("--model", "local"), "Base_Diffusion_model holds local")


def test_demonstration_model_is_copied(hub: Hub, download: Download, tmp_path: Path) -> None:
    import diffusers

    result = download("--model", "demo")
    assert result.returncode == 0, result.stderr
    assert hub.requests == []
    copied, original = tmp_path / "Base_Diffusion_model", Path(Download_model.__file__).parent / "demo/model"
    assert (copied / UNET).read_bytes() == (original / UNET).read_bytes()
    check_loads(copied, diffusers.DiffusionPipeline.from_pretrained(original))


def test_local_folder_without_a_pipeline(download: Download, tmp_path: Path) -> None:
    (tmp_path / "local").mkdir()
    check_refused(download("--model", "local"), "local is not a diffusers pipeline", "model_index.json")


CHECKED = {
    **FILES,
    "model_index.json": json.dumps(
        INDEX
        | {
            "feature_extractor": ["transformers", "CLIPImageProcessor"],
            "requires_safety_checker": True,
            "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        }
    ).encode(),
    "feature_extractor/preprocessor_config.json": b"{}",
    "safety_checker/config.json": b"{}",
    "safety_checker/model.fp16.safetensors": b"checker, half",
    "safety_checker/pytorch_model.bin": b"not needed",
}
CHECKER = {"feature_extractor/preprocessor_config.json", "safety_checker/config.json"}
CHECKER_WEIGHTS = "safety_checker/model.safetensors"


def test_safety_checker_is_left_out(hub: Hub, download: Download, tmp_path: Path) -> None:
    hub.files = dict(CHECKED)
    result = download()
    assert result.returncode == 0, result.stderr
    held = read_folder(tmp_path / "Base_Diffusion_model")
    assert not any(name.startswith(("safety_checker", "feature_extractor")) for name in held)
    absent = {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    assert json.loads(held["model_index.json"]) == INDEX | absent
    assert "nothing to download" in download().stdout


def test_safety_checker_is_downloaded_on_request(hub: Hub, download: Download, tmp_path: Path) -> None:
    """A later request adds it to the folder, and the next one without it takes it out of the index."""
    hub.files = dict(CHECKED)
    assert download().returncode == 0
    hub.requests.clear()
    result = download("--safety-checker")
    assert result.returncode == 0, result.stderr
    assert not any(name.startswith("unet/") for name in hub.get_fetched())
    held = read_folder(tmp_path / "Base_Diffusion_model")
    assert held[CHECKER_WEIGHTS] == b"checker, half"
    assert held.keys() >= CHECKER
    assert json.loads(held["model_index.json"]) == json.loads(CHECKED["model_index.json"])
    assert "nothing to download" in download("--safety-checker").stdout
    assert download().returncode == 0
    index = json.loads((tmp_path / "Base_Diffusion_model/model_index.json").read_text())
    assert index["safety_checker"] == [None, None]


def test_models_without_a_safety_checker(hub: Hub, download: Download, tmp_path: Path) -> None:
    check_refused(download("--safety-checker"), f"{hub.model} has no safety checker: leave out --safety-checker")
    told = "--safety-checker is for a pipeline's folder, and x.safetensors holds none"
    check_refused(download("--model", "x.safetensors", "--safety-checker"), told)
    assert not (tmp_path / "Base_Diffusion_model").exists()


def test_page_of_a_model(hub: Hub, download: Download, tmp_path: Path) -> None:
    result = download("--model", f"https://huggingface.co/{hub.model}/tree/main")
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "Base_Diffusion_model/source.json").read_text())["model"] == hub.model
    page = f"https://huggingface.co/{hub.model}/tree/v0"
    check_refused(download("--model", page, "--output-dir", "other"), f"{hub.model} has no revision v0")


def test_page_with_models_in_one_file(hub: Hub, download: Download) -> None:
    hub.files = {"README.md": b"", "photo.safetensors": b"", "images/01.png": b""}
    hub.model = "owner/name"
    told = "owner/name is not a diffusers pipeline: it has no model_index.json; it holds a model in one file, photo"
    command = "Run: python Download_model.py --model owner/name/photo.safetensors\n"
    check_refused(download("--model", "owner/name"), f"{told}.safetensors. {command}")
    hub.files["photo-v2.safetensors"] = b""
    several = "it holds models in one file each, photo-v2.safetensors, photo.safetensors. Run: "
    check_refused(download("--model", "owner/name"), several)
    hub.files = {"inner/model_index.json": b"{}"}
    check_refused(download("--model", "owner/name"), "the pipeline is in inner\n")
    hub.files = {"config.json": b"{}", "model.safetensors": b""}
    check_refused(download("--model", "owner/name"), "it holds one component of a pipeline")


@pytest.mark.parametrize(
    ("model", "parts"),
    [
        ("https://civitai.com/models/1", ["is no page of a model on huggingface.co", "--model model.safetensors"]),
        ("https://example.org/a.safetensors", ["is no page of a model on huggingface.co", "--model a.safetensors"]),
        ("owner/name/photo.gguf", ["photo.gguf is in GGUF, which is not read"]),
        ("photo.gguf", ["photo.gguf is in GGUF, which is not read"]),
    ],
)
def test_sources_that_are_not_read(hub: Hub, download: Download, tmp_path: Path, model: str, parts: list[str]) -> None:
    (tmp_path / "photo.gguf").write_bytes(b"GGUF")
    check_refused(download("--model", model), *parts)
    assert hub.requests == []


def test_local_folders_in_another_place(download: Download, tmp_path: Path) -> None:
    for name in ("outer/inner/model_index.json", "outer/inner/unet/config.json", "single/photo.safetensors"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    told = "is not a diffusers pipeline: it has no model_index.json; "
    run = "Run: python Download_model.py --model"
    check_refused(download("--model", "outer"), told, f"the pipeline is in inner. {run} outer/inner\n")
    check_refused(download("--model", "outer/inner/unet"), told, f"{run} {tmp_path}/outer/inner\n")
    check_refused(download("--model", "single"), told, f"photo.safetensors. {run} single/photo.safetensors\n")


def test_files_of_file_managers_do_no_harm(hub: Hub, download: Download, pipeline: Any, tmp_path: Path) -> None:
    """They are not copied, and later ones do not make the folder another one."""
    pipeline.save_pretrained(tmp_path / "local", safe_serialization=True)
    (tmp_path / "Base_Diffusion_model").mkdir()
    names = (".DS_Store", "unet/._config.json", "unet/Thumbs.db", ".git/config", "LICENSE.TXT")
    for name in (*names, "../Base_Diffusion_model/.DS_Store"):
        (tmp_path / "local" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "local" / name).write_bytes(b"x")
    result = download("--model", "local")
    assert result.returncode == 0, result.stderr
    assert not any((tmp_path / "Base_Diffusion_model" / name).exists() for name in names[1:])
    for name in (*names, "desktop.ini"):
        (tmp_path / "local" / name).write_bytes(b"changed")
    assert "nothing to download" in download("--model", "local").stdout


VAE_FILES = {
    "config.json": json.dumps({"_class_name": "AutoencoderTiny"}).encode(),
    "diffusion_pytorch_model.safetensors": b"tiny",
}
VAE_ID = "madebyollin/taesdxl"


@pytest.fixture
def vae_hub() -> Iterator[Hub]:
    unneeded = ("taesdxl_decoder.safetensors", "diffusion_pytorch_model.bin", "README.md")
    with Hub(VAE_ID, "f" * 40, {**VAE_FILES, **dict.fromkeys(unneeded, b"not needed")}) as hub:
        yield hub


def test_vae_alone(vae_hub: Hub, download: Download, tmp_path: Path) -> None:
    result = download("--vae", VAE_ID, HF_ENDPOINT=vae_hub.url)
    assert result.returncode == 0, result.stderr
    assert vae_hub.get_fetched()[-1] == "config.json"
    assert read_folder(tmp_path / "VAE") == VAE_FILES
    record = json.loads((tmp_path / "VAE/source.json").read_text())
    assert record == {"model": VAE_ID, "revision": "f" * 40, "dtype": "fp16"}
    assert "nothing to download" in download("--vae", VAE_ID, HF_ENDPOINT=vae_hub.url).stdout
    assert download("--vae", "VAE", "--output-dir", "copy").returncode == 0
    assert read_folder(tmp_path / "copy") == VAE_FILES


def test_what_is_no_vae_is_refused(vae_hub: Hub, download: Download, tmp_path: Path) -> None:
    vae_hub.files["config.json"] = json.dumps({"_class_name": "UNet2DConditionModel"}).encode()
    told = "--vae takes an AutoencoderKL or AutoencoderTiny, but madebyollin/taesdxl holds UNet2DConditionModel"
    check_refused(download("--vae", VAE_ID, HF_ENDPOINT=vae_hub.url), told)
    del vae_hub.files["config.json"]
    check_refused(
        download("--vae", VAE_ID, HF_ENDPOINT=vae_hub.url), "is not the folder of a VAE: it has no config.json"
    )
    check_refused(download("--vae", "x.safetensors"), "--vae without --model takes a folder or a hub id")
    check_refused(download("--model", VAE_ID, "--vae", "VAE"), "--vae without --model downloads a VAE alone")
    assert not (tmp_path / "VAE").exists()


CONTROL_ID = "owner/t2i-adapter-canny-1.0"
CONTROL_CONFIG = json.dumps({"_class_name": "T2IAdapter"}).encode()


def write_tensors(*names: str) -> bytes:
    return save({name: np.ones((2, 2), np.float32) for name in names})


ADAPTER = write_tensors("adapter.body.0.in_conv.weight")
CONTROL_FILES = {
    "config.json": CONTROL_CONFIG,
    "diffusion_pytorch_model.fp16.safetensors": write_tensors("adapter.body.0.in_conv.bias"),
    "diffusion_pytorch_model.safetensors": ADAPTER,
    "t2i_sketch.safetensors": ADAPTER,
    "lora.safetensors": write_tensors("lora_unet_a.lora_down.weight"),
    "sdxl_models/ip-adapter_sdxl.safetensors": write_tensors("image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"),
    "sdxl_models/ip-adapter_sdxl_vit-h.safetensors": write_tensors(
        "image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"
    ),
    **{
        f"{place}/image_encoder/{name}": content
        for place, content in (("models", b"{}"), ("sdxl_models", b"{ }"))
        for name in ("config.json", "model.safetensors", "pytorch_model.bin")
    },
    "README.md": b"not needed",
}


@pytest.fixture
def control_hub() -> Iterator[Hub]:
    with Hub(CONTROL_ID, "e" * 40, dict(CONTROL_FILES)) as hub:
        yield hub


def test_a_control_is_downloaded_and_checked(control_hub: Hub, download: Download, tmp_path: Path) -> None:
    result = download("--control", CONTROL_ID, HF_ENDPOINT=control_hub.url)
    assert result.returncode == 0, result.stderr
    assert control_hub.get_fetched()[-1] == "config.json"
    half = CONTROL_FILES["diffusion_pytorch_model.fp16.safetensors"]
    folder = tmp_path / "t2i-adapter-canny-1.0"
    assert read_folder(folder) == {"config.json": CONTROL_CONFIG, "diffusion_pytorch_model.safetensors": half}
    entry = json.dumps({"name": "t2i-adapter-canny-1.0", "path": str(folder)})
    assert f"holds a T2I-Adapter. In model-config.yaml: handler: {{controls: [{entry}]}}" in result.stdout
    again = download("--control", CONTROL_ID, HF_ENDPOINT=control_hub.url)
    assert "nothing to download" in again.stdout
    assert "holds a T2I-Adapter" in again.stdout
    page = f"https://huggingface.co/{CONTROL_ID}/tree/main"
    single = download("--control", page, "--dtype", "fp32", "--output-dir", "single", HF_ENDPOINT=control_hub.url)
    assert single.returncode == 0, single.stderr
    assert read_folder(tmp_path / "single")["diffusion_pytorch_model.safetensors"] == ADAPTER


def test_a_control_in_one_file(control_hub: Hub, download: Download, tmp_path: Path) -> None:
    file = f"{CONTROL_ID}/t2i_sketch.safetensors"
    result = download("--control", file, "--output-dir", "sketches", HF_ENDPOINT=control_hub.url)
    assert result.returncode == 0, result.stderr
    assert read_folder(tmp_path / "sketches") == {"t2i_sketch.safetensors": ADAPTER}
    assert f'"path": "{tmp_path}/sketches/t2i_sketch.safetensors"' in result.stdout
    assert "fp16" not in result.stdout
    local = download("--control", "sketches/t2i_sketch.safetensors")
    assert "holds a T2I-Adapter" in local.stdout
    assert [path.name for path in tmp_path.iterdir() if path.name != "home"] == ["sketches"]


@pytest.mark.parametrize(("name", "encoder"), [("ip-adapter_sdxl", "sdxl_models"), ("ip-adapter_sdxl_vit-h", "models")])
def test_an_ip_adapter_comes_with_its_image_encoder(
    control_hub: Hub, download: Download, tmp_path: Path, name: str, encoder: str
) -> None:
    file = f"sdxl_models/{name}.safetensors"
    result = download("--control", f"{CONTROL_ID}/{file}", HF_ENDPOINT=control_hub.url)
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "t2i-adapter-canny-1.0"
    wanted = (file, *(f"{encoder}/image_encoder/{each}" for each in ("config.json", "model.safetensors")))
    assert read_folder(folder) == {each: CONTROL_FILES[each] for each in wanted}
    entry = {"name": name, "path": str(folder / file), "image_encoder": str(folder / encoder / "image_encoder")}
    assert json.dumps(entry) in result.stdout
    assert "holds an IP-Adapter" in result.stdout


def test_what_is_no_control_is_refused(control_hub: Hub, download: Download, tmp_path: Path) -> None:
    def refuse(*arguments: str, parts: tuple[str, ...]) -> None:
        check_refused(download(*arguments, HF_ENDPOINT=control_hub.url), *parts)

    lora = f"{CONTROL_ID}/lora.safetensors"
    refuse("--control", lora, "--output-dir", "lora", parts=("holds a LoRA", "a control is a T2I-Adapter or a Co"))
    refuse("--control", f"{CONTROL_ID}/none.safetensors", parts=("has no file none.safetensors; it has",))
    refuse("--control", f"{CONTROL_ID}/a.pth", parts=("a.pth",))
    refuse("--control", CONTROL_ID, "--vae", "x", parts=("--control downloads a control alone: leave out --vae",))
    refuse("--control", CONTROL_ID, "--safety-checker", parts=("leave out --safety-checker",))
    refuse("--control", "owner/none", parts=("owner/none is no local file or folder and no public model on the hub",))
    refuse("--control", "https://civitai.com/models/1", parts=("is no page of a model on huggingface.co",))
    (tmp_path / "edges").mkdir()
    refuse("--control", "edges", parts=("edges has no readable config.json of a control",))
    refuse(
        "--control", "edges", "--revision", "a", parts=("--revision is for a control on the hub, and edges is here",)
    )
    control_hub.files["config.json"] = json.dumps({"_class_name": "AutoencoderKL"}).encode()
    refuse("--control", CONTROL_ID, parts=("--control takes a T2IAdapter or ControlNet", "holds AutoencoderKL"))
    del control_hub.files["config.json"]
    refuse("--control", CONTROL_ID, parts=("is not the folder of a control: it has no config.json",))
    control_hub.files["config.json"] = CONTROL_CONFIG
    for name in ("diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.safetensors"):
        del control_hub.files[name]
    refuse("--control", CONTROL_ID, parts=("has no weights in safetensors",))
    control_hub.files["diffusion_pytorch_model.safetensors"] = b"x"
    refuse("--control", CONTROL_ID, parts=("diffusion_pytorch_model.safetensors", "damaged"))
