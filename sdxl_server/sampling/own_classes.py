"""Schedulers of diffusers with a fault corrected or a sigma schedule added."""

import functools
from collections.abc import Mapping
from typing import Any

from sdxl_server.request.samplers import SIGMA_SCHEDULES


@functools.cache
def build_own_classes() -> Mapping[str, Any]:
    """Return the classes by the name of the diffusers scheduler that each replaces. diffusers is imported late."""
    import torch
    from diffusers import DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler, EulerDiscreteScheduler

    class EulerAncestral(EulerAncestralDiscreteScheduler):
        """Euler a with the sigma schedules of Euler. diffusers' has none."""

        timesteps: Any
        sigmas: Any

        def set_timesteps(self, *args: Any, **options: Any) -> None:
            super().set_timesteps(*args, **options)
            if any(self.config.get(each) for each in SIGMA_SCHEDULES[:3]):
                euler = EulerDiscreteScheduler.from_config(
                    self.config, final_sigmas_type="zero", interpolation_type="linear", timestep_type="discrete"
                )
                euler.set_timesteps(*args, **options)
                self.timesteps, self.sigmas = euler.timesteps, euler.sigmas

    class DPMSolverMultistep(DPMSolverMultistepScheduler):
        """DPM++ 3M SDE with the right sign. diffusers' subtracts half a curvature where k-diffusion adds it."""

        def multistep_dpm_solver_third_order_update(self, outputs: Any, *args: Any, **options: Any) -> Any:
            updated = super().multistep_dpm_solver_third_order_update(outputs, *args, **options)
            if self.config.algorithm_type != "sde-dpmsolver++":
                return updated
            at = [self._sigma_to_alpha_sigma_t(self.sigmas[self.step_index + each]) for each in (1, 0, -1, -2)]
            logs = [torch.log(alpha) - torch.log(sigma) for alpha, sigma in at]
            step, last, before = (logs[i] - logs[i + 1] for i in range(3))
            slopes = (outputs[-1] - outputs[-2]) / last, (outputs[-2] - outputs[-3]) / before
            return updated + at[0][0] * step**2 * (slopes[0] - slopes[1]) / (last + before)

    return {"EulerAncestralDiscreteScheduler": EulerAncestral, "DPMSolverMultistepScheduler": DPMSolverMultistep}


@functools.cache
def build_partial_classes() -> Mapping[str, Any]:
    """Return classes that begin in the middle, as image-to-image does, by the name of the class that each replaces.

    diffusers' own versions count the steps that were skipped as made. They then leave noise in the image.
    """
    from diffusers import LMSDiscreteScheduler, PNDMScheduler

    class PartialLMS(LMSDiscreteScheduler):
        """LMS whose order grows with the steps made, not with the place in the schedule."""

        def step(self, *args: Any, order: int = 4, **options: Any) -> Any:
            return super().step(*args, order=min(len(self.derivatives) + 1, order), **options)

    class PartialPNDM(PNDMScheduler):
        """PLMS that begins with one Euler step. diffusers' begins by repeating the second step of the schedule."""

        timesteps: Any
        counter: int

        def set_timesteps(self, *args: Any, **options: Any) -> None:
            self.register_to_config(skip_prk_steps=True)
            super().set_timesteps(*args, **options)
            self.timesteps = self.timesteps.unique().flip(0)

        def step(self, *args: Any, **options: Any) -> Any:
            stepped = super().step(*args, **options)
            self.counter = max(self.counter, 2)
            return stepped

    return {"LMSDiscreteScheduler": PartialLMS, "PNDMScheduler": PartialPNDM}
