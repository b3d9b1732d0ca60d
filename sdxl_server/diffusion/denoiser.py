"""The UNet of one image: it calls the shared UNet, or extrapolates its output, as the step plan says."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from sdxl_server import metrics
from sdxl_server.diffusion.stand_ins import Part, check_finite
from sdxl_server.errors import NotFiniteError
from sdxl_server.request.fields import GenerationRequest
from sdxl_server.sampling.extrapolation import Line
from sdxl_server.sampling.predicted_x0 import find_output, find_sigma, predict_original
from sdxl_server.sampling.step_plan import Plan


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


@contextlib.contextmanager
def name_step(request: GenerationRequest, index: int, denoiser: Denoiser) -> Iterator[None]:
    """Say of numbers that are not finite in which step of which picture they came up."""
    try:
        yield
    except NotFiniteError as error:
        raise NotFiniteError(
            f"the picture of seed {request.get_seed(index)} failed in step {denoiser.done}: {error}"
        ) from error
