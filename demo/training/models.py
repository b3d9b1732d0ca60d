"""The parts of the demonstration model: how they are built, saved and loaded."""

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from demo import shapes
from demo.measure import load_eager_pipeline
from tools.random_model import make_text_encoder, save_pipeline

MERGED_WORDS = tuple(dict.fromkeys(shapes.WORDS))
TEXT_WIDTH = 128
TEXT_SETTINGS = {
    "hidden_size": TEXT_WIDTH,
    "intermediate_size": 4 * TEXT_WIDTH,
    "num_hidden_layers": 3,  # SDXL reads the hidden states before the last layer
    "num_attention_heads": 4,
    "projection_dim": TEXT_WIDTH,
}
TIME_EMBEDDING = 32
UNET_SETTINGS = {
    "block_out_channels": (64, 192),
    "layers_per_block": 1,
    "sample_size": shapes.IMAGE_SIZE // 8,
    "norm_num_groups": 16,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (2, 6),
    "transformer_layers_per_block": (1, 1),
    "use_linear_projection": True,
    "cross_attention_dim": 2 * TEXT_WIDTH,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": TIME_EMBEDDING,
    "projection_class_embeddings_input_dim": 6 * TIME_EMBEDDING + TEXT_WIDTH,
}
VAE_SETTINGS = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (16, 32, 64, 128),
    "norm_num_groups": 2,  # with two channels per group, a flat image would keep only their order
    "layers_per_block": 1,
    "sample_size": shapes.IMAGE_SIZE,
    "force_upcast": False,
    "scaling_factor": 1.0,  # normalise_latents brings them to unit variance
}
SCHEDULER_SETTINGS = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    # Otherwise sampling starts from pure noise, which training never showed
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
}


@dataclass(frozen=True)
class Models:
    """The text encoders and the UNet, which are trained together, with their tokenizer."""

    tokenizer: Any
    text_encoder: Any
    text_encoder_2: Any
    unet: Any

    @property
    def trained(self) -> tuple[Any, ...]:
        return (self.text_encoder, self.text_encoder_2, self.unet)

    def tokenize(self, prompts: Sequence[str], *, padding: str = "max_length") -> torch.Tensor:
        ids = self.tokenizer(
            list(prompts), padding=padding, truncation=True, max_length=77, return_tensors="pt"
        ).input_ids
        return ids.to(self.unet.device)

    def encode(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return both encoders' hidden states and the second's pooled projection, as for SDXL."""
        first = self.text_encoder(ids, output_hidden_states=True)
        second = self.text_encoder_2(ids, output_hidden_states=True)
        return torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1), second.text_embeds


def build_tokenizer() -> Any:
    """Return a CLIP tokenizer of any bytes. Each word of the shapes' world is one token."""
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    words = [[*word[:-1], word[-1] + "</w>"] for word in MERGED_WORDS]
    merges: list[tuple[str, str]] = []
    while pairs := Counter(pair for word in words for pair in zip(word, word[1:], strict=False)):
        first, second = merge = max(pairs, key=lambda pair: pairs[pair])
        merges.append(merge)
        for word in words:
            for i in range(len(word) - 1, 0, -1):
                if word[i - 1 : i + 1] == [first, second]:
                    word[i - 1 : i + 1] = [first + second]
    tokens = [*letters, *(letter + "</w>" for letter in letters)]
    tokens += dict.fromkeys(first + second for first, second in merges)
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=merges, model_max_length=77)


def build_vae() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(in_channels=3, out_channels=3, latent_channels=4, **VAE_SETTINGS)


def build_scheduler() -> Any:
    from diffusers import EulerDiscreteScheduler

    return EulerDiscreteScheduler(**SCHEDULER_SETTINGS)


def build_models(*, seed: int, device: str) -> Models:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    text = {**TEXT_SETTINGS, "vocab_size": len(tokenizer)}
    first, second = (make_text_encoder(text, tokenizer, projects).to(device) for projects in (False, True))
    unet = UNet2DConditionModel(in_channels=4, out_channels=4, **UNET_SETTINGS).to(device)
    return Models(tokenizer, first, second, unet)


def build_pipeline(models: Models, vae: Any) -> Any:
    from diffusers import StableDiffusionXLPipeline

    names = ("text_encoder", "text_encoder_2", "unet")
    pipeline = StableDiffusionXLPipeline(
        vae=vae,
        tokenizer=models.tokenizer,
        tokenizer_2=models.tokenizer,
        scheduler=build_scheduler(),
        **dict(zip(names, models.trained, strict=True)),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_models(models: Models, vae: Any, folder: Path) -> None:
    """Write the pipeline in diffusers' format, with fp16 weights."""
    for path in folder.glob("*/*"):  # a model card next to them stays
        path.unlink()
    contiguous = copy.deepcopy(vae).to(memory_format=torch.contiguous_format)  # safetensors needs it
    save_pipeline(build_pipeline(copy.deepcopy(models), contiguous).to(torch.float16), folder)


def load_models(folder: Path, *, device: str) -> tuple[Models, Any]:
    """Return the trained parts and the VAE of a saved pipeline."""
    pipeline = load_eager_pipeline(folder, device=device)
    models = Models(pipeline.tokenizer, pipeline.text_encoder, pipeline.text_encoder_2, pipeline.unet)
    return models, pipeline.vae
