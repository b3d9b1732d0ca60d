"""The operator's content filter: a function that sees each request, and each image and preview before it is sent."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from sdxl_server import metrics
from sdxl_server.errors import ConfigError, FlaggedError
from sdxl_server.request.fields import GenerationRequest
from sdxl_server.schemas import shorten


class ContentFilter:
    """Calls `handler.filter`, a `package.module:function`.

    The function gets the request's fields by name, uploaded images as Pillow images, and the image, a Pillow image. The
    image is None before the drawing. It returns None, or the reason for a refusal, which the client reads.

    Raises:
        ConfigError: there is no such function.
    """

    def __init__(self, place: str | None) -> None:
        self._function = None if place is None else _load_function(place)

    @property
    def is_active(self) -> bool:
        """There is a filter."""
        return self._function is not None

    def check(self, request: GenerationRequest, image: Any = None) -> None:
        """Refuse what the function refuses.

        Raises:
            FlaggedError: gives the function's reason.
            RuntimeError: the function failed, or returned something else. Nothing is sent then, either.
        """
        if self._function is None:
            return
        fields = {name: value for name, value in vars(request).items() if value is not None}
        try:
            reason = self._function(fields, image)
        except Exception as error:
            raise RuntimeError("the content filter failed") from error
        if reason is not None:
            if not isinstance(reason, str):
                raise RuntimeError(f"the content filter returns a text or None, not {shorten(reason)}")
            metrics.FILTERED.inc()
            raise FlaggedError(f"the content filter refuses this request: {reason}", param="prompt")


def _load_function(place: str) -> Callable[[Mapping[str, Any], Any], Any]:
    module, _, name = place.partition(":")
    try:
        function: Any = getattr(importlib.import_module(module), name)
    except Exception as error:  # the module's code may raise anything
        raise ConfigError(f"handler.filter takes package.module:function, and {place} fails: {error!r:.200}") from error
    if not callable(function):
        raise ConfigError(f"handler.filter takes package.module:function, and {place} is no function")
    return function
