"""How a field of a request is declared, and what bounds what it takes; the fields themselves are in fields.py."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from sdxl_server.request.adapters import Offer
from sdxl_server.request.samplers import Samplers
from sdxl_server.schemas import Schema


class Role(Enum):
    """What a field decides."""

    PICTURE = "what is drawn"
    FILE = "what kind of file the picture is put into"
    DELIVERY = "how, when and how often the answer comes"


@dataclass(frozen=True)
class Bounds:
    """What bounds a request, by the configuration and by the model.

    Attributes:
        max_prompt_characters: of each of the four prompts.
        weighted_prompts: they hold weights, which are then checked.
        max_side: of a picture, in pixels.
        own_side: of the model's own square, in pixels; a picture to start from is brought to about its area.
        multiple: of which a picture's sides are then, in pixels.
        max_steps: denoising steps of a picture.
        max_images: pictures of one request.
        max_megapixel_steps: calls of the UNet x megapixels of one request.
        max_timeout: seconds that one request may take.
        allowed_sizes: the only (width, height) to make, in pixels; empty: any.
        schedulers: diffusers' schedulers that draw the model right, each with its options.
        max_clip_skip: the layers of the smaller text encoder, less one.
        adapters: that requests can name.
        max_adapter_rank: the sum of the ranks of those that one request names.
    """

    max_prompt_characters: int = 2000
    weighted_prompts: bool = False
    max_side: int = 2048
    own_side: int = 1024
    multiple: int = 32
    max_steps: int = 150
    max_images: int = 10
    max_megapixel_steps: float = 350
    max_timeout: float = 3600
    allowed_sizes: tuple[tuple[int, int], ...] = ()
    schedulers: Samplers = dataclasses.field(default_factory=dict)
    max_clip_skip: int = 11
    adapters: Mapping[str, Offer] = dataclasses.field(default_factory=dict)
    max_adapter_rank: int = 128


@dataclass(frozen=True)
class Declaration:
    """What is known of a field beside its name and default.

    Attributes:
        role: what it decides.
        schema: what it accepts, null aside, under given bounds.
        words: its meaning.
        is_argument: diffusers' pipelines have an argument of this name.
        is_upload: it is a picture, in base64 in JSON and a file in a form.
        default: of requests under given bounds; None where the configuration, the model or chance gives one, or
            where there is none.
        read: returns a value as it is kept, under given bounds; None where the schema says all of what is taken.
            Raises ValueError with what follows the field's name in a message.
    """

    role: Role
    schema: Callable[[Bounds], Schema]
    words: str
    is_argument: bool = True
    is_upload: bool = False
    default: Callable[[Bounds], Any] = lambda _: None
    read: Callable[[Any, Bounds], Any] | None = None


def declare(
    role: Role,
    schema: Callable[[Bounds], Schema],
    words: str,
    *,
    value: Any = dataclasses.MISSING,
    **about: Any,
) -> Any:
    """Return a dataclass's field.

    Args:
        value: of requests that leave it out.
        about: the other attributes of Declaration.
    """
    if value is not dataclasses.MISSING and value is not None:
        about.setdefault("default", lambda _: value)
    return dataclasses.field(default=value, metadata={"declaration": Declaration(role, schema, words, **about)})
