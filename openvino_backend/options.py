"""The options of one torch.compile call, checked once."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from openvino_backend.precision import (
    EXECUTION_MODE,
    GROUP_SIZE,
    PRECISION,
    PRECISIONS,
    choose_arithmetic,
    read_properties,
)

_LOSSY = ("weight_compression", "quantize_convolutions", "quantize_linear_layers")


class OptionsError(ValueError):
    """An option is unknown or has a wrong value. The message names it, the accepted values and the given one."""


def _declare(
    kind: type, accepted: str, meaning: str, *, default: Any, accepts: Callable[[Any], bool] = lambda _: True
) -> Any:
    """Return the field of one option, for its check, its message and its documentation.

    Args:
        kind: the type of a given value.
        accepted: the values, in words that end the sentence "the option takes".
        accepts: returns whether a value of that type is accepted.
    """
    about = {"kind": kind, "accepted": accepted, "meaning": meaning, "accepts": accepts}
    if isinstance(default, Mapping):
        return field(default_factory=lambda: dict(default), metadata=about)
    return field(default=default, metadata=about)


def _is_from_1(value: Any) -> bool:
    return not isinstance(value, bool) and value >= 1


@dataclass(frozen=True)
class Options:
    """The `options` of torch.compile for this backend. Each field's metadata has its `meaning`."""

    device: str = _declare(
        str,
        "an OpenVINO device such as 'CPU' or 'GPU'",
        "A device of this machine by OpenVINO's name: CPU, GPU or GPU.1. For several: AUTO:GPU,CPU.",
        default="CPU",
    )
    model_caching: bool = _declare(
        bool,
        "true or false",
        "Keep compiled models in `cache_dir` and load them from there on the next start.",
        default=False,
    )
    cache_dir: str | None = _declare(
        str,
        "a folder",
        "The cache folder, with ~ for the home folder. By default `openvino_backend` in $XDG_CACHE_HOME or ~/.cache.",
        default=None,
    )
    cache_bytes: int = _declare(
        int,
        "a number of bytes from 1",
        "The largest size of `cache_dir` on the disk. The least recently used entries are removed first.",
        default=20_000_000_000,
        accepts=_is_from_1,
    )
    precision: str | None = _declare(
        str,
        "f32, f16, bf16, int8 or fastest",
        "The arithmetic: a floating-point type that the device computes in, or `int8` or `fastest`. `int8` is the "
        "device's best 8-bit arithmetic (lossy). `fastest` is what was measured as fastest on such a device (lossy "
        "where that is int8). By default it is the type of the weights. The option sets `weight_compression`, both "
        "`quantize_…` options, and in `config` INFERENCE_PRECISION_HINT and DYNAMIC_QUANTIZATION_GROUP_SIZE. Leave "
        "these out with it.",
        default=None,
        accepts=PRECISIONS.__contains__,
    )
    config: Mapping[str, Any] = _declare(
        Mapping,
        "OpenVINO properties by name",
        "OpenVINO properties for the compilation, such as {'INFERENCE_PRECISION_HINT': 'f32'}. Without that property "
        "a graph runs in the precision of its weights. {'EXECUTION_MODE_HINT': 'ACCURACY'} means the same as 'f32'.",
        default={},
    )
    aot_autograd: bool = _declare(
        bool,
        "true",
        "Accepted because OpenVINO's documentation names it. It is always on here.",
        default=True,
        accepts=bool,
    )
    decompositions: Sequence[str] = _declare(
        list,
        "a list of operators such as 'aten.gelu.default'",
        "Operators that torch decomposes into simpler ones before OpenVINO sees the graph.",
        default=(),
    )
    max_graphs: int = _declare(
        int,
        "a number from 1",
        "The most graphs that a component may compile, each with its own weights.",
        default=4,
        accepts=_is_from_1,
    )
    release_weights: bool = _declare(
        bool,
        "true or false",
        "Give the memory of the module's weights back to the kernel. From now on call the module only as compiled. "
        "Weights that are mapped from a file then take no memory. They are read from it when touched.",
        default=False,
    )
    weight_compression: str | None = _declare(
        str,
        "int8_sym or int8_asym",
        "Store the weights of linear layers and convolutions in 8 bits, one scale per channel (lossy).",
        default=None,
        accepts=lambda value: value in ("int8_sym", "int8_asym"),
    )
    quantize_convolutions: bool = _declare(
        bool,
        "true or false",
        "Compute convolutions in 8 bits (lossy). Their weights must be int8_sym. Each image's input has its own scale, "
        "found at each call.",
        default=False,
    )
    quantize_linear_layers: bool = _declare(
        bool,
        "true or false",
        "Compute linear layers in 8 bits (lossy). Their weights must be int8_sym. Each token's input has its own "
        "scale, found at each call.",
        default=False,
    )
    strict: bool = _declare(
        bool,
        "true or false",
        "Raise an error where an operator would run in PyTorch. With false it runs there and is reported.",
        default=True,
    )
    disabled_ops: Sequence[str] = _declare(
        list,
        "a list of operators such as 'aten.exp.default'",
        "Operators to run in PyTorch although OpenVINO has them. Needs strict: false.",
        default=(),
    )

    @classmethod
    def parse(cls, raw: Mapping[str, Any] | None) -> "Options":
        """Check and return the options.

        Raises:
            OptionsError: an unknown option, a wrong type, a device that is not there.
        """
        raw = raw or {}
        declared = {option.name: option.metadata for option in fields(cls)}
        for name, value in raw.items():
            if name not in declared:
                raise OptionsError(f"unknown OpenVINO option {name!r}; the options are {', '.join(declared)}")
            about = declared[name]
            if not isinstance(value, about["kind"]) or not about["accepts"](value):
                raise OptionsError(f"OpenVINO option {name!r} takes {about['accepted']}, not {value!r}")
        options = cls(**raw)
        _check_device(options)
        if options.precision is not None:
            options = _expand(options, raw)
        try:
            options = replace(options, config=read_properties(options.config))
        except ValueError as error:
            raise OptionsError(f"OpenVINO option 'config' {error}") from None
        for name in _LOSSY[1:]:
            if getattr(options, name) and options.weight_compression != "int8_sym":
                raise OptionsError(
                    f"OpenVINO option {name!r} takes true only with weight_compression: int8_sym, "
                    f"not {options.weight_compression!r}"
                )
        if options.disabled_ops and options.strict:
            raise OptionsError("OpenVINO option 'disabled_ops' lets operators run in PyTorch and needs strict: false")
        _find_operators("disabled_ops", options.disabled_ops)
        options.find_decompositions()
        return options

    @property
    def arithmetic(self) -> str | None:
        """The type of the arithmetic as OpenVINO names it. None: that of the weights."""
        named: str | None = self.config.get(PRECISION)
        return named

    @property
    def is_lossy(self) -> bool:
        """Whether results lose more than the rounding of a floating-point type."""
        return self.weight_compression is not None

    def describe_arithmetic(self) -> dict[str, Any]:
        """Return how the arithmetic was set, by `precision` with the reason or by other options."""
        described: dict[str, Any] = {"precision": self.precision} if self.precision is not None else {}
        described |= {name: getattr(self, name) for name in _LOSSY if getattr(self, name)}
        described |= {name: self.config[name] for name in (PRECISION, GROUP_SIZE) if name in self.config}
        described["lossy"] = self.is_lossy
        if self.precision is not None:
            described["reason"] = choose_arithmetic(self.precision, self.device).reason
        return described

    def find_decompositions(self) -> dict[Any, Any]:
        """Return torch's decomposition of each operator in `decompositions`.

        Raises:
            OptionsError: torch has no such operator, or cannot decompose it.
        """
        from openvino_backend.torch_private import find_decompositions

        operators = _find_operators("decompositions", self.decompositions)
        table = find_decompositions(operators)
        for each in operators:
            if each not in table:
                raise OptionsError(f"OpenVINO option 'decompositions': torch cannot decompose {each}")
        return table


def _expand(options: Options, raw: Mapping[str, Any]) -> Options:
    """Return the options with those that `precision` sets.

    Raises:
        OptionsError: some of these are given too, or the device does not compute in it.
    """
    beside = [name for name in _LOSSY if name in raw]
    beside += [f"config's {name}" for name in (PRECISION, GROUP_SIZE, EXECUTION_MODE) if name in options.config]
    if beside:
        raise OptionsError(
            f"OpenVINO option 'precision' sets {', '.join(beside)} itself; leave that out, or 'precision'"
        )
    kind, _ = split_device(options.device)
    if kind is not None:
        raise OptionsError(f"OpenVINO option 'precision' is for one device, such as CPU or GPU, not {options.device!r}")
    try:
        chosen = choose_arithmetic(str(options.precision), options.device).options
    except ValueError as error:
        raise OptionsError(f"OpenVINO option 'precision' takes {error}") from None
    return replace(options, **{**chosen, "config": {**options.config, **chosen["config"]}})


def split_device(device: str) -> tuple[str | None, list[str]]:
    """Return the kind of a device that combines several, or None, and the names of the real ones.

    AUTO:GPU,CPU is AUTO over GPU and CPU. AUTO alone is over all devices of the machine.
    """
    import openvino

    kind, _, listed = device.partition(":")
    if kind not in ("AUTO", "BATCH", "HETERO", "MULTI"):
        return None, [device]
    names = [name.strip().lstrip("-").partition("(")[0] for name in listed.split(",") if name.strip()]
    return kind, names or list(openvino.Core().available_devices)


def _check_device(options: Options) -> None:
    """Refuse a device that OpenVINO does not see, and properties that the device lacks."""
    import openvino

    core = openvino.Core()
    devices = core.available_devices
    kind, names = split_device(options.device)
    for name in names:
        # GPU means GPU.0, and a single one is listed as GPU
        if not {name, f"{name}.0", name.removesuffix(".0")} & set(devices):
            raise OptionsError(
                f"OpenVINO option 'device' takes {', '.join(devices)} here, or AUTO, HETERO, MULTI or BATCH with a "
                f"list of these, not {options.device!r}"
            )
    properties = {each for name in [*names, kind] if name for each in core.get_property(name, "SUPPORTED_PROPERTIES")}
    for name in options.config:
        if name not in properties:
            raise OptionsError(
                f"OpenVINO option 'config' takes properties of {options.device}, which are "
                f"{', '.join(sorted(properties))}, not {name!r}"
            )


def _find_operators(option: str, names: Sequence[str]) -> list[Any]:
    """Return torch's operators of these names.

    Raises:
        OptionsError: torch has no operator of that name.
    """
    import torch

    found = []
    for name in names:
        parts = name.split(".") if isinstance(name, str) else []
        try:
            namespace, operator, overload = parts
            found.append(getattr(getattr(getattr(torch.ops, namespace), operator), overload))
        except (ValueError, AttributeError):
            raise OptionsError(
                f"OpenVINO option {option!r} takes operators such as 'aten.exp.default', not {name!r}"
            ) from None
    return found
