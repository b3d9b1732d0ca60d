"""The names of a UNet's weights in the layout of published checkpoints (LDM, SGM)."""

import re
from collections.abc import Iterable, Mapping

LDM_PREFIXES = {
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
LDM_RESNET_LAYERS = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def replace_all(name: str, patterns: Mapping[str, str]) -> str:
    """Return the name with each pattern replaced in turn."""
    for pattern, new in patterns.items():
        name = re.sub(pattern, new, name)
    return name


def list_ldm_names(names: Iterable[str], layers: int) -> dict[str, str]:
    """Return the LDM name of each weight of diffusers' UNet.

    Args:
        layers: of each down block; an up block has one more.
    """
    ldm_names = {name: _convert_name(name, layers) for name in names}
    # The upsampler is the third module of a block with attention, and the second of another block.
    with_attention = {
        found[1] for each in ldm_names.values() if (found := re.match(r"(output_blocks\.\d+)\.1\.", each))
    }

    def place(found: re.Match[str]) -> str:
        return f"{found[1]}.{2 if found[1] in with_attention else 1}"

    return {name: re.sub(r"(output_blocks\.\d+)\.UPSAMPLER", place, each) for name, each in ldm_names.items()}


def _convert_name(name: str, layers: int) -> str:
    for new, old in LDM_PREFIXES.items():
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
            block_name = f"input_blocks.{first + layer + 1}" if way == "down" else f"output_blocks.{first + layer}"
            name = f"{block_name}.{0 if kind == 'resnets' else 1}.{rest}"
    if re.match(r"(input_blocks\.\d+\.0|middle_block\.[02]|output_blocks\.\d+\.0)\.", name):
        name = replace_all(name, {rf"\.{new}\.": f".{old}." for new, old in LDM_RESNET_LAYERS.items()})
    return name
