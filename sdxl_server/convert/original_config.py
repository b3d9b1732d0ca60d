"""Read the prediction type from the configuration of a checkpoint: a .yaml of its name next to it, as in A1111."""

from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

import yaml

from sdxl_server.convert.weights_files import CheckpointError
from sdxl_server.schemas import shorten

MAX_BYTES = 1 << 20  # published ones have a few kilobytes
V_PREDICTION = ("v", "v_prediction", "v-prediction", "vscaling")
EPSILON = ("eps", "epsilon", "epsscaling")
# LDM has no such key. These are the names in diffusers, sd-scripts, ComfyUI and NoobAI.
ZERO_SNR_KEYS = ("rescale_betas_zero_snr", "zero_terminal_snr", "zsnr", "ztsnr")


def find_config(checkpoint: Path) -> Path | None:
    """Return the configuration next to a checkpoint, if there is one."""
    return next((each for each in sorted(checkpoint.parent.iterdir()) if is_config_of(checkpoint, each)), None)


def is_config_of(checkpoint: PurePath, path: PurePath) -> bool:
    """Say whether a path is the place of a checkpoint's configuration."""
    return path.suffix.lower() in (".yaml", ".yml") and path.with_suffix("") == checkpoint.with_suffix("")


def check_config_size(name: str, size: int) -> None:
    """Refuse a configuration that is too large to be one, before it is fetched or read.

    Args:
        size: bytes.

    Raises:
        CheckpointError: it is larger than MAX_BYTES.
    """
    if size > MAX_BYTES:
        raise CheckpointError(
            f"{name} has {size:,} bytes, and a checkpoint's configuration has at most {MAX_BYTES:,}: remove it, or "
            "name the type by --prediction-type"
        )


def read_prediction_type(path: Path) -> str | None:
    """Return the prediction type that a configuration names; None if it names none.

    Raises:
        CheckpointError: it cannot be read or names another type.
    """
    check_config_size(str(path), path.stat().st_size)
    try:
        params = _look_up(yaml.safe_load(path.read_bytes()), "model", "params")
    except (OSError, RecursionError, ValueError, yaml.YAMLError) as error:
        reason = shorten(" ".join(str(error).split()), length=200)
        raise CheckpointError(
            f"{path} cannot be read as the configuration of the checkpoint next to it: {reason}. Repair or remove it, "
            "or name the type by --prediction-type"
        ) from error
    named = _look_up(params, "parameterization")  # LDM's; SGM's, of Stable Diffusion XL, has a class
    if named is None:
        named = _look_up(params, "denoiser_config", "params", "scaling_config", "target")
    if named is None:
        return None
    last = named.rpartition(".")[2].lower() if isinstance(named, str) else ""
    if last in EPSILON:
        return "epsilon"
    if last not in V_PREDICTION:
        raise CheckpointError(
            f"{path} names the prediction type {shorten(named)}, and v and eps are served; --prediction-type overrides "
            "it"
        )
    return "v_prediction_ztsnr" if any(_look_up(params, key) is True for key in ZERO_SNR_KEYS) else "v_prediction"


def _look_up(node: Any, *keys: str) -> Any:
    """Return the value at a path of keys; None where there is none."""
    for key in keys:
        node = node.get(key) if isinstance(node, Mapping) else None
    return node
