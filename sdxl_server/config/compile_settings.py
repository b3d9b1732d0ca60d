"""The `pt2` section of model-config.yaml: what compiles the model."""

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from sdxl_server.config.declaration import declare, read_section
from sdxl_server.errors import ConfigError
from sdxl_server.schemas import any_text, shorten, switch

# The backends whose work can be checked, with torch.compile's names for them. `openvino` is this project's own.
# `openvino_stock` is the one inside OpenVINO, for comparison.
BACKENDS = {
    "openvino": "openvino_backend",
    "inductor": "inductor",
    "cudagraphs": "cudagraphs",
    "openvino_stock": "openvino",
}


@dataclass(frozen=True)
class CompileConfig:
    """The `pt2` section: keywords of torch.compile. Without a `backend` PyTorch runs eagerly."""

    backend: str | None = declare(
        any_text(f"one of {', '.join(BACKENDS)}"),
        "what compiles; `cudagraphs` needs `deviceType: gpu`",
        value=None,
    )
    mode: str | None = declare(
        any_text("a mode of torch.compile"),
        "mode of inductor, such as reduce-overhead; not together with `options`",
        value=None,
    )
    dynamic: bool | None = declare(
        switch(), "torch.compile's keyword; openvino accepts only false", value=None, null="its default"
    )
    fullgraph: bool | None = declare(
        switch(),
        "torch.compile's keyword; `false`: what the backend cannot compile runs in eager PyTorch, and `describe` "
        "counts `graph_breaks`; openvino accepts only true",
        value=None,
        null="true",
    )
    options: Mapping[str, Any] | None = declare(
        {"type": "object", "x-accepted": "the backend's options by name"},
        "options of the backend; openvino's are listed below",
        value=None,
        null="none",
    )

    @classmethod
    def parse(cls, raw: Any) -> Self:
        """Check and return `pt2`: a backend's name, torch.compile's keywords, or TorchServe's {compile: {enable: ...}}.

        Raises:
            ConfigError: names the key, what is accepted and what was given.
        """
        section = "pt2"
        if raw is None:
            return cls()
        if isinstance(raw, str):
            raw = {"backend": raw}
        if isinstance(raw, Mapping) and "compile" in raw:
            if len(raw) > 1 or not isinstance(raw["compile"], Mapping):
                raise ConfigError(f"pt2 with a compile section takes nothing else, not {shorten(raw)}")
            section, raw = "pt2.compile", dict(raw["compile"])
            enable = raw.pop("enable", False)
            if not isinstance(enable, bool):
                raise ConfigError(f"pt2.compile.enable takes true or false, not {shorten(enable)}")
            if not enable:
                return cls()
        if isinstance(raw, Mapping):
            raw = {"backend": "inductor", **raw}  # torch.compile's own default
        config: Self = read_section(cls, raw, section)
        if config.backend == BACKENDS["openvino"]:
            config = dataclasses.replace(config, backend="openvino")
        config._check_backend(section)
        return config

    def _check_backend(self, section: str) -> None:
        import torch

        if self.backend not in BACKENDS:
            near = difflib.get_close_matches(str(self.backend)[:60].lower(), BACKENDS, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            if self.backend in torch._dynamo.list_backends(exclude_tags=None):
                hint = f". {self.backend} cannot run this model: nothing would show whether it ran"
            raise ConfigError(
                f"{section}.backend takes one of {', '.join(BACKENDS)}, not {shorten(self.backend)}{hint}"
            )
        if self.backend == "openvino":
            from openvino_backend import Options

            try:
                Options.parse(self.options)
            except ValueError as error:  # OptionsError, or a number with too many digits to print
                raise ConfigError(f"{section}.options: {error}") from error
            # Otherwise code that dynamo cannot trace would run in eager PyTorch, and OpenVINO needs each shape.
            if self.dynamic or self.fullgraph is False:
                raise ConfigError(f"{section}: openvino needs dynamic: false, fullgraph: true, or neither key")
        if self.mode is not None and self.backend != "inductor":
            raise ConfigError(f"{section}.mode is for the inductor backend, not for {shorten(self.backend)}")
        if self.mode is not None and self.options is not None:
            raise ConfigError(f"{section} takes mode or options, not both: a mode is a set of options")
        if self.mode is not None and self.mode not in (modes := torch._inductor.list_mode_options()):
            raise ConfigError(f"{section}.mode takes one of {', '.join(modes)}, not {shorten(self.mode)}")
        if self.backend == "inductor" and self.options is not None:
            try:
                torch.compile(lambda: None, options=dict(self.options))  # checks them, and compiles nothing yet
            except Exception as error:  # of several classes
                reason = shorten(str(error), length=200)
                raise ConfigError(f"{section}.options: inductor cannot run this model with them: {reason}") from error
