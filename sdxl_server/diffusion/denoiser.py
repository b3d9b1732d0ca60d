"""The UNet of one image: it calls the shared UNet, or extrapolates its output, as the step plan says."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from sdxl_server import metrics
from sdxl_server.diffusion.stand_ins import StandIn, check_finite
from sdxl_server.errors import NotFiniteError
from sdxl_server.request.fields import GenerationRequest
from sdxl_server.sampling.extrapolation import LinearExtrapolation
from sdxl_server.sampling.predicted_x0 import compute_predicted_x0, compute_sigma, compute_unet_output
from sdxl_server.sampling.step_plan import StepPlan


class Denoiser(StandIn):
    """The UNet of one image.

    Attributes:
        plan: the calls to make.
        calls: the calls made so far, in whole calls.
        done: the calls so far, with the extrapolated ones.
        request: the image's request.
    """

    reads = (*StandIn.reads, "add_embedding")

    def __init__(
        self, model: Any, run: Callable[..., Any], request: GenerationRequest, scheduler: Any, plan: StepPlan
    ) -> None:
        super().__init__(model)
        self.plan, self.done = plan, 0
        self.calls: float = 0
        self.request, self._run, self._scheduler = request, run, scheduler
        self._last: tuple[Any, Any, Any] | None = None
        # the predicted x0 of each half of the batch, over the noise level
        self._lines = [LinearExtrapolation(), LinearExtrapolation()]

    def forward(self, sample: Any, timestep: Any, *inputs: Any, **options: Any) -> Any:
        """Call the shared UNet, or extrapolate its output, as the step plan says."""
        cost, is_guided = self.plan.costs[self.done], self.plan.guided[self.done]
        start = time.perf_counter()
        if cost:
            output = self._call(sample, timestep, *inputs, is_guided=is_guided, **options)
        else:
            output = self._extrapolate(sample, timestep, is_guided=is_guided)
        metrics.count_unet_call(cost, seconds=time.perf_counter() - start)
        self.calls += cost
        self.done += 1
        check_finite(output, "the UNet's output" if cost else "the extrapolated output of the UNet")
        self._last = (sample, timestep, output)
        return (output,)

    def _call(self, sample: Any, timestep: Any, *inputs: Any, is_guided: bool, **options: Any) -> Any:
        """Call the shared UNet. It gets the timestep in float32, which holds whole numbers exactly.

        Outside the guidance interval only the prompt's half is computed. It replaces both halves, so guidance has no
        effect.
        """
        if is_guided or len(sample) == 1:
            output = self._run(sample, timestep.float(), *inputs, **options)[0]
        else:
            _, half = sample.chunk(2)
            inputs, options = _halve(inputs, size=len(sample)), _halve(options, size=len(sample))
            output = self._run(half, timestep.float(), *inputs, **options)[0].repeat(2, 1, 1, 1)
        if 0 in self.plan.costs:
            predicted = compute_predicted_x0(self._scheduler, sample[:, : output.shape[1]], timestep, output)
            at = _scale_noise(compute_sigma(self._scheduler, timestep))
            # without guidance the batch is the prompt's half alone
            for line, predicted_x0 in zip(self._lines, reversed(predicted.split(1)), strict=False):
                if is_guided or line is self._lines[0]:
                    line.add(at, predicted_x0)
        return output

    def _extrapolate(self, sample: Any, timestep: Any, *, is_guided: bool) -> Any:
        """Return the UNet's output, if its predicted x0 continues the line through the last two calls."""
        at = _scale_noise(compute_sigma(self._scheduler, timestep))
        lines = self._lines if is_guided else [self._lines[0]] * 2
        predicted_x0 = torch.cat([line.compute(at) for line in reversed(lines[: len(sample)])])
        output = compute_unet_output(self._scheduler, sample[:, : predicted_x0.shape[1]], timestep, predicted_x0)
        return output.to(sample.dtype)

    def predict(self) -> Any:
        """Return the finished latents that the last call predicts; 1, channels, height / 8, width / 8."""
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
        return compute_predicted_x0(self._scheduler, sample[:1, : output.shape[1]], timestep, output)


def _scale_noise(sigma: float) -> float:
    """Return a noise level on the scale where the predicted x0 changes most evenly."""
    return math.asinh(sigma)


def _halve(inputs: Any, *, size: int) -> Any:
    """Return the prompt's half of the UNet's inputs, which is the second."""
    if isinstance(inputs, Mapping):
        return {name: _halve(each, size=size) for name, each in inputs.items()}
    if isinstance(inputs, tuple):
        return tuple(_halve(each, size=size) for each in inputs)
    is_batch = isinstance(inputs, torch.Tensor) and inputs.dim() > 0 and len(inputs) == size
    return inputs[size // 2 :] if is_batch else inputs


@contextlib.contextmanager
def name_failed_step(request: GenerationRequest, index: int, denoiser: Denoiser) -> Iterator[None]:
    """Add the step and the seed to an error about numbers that are not finite."""
    try:
        yield
    except NotFiniteError as error:
        raise NotFiniteError(
            f"the image of seed {request.get_seed(index)} failed in step {denoiser.done}: {error}"
        ) from error
