"""The errors of this package, by who can correct them.

ValueError
├── ConfigError       the operator: a setting, or its file, cannot be used; the worker does not start
│   └── VersionError  the archive was made for another version of this package
└── RequestError      the client: no image can be made for this request
    └── FlaggedError  the safety checker or the content filter refuses it
TimeoutError          nobody: the timeout of a request has passed
ArithmeticError
└── NotFiniteError    the model: its output is not an image
"""

import traceback

MAX_MESSAGE = 2000  # characters of an error message, for a client or the log
MAX_PARAM = 100  # characters of a field's name


class ConfigError(ValueError):
    """A setting of model-config.yaml, or its file, cannot be used."""


class VersionError(ConfigError):
    """The archive was made for another version of this package."""


class RequestError(ValueError):
    """No image can be made for this request.

    The message and the field's name are cut to a length that a response may repeat.

    Attributes:
        param: the wrong field. None: the whole body.
        status: the HTTP status.
    """

    def __init__(self, message: str, *, param: str | None = None, status: int = 400) -> None:
        super().__init__(cut(message, MAX_MESSAGE))
        self.param = None if param is None else cut(param, MAX_PARAM)
        self.status = status


class FlaggedError(RequestError):
    """The safety checker flagged an image, or the content filter refuses it or its request."""


class NotFiniteError(ArithmeticError):
    """An image has NaN or infinite numbers; it would be black."""


def cut(text: str, length: int) -> str:
    """Return a text cut to at most `length` characters."""
    return text if len(text) <= length else text[: length - 3] + "..."


def format_error(error: BaseException) -> str:
    """Return a traceback with short messages without line breaks: they may contain text of a request."""
    parts: list[str] = []
    cause: BaseException | None = error
    while cause is not None and len(parts) < 5:
        message = ascii(cut(str(cause), MAX_MESSAGE))[1:-1]
        parts.append("".join(traceback.format_tb(cause.__traceback__)) + f"{type(cause).__name__}: {message}")
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return "\ncaused by\n".join(parts)
