"""Write a pipeline as one .safetensors in the original layout (LDM's, SGM's), as models are published.

It inverts the conversion that diffusers makes when it reads such files.
"""

import argparse
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sdxl_server.convert.ldm_names import list_ldm_names, replace_all

VAE_NAMES = {
    r"\.conv_norm_out\.": ".norm_out.",
    r"\.mid_block\.resnets\.0\.": ".mid.block_1.",
    r"\.mid_block\.resnets\.1\.": ".mid.block_2.",
    r"\.mid_block\.attentions\.0\.": ".mid.attn_1.",
    r"\.conv_shortcut\.": ".nin_shortcut.",
    r"attn_1\.group_norm\.": "attn_1.norm.",
    r"attn_1\.to_([qkv])\.": r"attn_1.\1.",
    r"attn_1\.to_out\.0\.": "attn_1.proj_out.",
}
OPEN_CLIP_NAMES = {
    r"^text_model\.": "",
    r"^encoder\.layers\.": "transformer.resblocks.",
    r"\.layer_norm1\.": ".ln_1.",
    r"\.layer_norm2\.": ".ln_2.",
    r"\.self_attn\.": ".attn.",
    r"\.mlp\.fc1\.": ".mlp.c_fc.",
    r"\.mlp\.fc2\.": ".mlp.c_proj.",
    r"^final_layer_norm\.": "ln_final.",
    r"^embeddings\.token_embedding\.": "token_embedding.",
    r"^embeddings\.position_embedding\.weight": "positional_embedding",
}
Weights = Mapping[str, Any]


def convert_unet(unet: Any) -> dict[str, Any]:
    weights = unet.state_dict()
    return {name: weights[own] for own, name in list_ldm_names(weights, unet.config.layers_per_block).items()}


def convert_vae(vae: Any) -> dict[str, Any]:
    last = len(vae.config.block_out_channels) - 1
    converted = {}
    for new, weight in vae.state_dict().items():
        name = replace_all(new, VAE_NAMES)
        name = re.sub(r"\.down_blocks\.(\d+)\.resnets\.", r".down.\1.block.", name)
        name = re.sub(r"\.down_blocks\.(\d+)\.downsamplers\.0\.", r".down.\1.downsample.", name)
        name = re.sub(r"\.up_blocks\.(\d+)\.resnets\.", lambda found: f".up.{last - int(found[1])}.block.", name)
        name = re.sub(
            r"\.up_blocks\.(\d+)\.upsamplers\.0\.", lambda found: f".up.{last - int(found[1])}.upsample.", name
        )
        is_attention = "attn_1" in name and name.endswith("weight") and weight.ndim == 2
        converted[name] = weight[:, :, None, None] if is_attention else weight
    return converted


def convert_open_clip(encoder: Any) -> dict[str, Any]:
    """Return the weights of a text encoder as OpenCLIP has them: queries, keys and values in one."""
    import torch

    weights = encoder.state_dict()
    converted = {}
    for new, weight in weights.items():
        name = replace_all(new, OPEN_CLIP_NAMES)
        if name == "text_projection.weight":
            converted["text_projection"] = weight.T
        elif ".attn.q_proj." in name:
            joined = [weights[new.replace("q_proj", each)] for each in ("q_proj", "k_proj", "v_proj")]
            converted[name.replace("q_proj.", "in_proj_")] = torch.cat(joined)
        elif ".attn.k_proj." not in name and ".attn.v_proj." not in name:
            converted[name] = weight
    return converted


def convert_clip(encoder: Any) -> dict[str, Any]:
    return {f"text_model.{name.removeprefix('text_model.')}": each for name, each in encoder.state_dict().items()}


def convert_pipeline(pipeline: Any, *, keys: Iterable[str] = ()) -> dict[str, Any]:
    """Return a pipeline's weights by their names in the original layout.

    Args:
        keys: names of empty tensors to add, such as NoobAI's v_pred and ztsnr.
    """
    import torch

    second = getattr(pipeline, "text_encoder_2", None)
    if second is not None:
        encoders = {
            "conditioner.embedders.0.transformer.": convert_clip(pipeline.text_encoder),
            "conditioner.embedders.1.model.": convert_open_clip(second),
        }
    elif pipeline.text_encoder.config.hidden_act == "gelu":
        encoders = {"cond_stage_model.model.": convert_open_clip(pipeline.text_encoder)}
    else:
        encoders = {"cond_stage_model.transformer.": convert_clip(pipeline.text_encoder)}
    parts = {
        "model.diffusion_model.": convert_unet(pipeline.unet),
        "first_stage_model.": convert_vae(pipeline.vae),
        **encoders,
    }
    weights = {f"{prefix}{name}": weight for prefix, part in parts.items() for name, weight in part.items()}
    return {**weights, **{key: torch.zeros(0) for key in keys}}


def save_single_file(weights: Weights, path: Path) -> None:
    from safetensors.torch import save_file

    save_file({name: weight.contiguous() for name, weight in weights.items()}, path)


def main() -> None:
    import diffusers
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of a diffusers pipeline")
    parser.add_argument("file", type=Path, help="where to write it, in float16")
    parser.add_argument("--keys", nargs="*", default=[], help="names of empty tensors to add, such as v_pred ztsnr")
    arguments = parser.parse_args()
    pipeline = diffusers.DiffusionPipeline.from_pretrained(arguments.folder, dtype=torch.float16, use_safetensors=True)
    save_single_file(convert_pipeline(pipeline, keys=arguments.keys), arguments.file)


if __name__ == "__main__":
    main()
