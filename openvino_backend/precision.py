"""One switch for the arithmetic: what `precision` stands for on each kind of device.

Nothing is measured here: a seed's image must not depend on how busy the machine was. The rows come from
`python -m benchmarks`. docs/benchmarks.md has the figures.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

PRECISION = "INFERENCE_PRECISION_HINT"
GROUP_SIZE = "DYNAMIC_QUANTIZATION_GROUP_SIZE"
EXECUTION_MODE = "EXECUTION_MODE_HINT"
PRECISIONS = ("f32", "f16", "bf16", "int8", "fastest")
_CAPABILITIES = {"f32": "FP32", "f16": "FP16", "bf16": "BF16"}  # as OpenVINO calls them
_LONG_NAMES = {"fp32": "f32", "float32": "f32", "fp16": "f16", "float16": "f16", "bfloat16": "bf16"}


@dataclass(frozen=True)
class Arithmetic:
    """The options that a precision stands for.

    Attributes:
        options: of this backend.
        reason: why these options.
    """

    options: Mapping[str, Any]
    reason: str


@dataclass(frozen=True)
class _Kind:
    """A kind of CPU.

    Attributes:
        name: what it has.
        flags: what it must have, as torch names it.
        int8: the options of its best 8-bit arithmetic.
        fastest: the precision that was measured as its fastest.
        reason: what was measured.
    """

    name: str
    flags: frozenset[str]
    int8: Mapping[str, Any]
    fastest: str
    reason: str


_WEIGHTS = {"weight_compression": "int8_sym", "quantize_convolutions": True}
# The first whose flags a CPU has is its kind.
_KINDS = (
    _Kind(
        "AVX-512 VNNI and bfloat16",  # every one with AMX has both
        frozenset({"avx512_vnni", "avx512_bf16"}),
        # OpenVINO's own quantisation would take what is left, vectors: milliseconds of a step.
        {**_WEIGHTS, "quantize_linear_layers": True, "config": {PRECISION: "bf16", GROUP_SIZE: 0}},
        "int8",
        "linear layers are fastest with their inputs brought into 8 bits by the graph, a scale for each token",
    ),
    _Kind(
        "AVX-512 VNNI",
        frozenset({"avx512_vnni"}),
        {**_WEIGHTS, "config": {PRECISION: "f32", GROUP_SIZE: 320}},
        "int8",
        "OpenVINO quantises the inputs of linear layers by itself",
    ),
    _Kind(
        "no AVX-512 VNNI",
        frozenset(),
        {**_WEIGHTS, "config": {PRECISION: "f32"}},
        "f32",
        "8 bits were never measured on such a CPU",
    ),
)


def read_properties(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return OpenVINO's properties, with the type of the arithmetic by its short name.

    EXECUTION_MODE_HINT: ACCURACY means float32. OpenVINO ignores it next to INFERENCE_PRECISION_HINT, which every graph
    sets.

    Raises:
        ValueError: a type is unknown, or the two hints differ.
    """
    read = dict(config)
    if PRECISION in read:
        given = read[PRECISION]
        name = str(given.get_type_name() if hasattr(given, "get_type_name") else given).lower()
        read[PRECISION] = _LONG_NAMES.get(name, name)
        if read[PRECISION] not in _CAPABILITIES:
            raise ValueError(f"takes for {PRECISION} one of {', '.join(_CAPABILITIES)}, not {given!r}")
    if str(read.get(EXECUTION_MODE)).endswith("ACCURACY") and read.setdefault(PRECISION, "f32") != "f32":
        raise ValueError(
            f"takes {PRECISION}: f32 with {EXECUTION_MODE}: ACCURACY, not {read[PRECISION]}; leave one of them out"
        )
    return read


def choose_arithmetic(precision: str, device: str) -> Arithmetic:
    """Return what a precision stands for on a device of OpenVINO's.

    Raises:
        ValueError: the device does not compute in it; says which ones it has.
    """
    import openvino

    abilities = openvino.Core().get_property(device, "OPTIMIZATION_CAPABILITIES")
    if precision in _CAPABILITIES:
        if _CAPABILITIES[precision] not in abilities:
            known = ", ".join(name for name, ability in _CAPABILITIES.items() if ability in abilities)
            raise ValueError(f"{known}, int8 and fastest on {device}, not {precision!r}")
        return Arithmetic({"config": {PRECISION: precision}}, "as asked for")
    if device != "CPU":
        floating = "f16" if "FP16" in abilities else "f32"
        weights = {"weight_compression": "int8_sym"} if precision == "int8" else {}
        return Arithmetic(
            {**weights, "config": {PRECISION: floating}}, f"on {device} nothing was measured, and {floating} is usual"
        )
    kind = find_kind(read_flags())
    if precision == "fastest" and kind.fastest != "int8":
        return Arithmetic({"config": {PRECISION: kind.fastest}}, f"a CPU with {kind.name}: {kind.reason}")
    return Arithmetic(kind.int8, f"a CPU with {kind.name}: {kind.reason}")


def find_kind(flags: frozenset[str]) -> _Kind:
    """Return the kind of a CPU with these flags."""
    return next(kind for kind in _KINDS if kind.flags <= flags)


def read_flags() -> frozenset[str]:
    """Return what this machine's CPU has, as torch names it."""
    import torch

    return frozenset(name for name, value in torch.cpu.get_capabilities().items() if value is True)
