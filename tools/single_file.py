"""Write a pipeline as one .safetensors in the original layout (LDM's, SGM's), as models are published.

The inverse of what diffusers does to read such files.
"""

import argparse
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

UNET_NAMES = {
    "conv_in.": "input_blocks.0.0.",
    "time_embedding.linear_1.": "time_embed.0.",
    "time_embedding.linear_2.": "time_embed.2.",
    "add_embedding.linear_1.": "label_emb.0.0.",
    "add_embedding.linear_2.": "label_emb.0.2.",
    "mid_block.resnets.0.": "middle_block.0.",
    "mid_block.attentions.0.": "middle_block.1.",
    "mid_block.resnets.1.": "middle_block.2.",
    "conv_norm_out.": "out.0.",
    "conv_out.": "out.2.",
}
UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
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


def replace_all(name: str, patterns: Mapping[str, str]) -> str:
    for pattern, new in patterns.items():
        name = re.sub(pattern, new, name)
    return name


def name_unet(name: str, layers: int) -> str:
    """Return the original's name of one of diffusers' weights of a UNet.

    Args:
        layers: of each block on the way down; a block on the way up has one more.
    """
    for new, old in UNET_NAMES.items():
        if name.startswith(new):
            name = old + name.removeprefix(new)
    found = re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.", name)
    if found:
        way, block, kind, layer = found[1], int(found[2]), found[3], int(found[4])
        rest = name[found.end() :]
        first = block * (layers + 1)
        if kind == "downsamplers":
            name = f"input_blocks.{first + layers + 1}.0.op.{rest.removeprefix('conv.')}"
        elif kind == "upsamplers":
            name = f"output_blocks.{first + layers}.UPSAMPLER.{rest}"
        else:
            place = f"input_blocks.{first + layer + 1}" if way == "down" else f"output_blocks.{first + layer}"
            name = f"{place}.{0 if kind == 'resnets' else 1}.{rest}"
    if re.match(r"(input_blocks\.\d+\.0|middle_block\.[02]|output_blocks\.\d+\.0)\.", name):
        name = replace_all(name, {rf"\.{new}\.": f".{old}." for new, old in UNET_RESNET.items()})
    return name


def convert_unet(unet: Any) -> dict[str, Any]:
    layers = unet.config.layers_per_block
    renamed = {name_unet(name, layers): weight for name, weight in unet.state_dict().items()}
    # In a block with attention the upsampler comes third, in another second
    return {
        re.sub(
            r"(output_blocks\.\d+)\.UPSAMPLER",
            lambda found: f"{found[1]}.{2 if any(name.startswith(found[1] + '.1.') for name in renamed) else 1}",
            name,
        ): weight
        for name, weight in renamed.items()
    }


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
