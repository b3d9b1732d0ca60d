"""What the original layout (LDM's, SGM's), in which models are published, calls a UNet's weights."""

import re
from collections.abc import Iterable, Mapping

NAMES = {
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
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def replace_all(name: str, patterns: Mapping[str, str]) -> str:
    for pattern, new in patterns.items():
        name = re.sub(pattern, new, name)
    return name


def name_originals(names: Iterable[str], layers: int) -> dict[str, str]:
    """Return the original's name of each of diffusers' weights of a UNet.

    Args:
        layers: of each block on the way down; a block on the way up has one more.
    """
    originals = {name: _name_original(name, layers) for name in names}
    # In a block with attention the upsampler comes third, in another second
    with_attention = {
        found[1] for each in originals.values() if (found := re.match(r"(output_blocks\.\d+)\.1\.", each))
    }

    def place(found: re.Match[str]) -> str:
        return f"{found[1]}.{2 if found[1] in with_attention else 1}"

    return {name: re.sub(r"(output_blocks\.\d+)\.UPSAMPLER", place, each) for name, each in originals.items()}


def _name_original(name: str, layers: int) -> str:
    for new, old in NAMES.items():
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
        name = replace_all(name, {rf"\.{new}\.": f".{old}." for new, old in RESNET.items()})
    return name
