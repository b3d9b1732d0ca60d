"""What may go wrong, and whose fault it is.

ValueError
├── ConfigError       the operator's: a setting, or what it points to, cannot be served; the worker does not start
│   └── VersionError  the archive was made for another version of this package
└── RequestError      the client's: a request that cannot be answered with a picture
TimeoutError          nobody's: the time of a request is up
ArithmeticError
└── NotFiniteError    the model's: what it computed is no picture
"""

import traceback

MAX_MESSAGE = 2000  # characters of what a client or the log is told of an error
MAX_PARAM = 100  # of a field's name


class ConfigError(ValueError):
    """A setting of model-config.yaml, or what it points to, that cannot be served."""


class VersionError(ConfigError):
    """An archive that was made for another version of this package."""


class RequestError(ValueError):
    """A request that cannot be answered with a picture; the client's fault.

    Whatever text of the request is given, no more of it is kept than an answer may echo.

    Attributes:
        param: the field at fault, or None for the body as a whole.
        status: of HTTP.
    """

    def __init__(self, message: str, *, param: str | None = None, status: int = 400) -> None:
        super().__init__(cut(message, MAX_MESSAGE))
        self.param = None if param is None else cut(param, MAX_PARAM)
        self.status = status


class NotFiniteError(ArithmeticError):
    """Numbers of a picture that are NaN or infinite; drawn, they would be black."""


def cut(text: str, length: int) -> str:
    """Return a text of at most so many characters."""
    return text if len(text) <= length else text[: length - 3] + "..."


def format_error(error: BaseException) -> str:
    """Return a traceback whose messages are bounded and have no line breaks, since they may hold text of a request."""
    parts: list[str] = []
    cause: BaseException | None = error
    while cause is not None and len(parts) < 5:
        message = ascii(cut(str(cause), MAX_MESSAGE))[1:-1]
        parts.append("".join(traceback.format_tb(cause.__traceback__)) + f"{type(cause).__name__}: {message}")
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return "\ncaused by\n".join(parts)
