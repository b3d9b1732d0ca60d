"""Write a Stable Diffusion pipeline with seeded random weights to a folder, in diffusers' format.

No model hub is needed: the configurations are in this file. `tiny` is for tests. `base` is SDXL base 1.0 at its real
size (2.57 B parameters in the UNet, 7 GB on disk), for measuring speed. The images show noise.

The layers of `base` keep the variance of their input, about as a trained model's do. With torch's own initial weights
the variance shrinks to a third at each layer. Then the output of a block and its errors nearly vanish.
"""

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

TINY_UNET = {
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "sample_size": 16,
    "norm_num_groups": 8,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (2, 4),
    "use_linear_projection": True,
}
SDXL_CONDITIONING = {"addition_embed_type": "text_time"}
TINY_VAE = {"block_out_channels": (16, 16, 32, 32), "norm_num_groups": 8, "sample_size": 128, "layers_per_block": 1}
TINY_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "projection_dim": 32,
    "vocab_size": 514,
}
BASE_UNET = {
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "sample_size": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    **SDXL_CONDITIONING,
}
BASE_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "sample_size": 1024,
    "force_upcast": True,
}
BASE_TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
BASE_TEXT_2 = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "tiny": {
        "class": "StableDiffusionXLPipeline",
        "unet": {
            **TINY_UNET,
            **SDXL_CONDITIONING,
            "transformer_layers_per_block": (1, 1),
            "cross_attention_dim": 64,
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 32,
        },
        "vae": TINY_VAE,
        "text": [TINY_TEXT, {**TINY_TEXT, "hidden_act": "gelu"}],
    },
    "tiny-sd": {
        "class": "StableDiffusionPipeline",
        "unet": {**TINY_UNET, "cross_attention_dim": 32},
        "vae": TINY_VAE,
        "text": [TINY_TEXT],
    },
    "base": {
        "class": "StableDiffusionXLPipeline",
        "unet": BASE_UNET,
        "vae": BASE_VAE,
        "text": [
            {**BASE_TEXT, "projection_dim": 768, "vocab_size": 49408},
            {**BASE_TEXT_2, "projection_dim": 1280, "vocab_size": 49408, "hidden_act": "gelu"},
        ],
    },
}
SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "timestep_spacing": "leading",
    "steps_offset": 1,
}


def make_tokenizer(vocab_size: int) -> Any:
    """Return CLIP's own tokenizer, or one of bytes alone for a vocabulary of 514; both read any text."""
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    from sdxl_server.convert.conversion import write_vocabulary

    letters = list(bytes_to_unicode().values())
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    if vocab_size == len(tokens):
        return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=77)
    with tempfile.TemporaryDirectory() as folder:
        write_vocabulary(Path(folder))
        return CLIPTokenizer.from_pretrained(folder, model_max_length=77)


def make_text_encoder(config: dict[str, Any], tokenizer: Any, with_projection: bool) -> Any:
    """Return a CLIP text encoder whose special tokens are the tokenizer's."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    settings = CLIPTextConfig(**{"hidden_act": "quick_gelu", **config, **ids})
    return (CLIPTextModelWithProjection if with_projection else CLIPTextModel)(settings)


def make_pipeline(size: str, *, seed: int = 0) -> Any:
    """Return the pipeline of one size with weights drawn from the seed, in float32, or float16 for `base`."""
    import diffusers
    import torch

    config = CONFIGURATIONS[size]
    torch.manual_seed(seed)
    default_dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16 if size == "base" else torch.float32)
    try:
        is_xl = config["class"] == "StableDiffusionXLPipeline"
        parts: dict[str, Any] = {
            "vae": diffusers.AutoencoderKL(
                in_channels=3,
                out_channels=3,
                latent_channels=4,
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                scaling_factor=0.13025,
                **config["vae"],
            ),
            "unet": diffusers.UNet2DConditionModel(in_channels=4, out_channels=4, **config["unet"]),
            "scheduler": diffusers.EulerDiscreteScheduler(**SCHEDULER),
        }
        if size == "base":
            keep_variance(parts["unet"], parts["vae"])
        for suffix, text, projects in zip(("", "_2"), config["text"], (False, True), strict=False):
            parts["tokenizer" + suffix] = make_tokenizer(text["vocab_size"])
            parts["text_encoder" + suffix] = make_text_encoder(text, parts["tokenizer" + suffix], projects)
        if not is_xl:
            parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        return getattr(diffusers, config["class"])(**parts)
    finally:
        torch.set_default_dtype(default_dtype)


def make_safety_checker(threshold: float = 1.0) -> dict[str, Any]:
    """Return the components of a pipeline that check its images.

    Args:
        threshold: the cosine with a concept above which an image is flagged: 1 flags none, -1 flags all.
    """
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessorPil

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = {**sizes, "image_size": 32, "patch_size": 8}
    checker = StableDiffusionSafetyChecker(CLIPConfig(text_config=sizes, vision_config=vision, projection_dim=16))
    for name in ("concept_embeds", "special_care_embeds"):
        getattr(checker, name).data.normal_()
        getattr(checker, f"{name}_weights").data.fill_(threshold)
    extractor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return {"safety_checker": checker, "feature_extractor": extractor, "requires_safety_checker": True}


def keep_variance(*models: Any) -> None:
    """Scale the weights of linear layers and convolutions from torch's variance of 1/3n to 1/n for n inputs."""
    import torch

    for model in models:
        for module in model.modules():
            if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
                module.weight.data *= 3**0.5


def save_pipeline(pipeline: Any, folder: Path) -> None:
    """Write a pipeline in safetensors, its weights named as in published checkpoints."""
    from sdxl_server.convert.conversion import prefix_text_encoder_names

    pipeline.save_pretrained(folder, safe_serialization=True)
    prefix_text_encoder_names(folder / "text_encoder/model.safetensors")


def save_controlnet(model: Path, folder: Path, *, seed: int = 0) -> None:
    """Write a ControlNet for the pipeline in a folder; its random weights change the images clearly."""
    import diffusers
    import torch

    torch.manual_seed(seed)
    network = diffusers.ControlNetModel.from_unet(diffusers.UNet2DConditionModel.from_pretrained(model / "unet"))
    embedding = network.controlnet_cond_embedding.conv_out
    for layer in (embedding, network.controlnet_mid_block, *network.controlnet_down_blocks):  # zeros before training
        layer.weight.data.normal_(std=0.3)
    network.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to write the pipeline; replaced if it exists")
    parser.add_argument("--size", choices=sorted(CONFIGURATIONS), default="tiny")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    pipeline = make_pipeline(arguments.size, seed=arguments.seed)
    shutil.rmtree(arguments.folder, ignore_errors=True)
    save_pipeline(pipeline, arguments.folder)


if __name__ == "__main__":
    main()
