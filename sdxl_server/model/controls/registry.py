"""The registered controls: loaded with the model, each of a kind that its file decides."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdxl_server.config.control_settings import T2I_ADAPTER, ControlConfig
from sdxl_server.config.settings import HandlerConfig
from sdxl_server.errors import ConfigError
from sdxl_server.model.controls.t2i_adapter import list_residual_shapes, load_t2i_adapter
from sdxl_server.model.families import Family


@dataclass(frozen=True, eq=False)
class Control:
    """A registered control.

    Attributes:
        config: its entry in handler.controls.
        kind: what it is.
        sha256: the digest of its file.
        module: the model.
        residuals: the number of the UNet's inputs that it computes.
    """

    config: ControlConfig
    kind: str
    sha256: str
    module: Any
    residuals: int

    @property
    def component(self) -> str:
        """Its name among the compiled components."""
        return name_component(self.config)

    def describe(self, **of_request: Any) -> dict[str, Any]:
        """Return its entry in a report.

        Args:
            of_request: how a request uses it.
        """
        about = {"name": self.config.name, "kind": self.kind, "sha256": self.sha256, "scale": self.config.scale}
        return {**about, **of_request}


def name_component(config: ControlConfig) -> str:
    """Return a control's name among the compiled components."""
    return f"control_{config.name}"


def load_controls(
    pipeline: Any, family: Family, config: HandlerConfig, dtype: str, *, model_dir: Path
) -> tuple[Control, ...]:
    """Return the configured controls.

    Args:
        model_dir: where a relative path is looked up.

    Raises:
        ConfigError: names the entry that does not fit.
    """
    controls = []
    for index, entry in enumerate(config.controls or ()):
        try:
            module, digest, residuals = load_t2i_adapter(model_dir / entry.path, pipeline, family, dtype)
        except ConfigError as error:
            raise ConfigError(f"handler.controls[{index}].path: {error}") from error
        controls.append(Control(entry, T2I_ADAPTER, digest, module, residuals))
    return tuple(controls)


def list_unet_inputs(controls: Sequence[Control], unet: Any, *, height: int, width: int) -> list[tuple[int, int, int]]:
    """Return channels, height and width of the UNet's inputs for controls; none without controls.

    Args:
        height, width: of the latents.
    """
    count = max((each.residuals for each in controls), default=0)
    return list_residual_shapes(unet, height, width)[:count]
