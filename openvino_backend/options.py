"""The options of one torch.compile call, checked once."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

_KINDS: dict[str, tuple[type, str]] = {
    "device": (str, "an OpenVINO device such as 'CPU' or 'GPU'"),
    "model_caching": (bool, "true or false"),
    "cache_dir": (str, "a folder"),
    "config": (Mapping, "OpenVINO properties by name"),
    "aot_autograd": (bool, "true"),
    "decompositions": (list, "a list of operators such as 'aten.gelu.default'"),
    "max_graphs": (int, "a number from 1"),
    "release_weights": (bool, "true or false"),
    "weight_compression": (str, "int8_sym or int8_asym"),
    "quantize_convolutions": (bool, "true or false"),
    "strict": (bool, "true or false"),
    "disabled_ops": (list, "a list of operators such as 'aten.exp.default'"),
}


class OptionsError(ValueError):
    """An option that does not exist or has a wrong value; the message names it, what is accepted, what was given."""


def _find_cache_dir() -> str:
    return str(Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "openvino_backend")


@dataclass(frozen=True)
class Options:
    """What torch.compile's `options` may hold for this backend.

    Attributes:
        device: a device of this machine by OpenVINO's name: CPU, GPU, GPU.1, or several: AUTO:GPU,CPU.
        model_caching: keep compiled models in `cache_dir` and load them from there on the next start.
        cache_dir: the folder of the cache; without it `openvino_backend` in $XDG_CACHE_HOME or ~/.cache.
        config: OpenVINO properties for the compilation, for example {'INFERENCE_PRECISION_HINT': 'f32'}. Without that
            property a graph runs in the precision of its own weights.
        aot_autograd: accepted because OpenVINO's documentation names it; always on here.
        decompositions: operators that torch takes apart into simpler ones before OpenVINO sees the graph.
        max_graphs: the number of graphs to compile; each new shape of the inputs is one more, with its own weights.
        release_weights: the module is called only as compiled from now on: give the memory of its weights back to the
            kernel. Weights that are mapped from a file take no memory then, and are read from it when they are touched.
        weight_compression: store the weights of linear layers and convolutions in 8 bits, one scale per channel, by
            NNCF; lossy. int8_sym or int8_asym.
        quantize_convolutions: let convolutions compute in 8 bits, which needs their weights as int8_sym; lossy. Each
            picture's input has a scale of its own, found at each call.
        strict: raise where an operator would run in PyTorch; false: let it, and report it.
        disabled_ops: operators to run in PyTorch although OpenVINO has them; needs strict false.
    """

    device: str = "CPU"
    model_caching: bool = False
    cache_dir: str = field(default_factory=_find_cache_dir)
    config: Mapping[str, Any] = field(default_factory=dict)
    aot_autograd: bool = True
    decompositions: Sequence[str] = ()
    max_graphs: int = 4
    release_weights: bool = False
    weight_compression: str | None = None
    quantize_convolutions: bool = False
    strict: bool = True
    disabled_ops: Sequence[str] = ()

    @classmethod
    def parse(cls, raw: Mapping[str, Any] | None) -> "Options":
        """Check and return the options.

        Raises:
            OptionsError: an unknown option, a wrong type, a device that is not there.
        """
        raw = raw or {}
        names = [option.name for option in fields(cls)]
        for name, value in raw.items():
            if name not in names:
                raise OptionsError(f"unknown OpenVINO option {name!r}; the options are {', '.join(names)}")
            kind, accepted = _KINDS[name]
            if not isinstance(value, kind):
                raise OptionsError(f"OpenVINO option {name!r} takes {accepted}, not {value!r}")
        options = cls(**raw)
        if not options.aot_autograd:
            raise OptionsError("OpenVINO option 'aot_autograd' is always on and takes true, not False")
        if isinstance(options.max_graphs, bool) or options.max_graphs < 1:
            raise OptionsError(f"OpenVINO option 'max_graphs' takes a number from 1, not {options.max_graphs!r}")
        if options.weight_compression not in (None, "int8_sym", "int8_asym"):
            raise OptionsError(
                f"OpenVINO option 'weight_compression' takes int8_sym or int8_asym, not {options.weight_compression!r}"
            )
        if options.quantize_convolutions and options.weight_compression != "int8_sym":
            raise OptionsError(
                "OpenVINO option 'quantize_convolutions' takes true only beside weight_compression: int8_sym, "
                f"not {options.weight_compression!r}"
            )
        if options.disabled_ops and options.strict:
            raise OptionsError("OpenVINO option 'disabled_ops' lets operators run in PyTorch and needs strict: false")
        _find_operators("disabled_ops", options.disabled_ops)
        options.find_decompositions()
        _check_device(options)
        return options

    def find_decompositions(self) -> dict[Any, Any]:
        """Return for each operator to take apart torch's function that does so.

        Raises:
            OptionsError: torch has no such operator, or cannot take it apart.
        """
        from torch._decomp import get_decompositions

        operators = _find_operators("decompositions", self.decompositions)
        table: dict[Any, Any] = get_decompositions(operators)
        for each in operators:
            if each not in table:
                raise OptionsError(f"OpenVINO option 'decompositions': torch cannot take {each} apart")
        return table


def split_device(device: str) -> tuple[str | None, list[str]]:
    """Return the kind of a device that stands for several, or None, and the names of the real ones.

    AUTO:GPU,CPU is AUTO over GPU and CPU; AUTO alone is over all of the machine's.
    """
    import openvino

    kind, _, listed = device.partition(":")
    if kind not in ("AUTO", "BATCH", "HETERO", "MULTI"):
        return None, [device]
    names = [name.strip().lstrip("-").partition("(")[0] for name in listed.split(",") if name.strip()]
    return kind, names or list(openvino.Core().available_devices)


def _check_device(options: Options) -> None:
    """Refuse a device that OpenVINO does not see, and properties that the device does not have."""
    import openvino

    core = openvino.Core()
    devices = core.available_devices
    kind, names = split_device(options.device)
    for name in names:
        if name not in devices and f"{name}.0" not in devices:  # GPU stands for GPU.0
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
        OptionsError: torch has none of that name.
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
