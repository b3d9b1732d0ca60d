"""What a file of weights holds, by the names and shapes in its header; no weights are read."""

import contextlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

PLACE = Path(__file__).parent
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
UNET = "model.diffusion_model."
VAE = "first_stage_model."
INPUT = "input_blocks.0.0.weight"
# What tells the layouts apart: the prefixes of the text encoders, by their names in diffusers' pipelines.
LAYOUTS = {
    "sdxl": {
        "text_encoder": "conditioner.embedders.0.transformer.",
        "text_encoder_2": "conditioner.embedders.1.model.",
    },
    "sd1": {"text_encoder": "cond_stage_model.transformer."},
    "sd2": {"text_encoder": "cond_stage_model.model."},
}
NAMES = {"sdxl": "Stable Diffusion XL", "sd1": "Stable Diffusion 1.x", "sd2": "Stable Diffusion 2.x"}
INPAINTING_CHANNELS = 9
CHANNELS = {5: "a depth-to-image model", 7: "an upscaler", 8: "an instruct-pix2pix model, which edits by instruction"}
PREDICTIONS = ("epsilon", "v_prediction", "v_prediction_ztsnr")
# What else is published in such files. A whole model is none of them; the first that fits names it.
KINDS = {
    "a LoRA or another adapter of a model": r"lora[_.](up|down|A|B)\b|\.lora\.|hada_w|lokr_w|oft_(blocks|diag)",
    "a ControlNet": r"^control_model\.|^controlnet_",
    "an IP-Adapter": r"^(image_proj|ip_adapter)\.",
    "a textual inversion": r"^(emb_params|clip_[lg])$",
    "a UNet alone, in diffusers' naming": r"^down_blocks\.\d+\.resnets\.",
    "a UNet alone": rf"^({re.escape(UNET)})?input_blocks\.",
    "a tiny VAE (TAESD) alone": r"^(taesd_)?(encoder|decoder)\.(layers\.)?\d+\.",
    "a VAE alone": r"^(first_stage_model\.)?(encoder|decoder)\.conv_in\.",
    "a text encoder alone": r"(^|\.)text_model\.|^transformer\.resblocks\.",
}
SNIFFED = {  # what a file that is no safetensors begins with
    b"PK\x03\x04": "a pickle of PyTorch's",
    b"\x80": "a pickle",
    b"GGUF": "weights in GGUF",
    b"<": "a web page, such as one that asks for a login",
    b"version https://git-lfs": "Git LFS's pointer to the file (git lfs pull fetches it)",
}


class CheckpointError(ValueError):
    """A file that no folder can be made of, for a reason that the message states in one line."""


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of its content.

    Attributes:
        shapes: of each tensor, by name.
        metadata: texts by name.
    """

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, str]

    def count(self, prefix: str, pattern: str = "") -> int:
        """Return the numbers in all tensors of a prefix whose further name begins as the pattern says."""
        return sum(
            math.prod(shape)
            for name, shape in self.shapes.items()
            if name.startswith(prefix) and re.match(pattern, name[len(prefix) :])
        )

    def has(self, prefix: str) -> bool:
        return any(name.startswith(prefix) for name in self.shapes)


@dataclass(frozen=True)
class Checkpoint:
    """A file that holds a whole model.

    Attributes:
        layout: a key of LAYOUTS.
        channels: of the UNet's input: 4, or 9 of an inpainting model.
        prediction: one of PREDICTIONS: what the UNet was trained to tell.
        reason: how the prediction is known.
        has_vae: whether the file holds a VAE.
    """

    path: Path
    layout: str
    channels: int
    prediction: str
    reason: str
    has_vae: bool

    def describe(self) -> str:
        inpainting = ", inpainting (nine channels)" if self.channels == INPAINTING_CHANNELS else ""
        return f"{NAMES[self.layout]}{inpainting}, {self.prediction} ({self.reason})"

    def read_settings(self) -> dict[str, dict[str, Any]]:
        """Return the content of model_index.json and of each part's settings."""
        settings: dict[str, dict[str, Any]] = json.loads((PLACE / f"{self.layout}.json").read_text())
        index, scheduler, unet = settings["model_index"], settings["scheduler"], settings["unet"]
        if self.channels == INPAINTING_CHANNELS:
            unet["in_channels"] = INPAINTING_CHANNELS
            index["_class_name"] = index["_class_name"].replace("Pipeline", "InpaintPipeline")
        if self.prediction != "epsilon":
            # Euler's knows both of these; of PNDM's and DDIM's, which SD 1.x and 2.x were published with, one does not
            index["scheduler"][1] = scheduler["_class_name"] = "EulerDiscreteScheduler"
            scheduler["prediction_type"] = "v_prediction"
            if self.layout == "sd2":  # those that predict v were trained at 768²
                unet["sample_size"] = 96
        if self.prediction == "v_prediction_ztsnr":
            # Without the last timestep among its steps, the noise that no picture is left in would never be seen
            scheduler |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        return settings


def read_header(path: Path) -> Header:
    """Return what a safetensors file says of its content.

    Raises:
        CheckpointError: it is none, or is damaged.
    """
    from safetensors import SafetensorError, safe_open

    if path.suffix.lower() in PICKLES:
        raise CheckpointError(explain_pickle(path, "a pickle"))
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            return Header(path, shapes, file.metadata() or {})
    except SafetensorError as error:
        with path.open("rb") as stream:
            beginning = stream.read(64).lstrip()
        what = next((words for start, words in SNIFFED.items() if beginning.startswith(start)), None)
        if what is None:
            raise CheckpointError(f"{path} is damaged, or was not fetched whole: {error}") from error
        if "pickle" in what:
            raise CheckpointError(explain_pickle(path, what)) from error
        raise CheckpointError(f"{path} holds {what}, no weights in safetensors") from error


def explain_pickle(path: Path, what: str) -> str:
    return (
        f"{path} is {what}, which can run code when it is read: take the model's .safetensors, or make one where "
        "nothing is to lose, with torch.load(..., weights_only=True) and safetensors.torch.save_file"
    )


def recognise(path: Path, *, prediction: str | None = None) -> Checkpoint:
    """Return what model a file holds.

    Args:
        prediction: what the user says that its UNet was trained to tell; None: what the file says.

    Raises:
        CheckpointError: names what it is instead.
    """
    header = read_header(path)
    layout = next(
        (name for name, parts in LAYOUTS.items() if all(header.has(prefix) for prefix in parts.values())), None
    )
    if layout is None or f"{UNET}{INPUT}" not in header.shapes:
        raise CheckpointError(f"{path} holds {name_kind(header)}, not a whole model of {', '.join(NAMES.values())}")
    for key, what in {"edm_mean": "Playground v2.5", "edm_vpred.sigma_max": "CosXL"}.items():
        if key in header.shapes:
            raise CheckpointError(f"{path} holds {what}, whose schedule of noise (EDM) is not served")
    channels = header.shapes[f"{UNET}{INPUT}"][1]
    if channels not in (4, INPAINTING_CHANNELS):
        what = CHANNELS.get(channels, "a model of another kind")
        raise CheckpointError(f"{path} holds {what} ({channels} channels), which is not served")
    found, reason = (prediction, "as asked") if prediction else find_prediction(header, layout, channels)
    return Checkpoint(path, layout, channels, found, reason, header.has(f"{VAE}decoder."))


def name_kind(header: Header) -> str:
    """Return in words what a file holds that is no whole model."""
    if header.has("conditioner.embedders.0.model.") and header.has(UNET):
        return "the refiner of Stable Diffusion XL, which is not served"
    # Of all that diffusers reads, as it tells them apart; for what it does not know either it says v1
    with contextlib.suppress(Exception):
        from diffusers.loaders.single_file_utils import infer_diffusers_model_type

        kind = infer_diffusers_model_type({name: SimpleNamespace(shape=shape) for name, shape in header.shapes.items()})
        if kind not in ("v1", "v2", "xl_base", "inpainting", "instruct-pix2pix", "controlnet", "upscale"):
            return f"another kind of model ({kind})"
    for kind, pattern in KINDS.items():
        if any(re.search(pattern, name) for name in header.shapes):
            return kind
    return f"{len(header.shapes)} tensors of unknown kind, such as {min(header.shapes, default='none')}"


def find_prediction(header: Header, layout: str, channels: int) -> tuple[str, str]:
    """Return what a model's UNet was trained to tell, and how that is known."""
    import torch
    from safetensors import safe_open

    if "v_pred" in header.shapes:
        if "ztsnr" in header.shapes:
            return "v_prediction_ztsnr", "by the file's keys v_pred and ztsnr"
        return "v_prediction", "by the file's key v_pred"
    stated = header.metadata.get("modelspec.prediction_type", "")
    if stated.startswith(("v", "eps")):
        return "v_prediction" if stated.startswith("v") else "epsilon", "by the file's modelspec.prediction_type"
    name = f"{UNET}output_blocks.11.1.transformer_blocks.0.norm1.bias"
    if layout == "sd2" and channels == 4 and name in header.shapes:
        # Nothing in an SD 2.x file says it. ComfyUI tells the two kinds apart by how far this bias moved in training.
        with safe_open(header.path, framework="pt") as file:
            spread = float(torch.std(file.get_tensor(name).float(), unbiased=False))
        return (
            "v_prediction" if spread > 0.09 else "epsilon",
            "a guess by its weights; --prediction-type says otherwise",
        )
    return "epsilon", "nothing in the file says otherwise"
