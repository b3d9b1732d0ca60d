"""One picture's own parts, which stand between diffusers' pipeline and the parts that all pictures share.

diffusers is handed these in the place of its models. What one request asks for stays in its own objects; the shared
ones are functions, compiled or not. Each has what diffusers reads of a model beside calling it.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from sdxl_server.errors import NotFiniteError
from sdxl_server.fields import GenerationRequest
from sdxl_server.schedulers import predict_original

Functions = Mapping[str, Callable[..., Any]]


def check_finite(values: Any, what: str) -> None:
    """Refuse a tensor with a number that is NaN or infinite; it costs a thousandth of what makes the tensor.

    Raises:
        NotFiniteError: says what the tensor is.
    """
    if not torch.isfinite(values).all():
        raise NotFiniteError(f"{what} holds numbers that are not finite")


class Part(torch.nn.Module):
    """What diffusers reads of a model: its configuration, its type, its device."""

    reads: tuple[str, ...] = ("config", "dtype", "device")

    def __init__(self, model: Any) -> None:
        super().__init__()
        for name in self.reads:
            if hasattr(model, name):
                setattr(self, name, getattr(model, name))


class Denoiser(Part):
    """The UNet of one picture.

    Attributes:
        calls: of the UNet so far.
        request: of which it is a picture.
    """

    reads = (*Part.reads, "add_embedding")

    def __init__(self, model: Any, run: Callable[..., Any], request: GenerationRequest, scheduler: Any) -> None:
        super().__init__(model)
        self.calls = 0
        self.request, self._run, self._scheduler = request, run, scheduler
        self._last: tuple[Any, Any, Any] | None = None

    def forward(self, sample: Any, timestep: Any, *inputs: Any, **options: Any) -> Any:
        """Call the shared UNet; schedulers count timesteps in whole numbers or in float32, which holds them exactly."""
        outputs = self._run(sample, timestep.float(), *inputs, **options)
        self.calls += 1
        check_finite(outputs[0], "what the UNet returned")
        self._last = (sample, timestep, outputs[0])
        return outputs

    def predict(self) -> Any:
        """Return the finished latents as they look from the last call; 1, channels, height / 8, width / 8."""
        from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import rescale_noise_cfg

        if self._last is None:
            raise RuntimeError("the UNet has not been called")
        sample, timestep, output = self._last
        output = output.float()
        if len(output) == 2:
            without, with_prompt = output.chunk(2)
            output = without + self.request.guidance_scale * (with_prompt - without)
            if self.request.guidance_rescale > 0:
                output = rescale_noise_cfg(output, with_prompt, guidance_rescale=self.request.guidance_rescale)
        return predict_original(self._scheduler, sample[:1, : output.shape[1]], timestep, output)


class Autoencoder(Part):
    """The VAE of one picture."""

    reads = (*Part.reads, "post_quant_conv")

    def __init__(self, model: Any, functions: Functions) -> None:
        super().__init__(model)
        self._decode, self._encode = functions["vae"], functions["vae_encoder"]

    def decode(self, latents: Any, return_dict: bool = True, generator: Any = None) -> Any:
        """Return the pixels of latents in a tuple, whatever `return_dict`; the decoder has no use for a generator."""
        decoded = self._decode(latents.to(self.dtype), return_dict=False)
        check_finite(decoded[0], "what the VAE decoded")
        return decoded

    def encode(self, pixels: Any) -> Any:
        """Return the distribution of an image's latents."""
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
        from diffusers.models.modeling_outputs import AutoencoderKLOutput

        moments = self._encode(pixels.to(self.dtype))
        check_finite(moments, "what the VAE made of the image")
        return AutoencoderKLOutput(latent_dist=DiagonalGaussianDistribution(moments))


class TextEncoder(Part):
    """A text encoder of one picture."""

    reads = (*Part.reads, "text_model")

    def __init__(self, model: Any, run: Callable[..., Any]) -> None:
        super().__init__(model)
        self._run = run

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """Call the shared text encoder."""
        return self._run(*inputs, **options)
