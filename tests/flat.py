"""A UNet of one level of blocks, for checks that take a compilation but no second level: it takes half the time."""

from typing import Any

# what differs from the small models' own; the attention is in the middle
ONE_LEVEL: dict[str, Any] = {
    "block_out_channels": [32],
    "attention_head_dim": [2],
    "transformer_layers_per_block": [1],
    "down_block_types": ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"],
}
