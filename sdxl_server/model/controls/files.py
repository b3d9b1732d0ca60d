"""Open the files of a control: a folder in diffusers' layout, or a single safetensors file."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdxl_server.convert.weights_files import CheckpointError, Header, check_not_quantised
from sdxl_server.errors import ConfigError
from sdxl_server.model.adapters.files import read_adapter_file
from sdxl_server.model.folders import FP16_MARK, check_component, check_links, is_weights, load_json_object

MODELS = {True: "Stable Diffusion XL", False: "Stable Diffusion 1.x or 2.x"}  # by Family.is_xl


@dataclass(frozen=True)
class ControlFile:
    """The opened files of a control.

    Attributes:
        path: as configured.
        config: the settings in its folder; None for a single file.
        sha256: the digest of its weights.
        header: of its weights.
    """

    path: Path
    config: Mapping[str, Any] | None
    sha256: str
    header: Header


def open_control(path: Path) -> ControlFile:
    """Open a control's files and read the header.

    Raises:
        ConfigError: the folder is incomplete, or the file cannot be read.
    """
    check_links([path])
    config, file = None, path
    if path.is_dir():
        config = load_json_object(path / "config.json")
        if config.get("_class_name") is None:
            raise ConfigError(f"{path} has no readable config.json of a control; name a folder with one, or a file")
        command = ["hf", "download", "<its id on the hub>", "--local-dir", f"{path}-whole"]
        check_component(path, remedy=shlex.join(command))
        files = [each for each in sorted(path.glob("*.safetensors")) if is_weights(each.name)]
        if not files:
            raise ConfigError(f"{path} has no weights, such as diffusion_pytorch_model.safetensors")
        file = min(files, key=lambda each: FP16_MARK in each.name)
    digest, header = read_adapter_file(file)
    try:
        check_not_quantised(header)
    except CheckpointError as error:
        raise ConfigError(str(error)) from error
    return ControlFile(path, config, digest, header)


def build_module(opened: ControlFile, kind: Any, config: Mapping[str, Any]) -> Any:
    """Return a diffusers model without weights.

    Raises:
        ConfigError: the settings do not describe one.
    """
    import torch

    try:
        with torch.device("meta"):
            return kind.from_config(dict(config))
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"{opened.path} does not describe a {kind.__name__}: {line}") from error


def check_family(opened: ControlFile, what: str, *, is_xl: bool, wanted: bool) -> None:
    """Refuse a control of another family.

    Args:
        what: the kind of control, in words.
        is_xl, wanted: whether the control and the model are Stable Diffusion XL.

    Raises:
        ConfigError: names both families.
    """
    if is_xl is not wanted:
        raise ConfigError(f"{opened.path} holds {what} for {MODELS[is_xl]}, and this model is {MODELS[wanted]}")


def load_weights(opened: ControlFile, names: Mapping[str, str], module: Any, dtype: str) -> None:
    """Load a control's weights into its module.

    Args:
        names: the names in the file by those of the module.
        dtype: of the weights, by torch's name.

    Raises:
        ConfigError: a tensor is missing, unknown, not finite or of another shape; names it.
    """
    import torch

    header, kind = opened.header, type(module).__name__
    expected = {name: tuple(each.shape) for name, each in module.state_dict().items()}
    if missing := sorted(expected.keys() - names.keys()):
        raise ConfigError(f"{header.path} lacks {len(missing)} tensors of its {kind}, such as {missing[0]}")
    for name, held in names.items():
        if name not in expected:
            raise ConfigError(f"{header.path} holds a tensor that is not of a {kind}: {held}")
        if header.shapes[held] != expected[name]:
            shapes = ["×".join(map(str, each)) for each in (expected[name], header.shapes[held])]
            raise ConfigError(f"{header.path} takes {shapes[0]} numbers for {held}, not {shapes[1]}")
    own_dtype, loaded = getattr(torch, dtype), header.load_tensors(names.values(), torch.float32)
    tensors = {}
    for name, held in names.items():
        tensors[name] = loaded.pop(held).to(own_dtype)
        if not torch.isfinite(tensors[name]).all():
            raise ConfigError(f"{header.path} holds numbers that are not finite in {dtype}: {held}")
    module.load_state_dict(tensors, assign=True)
    module.eval().requires_grad_(False)
