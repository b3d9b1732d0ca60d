"""One picture's own parts, which stand between diffusers' pipeline and the parts that all pictures share.

diffusers is handed these in the place of its models. What one request asks for stays in its own objects; the shared
ones are functions, compiled or not. Each has what diffusers reads of a model beside calling it.
"""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from sdxl_server import metrics
from sdxl_server.errors import NotFiniteError
from sdxl_server.model.tiling import decode_tiles, plan_tiles
from sdxl_server.model.vaes import is_tiny, wrap_encoded
from sdxl_server.request.fields import GenerationRequest
from sdxl_server.sampling.predicted_x0 import find_output, find_sigma, predict_original
from sdxl_server.sampling.step_plan import Line, Plan

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
        plan: which of its calls are made.
        calls: that were made so far, in whole ones.
        done: calls so far, those included that were forecast.
        request: of which it is a picture.
    """

    reads = (*Part.reads, "add_embedding")

    def __init__(
        self, model: Any, run: Callable[..., Any], request: GenerationRequest, scheduler: Any, plan: Plan
    ) -> None:
        super().__init__(model)
        self.plan, self.done = plan, 0
        self.calls: float = 0
        self.request, self._run, self._scheduler = request, run, scheduler
        self._last: tuple[Any, Any, Any] | None = None
        self._lines = [Line(), Line()]  # what the finished picture looks like to each half, over the noise

    def forward(self, sample: Any, timestep: Any, *inputs: Any, **options: Any) -> Any:
        """Call the shared UNet, or forecast what it would return, as planned."""
        cost, is_guided = self.plan.costs[self.done], self.plan.guided[self.done]
        if cost:
            start = time.perf_counter()
            output = self._call(sample, timestep, *inputs, is_guided=is_guided, **options)
            metrics.CALL_SECONDS.observe(time.perf_counter() - start)
        else:
            output = self._forecast(sample, timestep, is_guided=is_guided)
        self.calls += cost
        metrics.CALLS_MADE.inc(cost)
        metrics.CALLS_SKIPPED.inc(1 - cost)
        self.done += 1
        check_finite(output, "what the UNet returned" if cost else "what was forecast of the UNet")
        self._last = (sample, timestep, output)
        return (output,)

    def _call(self, sample: Any, timestep: Any, *inputs: Any, is_guided: bool, **options: Any) -> Any:
        """Call the shared UNet; schedulers count timesteps in whole numbers or in float32, which holds them exactly.

        Outside the guidance interval what follows the prompt is run alone, and stands for both halves: guidance then
        changes nothing.
        """
        if is_guided or len(sample) == 1:
            output = self._run(sample, timestep.float(), *inputs, **options)[0]
        else:
            _, half = sample.chunk(2)
            inputs, options = _halve(inputs, size=len(sample)), _halve(options, size=len(sample))
            output = self._run(half, timestep.float(), *inputs, **options)[0].repeat(2, 1, 1, 1)
        if 0 in self.plan.costs:
            originals = predict_original(self._scheduler, sample[:, : output.shape[1]], timestep, output)
            at = _scale_noise(find_sigma(self._scheduler, timestep))
            # without guidance there is one half, the prompt's
            for line, original in zip(self._lines, reversed(originals.split(1)), strict=False):
                if is_guided or line is self._lines[0]:
                    line.add(at, original)
        return output

    def _forecast(self, sample: Any, timestep: Any, *, is_guided: bool) -> Any:
        """Return what the UNet would return if the picture to come changed on as between the last two calls."""
        at = _scale_noise(find_sigma(self._scheduler, timestep))
        originals = [(line if is_guided else self._lines[0]).find(at) for line in self._lines[: len(sample)]]
        original = torch.cat(originals[::-1])
        output = find_output(self._scheduler, sample[:, : original.shape[1]], timestep, original)
        return output.to(sample.dtype)

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
    """The VAE of one picture.

    Args:
        tile_side: of the largest square that is decoded whole, in cells of latents; None where everything is.
    """

    reads = (*Part.reads, "post_quant_conv")

    def __init__(self, model: Any, functions: Functions, *, tile_side: int | None) -> None:
        super().__init__(model)
        self._decode, self._encode, self._tile_side = functions["vae"], functions["vae_encoder"], tile_side
        self._is_tiny = is_tiny(model)

    def decode(self, latents: Any, return_dict: bool = True, generator: Any = None) -> Any:
        """Return the pixels of latents in a tuple, whatever `return_dict`; the decoder has no use for a generator."""
        height, width = latents.shape[2:]
        latents, tiles = latents.to(self.dtype), plan_tiles(height, width, self._tile_side)
        if tiles is None:
            decoded = self._decode(latents, return_dict=False)
        else:
            decoded = (decode_tiles(lambda tile: self._decode(tile, return_dict=False)[0], latents, tiles),)
        check_finite(decoded[0], "what the VAE decoded")
        return decoded

    def encode(self, pixels: Any) -> Any:
        """Return an image's latents, of the full VAE their distribution, as diffusers has them."""
        encoded = self._encode(pixels.to(self.dtype))
        check_finite(encoded, "what the VAE made of the image")
        return wrap_encoded(encoded, tiny=self._is_tiny)


class TextEncoder(Part):
    """A text encoder of one picture."""

    def __init__(self, model: Any, run: Callable[..., Any]) -> None:
        super().__init__(model)
        # Of Stable Diffusion 1.x and 2.x with clip_skip diffusers takes the last normalisation from there.
        self.text_model = getattr(model, "text_model", model)  # transformers 5 has it in the model itself
        self._run = run

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """Call the shared text encoder."""
        return self._run(*inputs, **options)


def _scale_noise(sigma: float) -> float:
    """Return a noise level on the scale on which a picture in the making changes most evenly."""
    return math.asinh(sigma)


def _halve(inputs: Any, *, size: int) -> Any:
    """Return the prompt's half of what is passed to the UNet, the second."""
    if isinstance(inputs, Mapping):
        return {name: _halve(each, size=size) for name, each in inputs.items()}
    if isinstance(inputs, tuple):
        return tuple(_halve(each, size=size) for each in inputs)
    is_batch = isinstance(inputs, torch.Tensor) and inputs.dim() > 0 and len(inputs) == size
    return inputs[size // 2 :] if is_batch else inputs
