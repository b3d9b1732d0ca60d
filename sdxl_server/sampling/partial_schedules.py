"""Two schedulers of diffusers that begin in the middle, as image-to-image does.

diffusers' own versions count the steps that were skipped as made. They then leave noise in the image.
"""

import functools
from collections.abc import Mapping
from typing import Any


@functools.cache
def build_partial_classes() -> Mapping[str, Any]:
    """Return the classes by the name of the diffusers scheduler that each replaces. diffusers is imported late."""
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
