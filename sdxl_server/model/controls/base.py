"""What each kind of control provides: components to compile, and inputs of the UNet."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, ClassVar

from sdxl_server.config.control_settings import ControlConfig

Inputs = Mapping[str, Any]
"""Keyword arguments of the UNet; their tensors are in dictionaries and lists."""


@dataclass(frozen=True)
class Component:
    """A method of a control that is compiled.

    Attributes:
        method: of a torch module.
        free: the axes of its arguments that may have any length; see DYNAMIC_SHAPES.
        is_batched: its rows are those of the UNet; otherwise it takes a single image.
    """

    method: Callable[..., Any]
    free: Mapping[str, Any]
    is_batched: bool = False


@dataclass(frozen=True)
class UNetCall:
    """A call of the UNet that controls add to.

    Attributes:
        sample: the latents; rows × channels × height × width.
        timestep: in float32.
        options: the call's keyword arguments.
    """

    sample: Any
    timestep: Any
    options: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Control(ABC):
    """A registered control.

    Attributes:
        config: its entry in handler.controls.
        sha256: the digest of its file.
        module: the model.
        modes: what a request's `mode` can name; none for most.
        is_map: its images show the result's places, and so get its size.
    """

    kind: ClassVar[str]
    is_map: ClassVar[bool] = True

    config: ControlConfig
    sha256: str
    module: Any
    modes: tuple[str, ...] = ()

    @property
    def component(self) -> str:
        """Its name among the compiled components."""
        return f"control_{self.config.name}"

    @abstractmethod
    def list_components(self) -> Mapping[str, Component]:
        """Return what is compiled, by name."""

    @abstractmethod
    def encode_image(self, functions: Mapping[str, Callable[..., Any]], image: Any, mode: str | None) -> Any:
        """Compute once per request what does not change from step to step.

        Args:
            functions: what runs each component.
            image: a Pillow image in the size of the result.
            mode: one of `modes`; None for the first.
        """

    @abstractmethod
    def compute_inputs(
        self, functions: Mapping[str, Callable[..., Any]], encoded: Any, scale: float, call: UNetCall
    ) -> Inputs:
        """Return what the control adds to the UNet's inputs in a call.

        Args:
            functions: what runs each component.
            encoded: from `encode_image`.
        """

    @abstractmethod
    def list_empty_inputs(self, unet: Any, sample: Any) -> Inputs:
        """Return the UNet's inputs without the control, whole: zeros that take no memory."""

    def describe(self, **of_request: Any) -> dict[str, Any]:
        """Return its entry in a report.

        Args:
            of_request: how a request uses it.
        """
        about = {"name": self.config.name, "kind": self.kind, "sha256": self.sha256, "scale": self.config.scale}
        return {**about, **({"modes": list(self.modes)} if self.modes else {}), **of_request}


def make_zeros(sample: Any, *shape: int) -> Any:
    """Return zeros of a shape for each row of the UNet's input. They take the memory of one number."""
    return sample.new_zeros(1).expand(len(sample), *shape)


def add_inputs(one: Any, other: Any) -> Any:
    """Return the sum of what two controls add to the UNet's inputs."""
    if isinstance(one, Mapping):
        return {**one, **{name: add_inputs(one[name], other[name]) if name in one else other[name] for name in other}}
    if isinstance(one, list):
        return [add_inputs(*pair) for pair in zip_longest(one, other)]
    return other if one is None else one if other is None else one + other


def complete_inputs(inputs: Any, empty: Any) -> Any:
    """Return all inputs of the UNet for controls, each in one piece and with all rows.

    Args:
        inputs: of the active controls; None for none.
        empty: of all registered controls.
    """
    if isinstance(empty, Mapping):
        return {name: complete_inputs((inputs or {}).get(name), each) for name, each in empty.items()}
    if isinstance(empty, list):
        return [complete_inputs(*pair) for pair in zip_longest(inputs or [], empty)]
    return (empty if inputs is None else inputs.to(empty.dtype).expand_as(empty)).contiguous()
