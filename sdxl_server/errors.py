"""What may go wrong, and whose fault it is.

ValueError
├── ConfigError       the operator's: a setting, or what it points to, cannot be served; the worker does not start
│   └── VersionError  the archive was made for another version of this package
└── RequestError      the client's: a request that cannot be answered with a picture
TimeoutError          nobody's: the time of a request is up
"""


class ConfigError(ValueError):
    """A setting of model-config.yaml, or what it points to, that cannot be served."""


class VersionError(ConfigError):
    """An archive that was made for another version of this package."""


class RequestError(ValueError):
    """A request that cannot be answered with a picture; the client's fault.

    Attributes:
        param: the field at fault, or None for the body as a whole.
        status: of HTTP.
    """

    def __init__(self, message: str, *, param: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param = param
        self.status = status
