"""Recognise the model in a weights file by the names and shapes in its header. No weights are read."""

import contextlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from sdxl_server.convert.original_config import find_config, read_prediction_type
from sdxl_server.convert.weights_files import CheckpointError, Header, check_not_quantised, read_safetensors_header

SETTINGS_FOLDER = Path(__file__).parent
UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
INPUT_WEIGHT = "input_blocks.0.0.weight"
# The layouts differ in the prefixes of their text encoders; the keys are diffusers' names.
LAYOUTS = {
    "sdxl": {
        "text_encoder": "conditioner.embedders.0.transformer.",
        "text_encoder_2": "conditioner.embedders.1.model.",
    },
    "sd1": {"text_encoder": "cond_stage_model.transformer."},
    "sd2": {"text_encoder": "cond_stage_model.model."},
}
LAYOUT_NAMES = {"sdxl": "Stable Diffusion XL", "sd1": "Stable Diffusion 1.x", "sd2": "Stable Diffusion 2.x"}
INPAINTING_CHANNELS = 9
UNSERVED_CHANNELS = {
    5: "a depth-to-image model",
    7: "an upscaler",
    8: "an instruct-pix2pix model, which edits by instruction",
}
PREDICTIONS = ("epsilon", "v_prediction", "v_prediction_ztsnr")
# Other content of such files, by a pattern of its names. The first match counts, after whole models.
UNSERVED_CONTENTS = {
    "a Control-LoRA": r"^lora_controlnet$",
    "a ControlNet-LLLite": r"^lllite_",
    "a ControlNet": r"^(control_model\.)?(controlnet_\w+|zero_convs|input_hint_block)\.|^control_model\.",
    "an IP-Adapter": r"^(image_proj|ip_adapter)\.",
    "a T2I-Adapter": r"^(adapter\.)?body\.\d+\.(block1|in_conv|resnets)\.",
    "a LoRA or another adapter of a model": (
        r"^(lora|lycoris)_|lora[_.](up|down|A|B)\b|\.lora\.|hada_w|lokr_w|oft_|\.(on_input|ia3_l|diff(_b)?|set_weight)$"
    ),
    "an upscaler": r"^(conv_first|model\.1\.sub\.0|RRDB_trunk\.0|block_1\.c1_r|body\.0)\.",
    "a textual inversion": r"^(emb_params|clip_[lg])$",
    "a UNet alone, in diffusers' naming": r"^down_blocks\.\d+\.resnets\.",
    "a UNet alone": rf"^({re.escape(UNET_PREFIX)})?input_blocks\.",
    "a tiny VAE (TAESD) alone": r"^(taesd_)?(encoder|decoder)\.(layers\.)?\d+\.",
    "a VAE alone": r"^(first_stage_model\.)?(encoder|decoder)\.conv_in\.",
    "a text encoder alone": r"(^|\.)text_model\.|^transformer\.resblocks\.",
}


@dataclass(frozen=True)
class Checkpoint:
    """A file that holds a whole model.

    Attributes:
        layout: a key of LAYOUTS.
        channels: the UNet's input channels: 4, or 9 for inpainting.
        prediction: the UNet's prediction type, one of PREDICTIONS.
        reason: how the prediction type is known.
        has_vae: the file holds a VAE.
        note: a line about lost precision; empty if none is known.
    """

    path: Path
    layout: str
    channels: int
    prediction: str
    reason: str
    has_vae: bool
    note: str

    def describe(self) -> str:
        """Return the model in words."""
        inpainting = ", inpainting (nine channels)" if self.channels == INPAINTING_CHANNELS else ""
        return f"{LAYOUT_NAMES[self.layout]}{inpainting}, {self.prediction} ({self.reason})"

    def read_settings(self) -> dict[str, dict[str, Any]]:
        """Return the content of model_index.json and the settings of each component."""
        settings: dict[str, dict[str, Any]] = json.loads((SETTINGS_FOLDER / f"{self.layout}.json").read_text())
        index, scheduler, unet = settings["model_index"], settings["scheduler"], settings["unet"]
        if self.channels == INPAINTING_CHANNELS:
            unet["in_channels"] = INPAINTING_CHANNELS
            index["_class_name"] = index["_class_name"].replace("Pipeline", "InpaintPipeline")
        if self.prediction != "epsilon":
            # Euler supports both settings; PNDM, the published scheduler of SD 1.x and 2.x, supports one
            index["scheduler"][1] = scheduler["_class_name"] = "EulerDiscreteScheduler"
            scheduler["prediction_type"] = "v_prediction"
            if self.layout == "sd2":  # its v-prediction models were trained at 768²
                unet["sample_size"] = 96
        if self.prediction == "v_prediction_ztsnr":
            # The steps must include the last timestep, which is pure noise
            scheduler |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        return settings


def recognise_checkpoint(path: Path, *, prediction: str | None = None) -> Checkpoint:
    """Return the model in a file.

    Args:
        prediction: the prediction type that the user names; None reads it from the file or the .yaml next to it.

    Raises:
        CheckpointError: names the content of another file.
    """
    header = read_safetensors_header(path)
    layout = find_layout(header)
    if layout is None:
        raise CheckpointError(
            f"{path} holds {describe_content(header)}, not a whole model of {', '.join(LAYOUT_NAMES.values())}"
        )
    check_not_quantised(header)
    for key, what in {"edm_mean": "Playground v2.5", "edm_vpred.sigma_max": "CosXL"}.items():
        if key in header.shapes:
            raise CheckpointError(f"{path} holds {what}, whose schedule of noise (EDM) is not served")
    channels = header.shapes[f"{UNET_PREFIX}{INPUT_WEIGHT}"][1]
    if channels not in (4, INPAINTING_CHANNELS):
        what = UNSERVED_CHANNELS.get(channels, "a model of another kind")
        raise CheckpointError(f"{path} holds {what} ({channels} channels), which is not served")
    found, reason = (prediction, "as asked") if prediction else find_prediction_type(header, layout, channels)
    return Checkpoint(
        path, layout, channels, found, reason, header.has(f"{VAE_PREFIX}decoder."), describe_precision(header)
    )


def find_layout(header: Header) -> str | None:
    """Return the layout of a whole model; None for another file."""
    if f"{UNET_PREFIX}{INPUT_WEIGHT}" not in header.shapes:
        return None
    return next((name for name, parts in LAYOUTS.items() if all(header.has(prefix) for prefix in parts.values())), None)


def describe_precision(header: Header) -> str:
    """Say in a line that the file lost precision; empty if it has no weights in fp8."""
    if not header.fp8:
        return ""
    scaled = "scaled fp8" if header.scales else "fp8"
    return (
        f"{len(header.fp8)} of {len(header.shapes)} tensors are in {scaled}. Precision was lost when the file was "
        "made: prefer one in fp16"
    )


def describe_content(header: Header) -> str:
    """Return in words what a file holds."""
    if find_layout(header):
        return "a whole model"
    if header.has("conditioner.embedders.0.model.") and header.has(UNET_PREFIX):
        return "the refiner of Stable Diffusion XL, which is not served"
    # diffusers knows more kinds. It returns v1 for unknown ones.
    with contextlib.suppress(Exception):
        from diffusers.loaders.single_file_utils import infer_diffusers_model_type

        kind = infer_diffusers_model_type({name: SimpleNamespace(shape=shape) for name, shape in header.shapes.items()})
        known = ("v1", "v2", "xl_base", "inpainting", "instruct-pix2pix", "upscale")
        if kind not in known and not kind.startswith("controlnet"):
            return f"another kind of model ({kind})"
    for kind, pattern in UNSERVED_CONTENTS.items():
        if any(re.search(pattern, name) for name in header.shapes):
            return kind
    return f"{len(header.shapes)} tensors of unknown kind, such as {min(header.shapes, default='none')}"


def find_prediction_type(header: Header, layout: str, channels: int) -> tuple[str, str]:
    """Return a model's prediction type, and how it is known.

    Raises:
        CheckpointError: the .yaml next to the file is damaged or names another type.
    """
    import torch

    if "v_pred" in header.shapes:
        if "ztsnr" in header.shapes:
            return "v_prediction_ztsnr", "by the file's keys v_pred and ztsnr"
        return "v_prediction", "by the file's key v_pred"
    config = find_config(header.path)
    if config and (named := read_prediction_type(config)):
        return named, f"by the {config.suffix} next to the file"
    stated = header.metadata.get("modelspec.prediction_type", "")
    if stated.startswith(("v", "eps")):
        return "v_prediction" if stated.startswith("v") else "epsilon", "by the file's modelspec.prediction_type"
    name = f"{UNET_PREFIX}output_blocks.11.1.transformer_blocks.0.norm1.bias"
    if layout == "sd2" and channels == 4 and name in header.shapes:
        # SD 2.x files do not name it. ComfyUI separates the two kinds by how far training moved this bias.
        bias = header.load_tensors([name], torch.float32)[name]
        spread = float(torch.std(bias.float(), unbiased=False))
        return (
            "v_prediction" if spread > 0.09 else "epsilon",
            "a guess by its weights; --prediction-type overrides it",
        )
    return "epsilon", "nothing in the file says otherwise"
