"""Write what follows from the declarations of fields, settings and options: python -m tools.write_generated

- docs/openapi.json and the tables in docs/requests.md, for SDXL base under the shipped model-config.yaml;
- docs/settings.md, around which tools/settings.md stands.
"""

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sdxl_server.api.openapi import build_openapi
from sdxl_server.config.adapter_settings import AdapterConfig
from sdxl_server.config.compile_settings import CompileConfig
from sdxl_server.config.control_settings import ControlConfig
from sdxl_server.config.declaration import NEEDED, list_declarations
from sdxl_server.config.embedding_settings import EmbeddingConfig
from sdxl_server.config.settings import PUBLISHED_KEYS_WITHOUT_EFFECT, HandlerConfig
from sdxl_server.model.contract_builder import build_contract
from sdxl_server.model.families import FAMILIES
from sdxl_server.request.contract import Contract
from sdxl_server.request.samplers import ALIASES, split_sampler
from sdxl_server.schemas import describe_schema
from tools.random_model import make_pipeline
from tools.server import ROOT

FIELD_MARKS = ("<!-- fields: python -m tools.write_generated -->\n", "<!-- end of fields -->")
VARIABLE_MARKS = ("<!-- variables: python -m tools.write_generated -->\n", "<!-- end of variables -->")
ALIAS_MARKS = ("<!-- schedulers: python -m tools.write_generated -->\n", "<!-- end of schedulers -->")


def build_shipped_contract() -> Contract:
    """Return the contract of Stable Diffusion XL base 1.0 under the shipped settings."""
    pipeline = make_pipeline("tiny")
    pipeline.unet.register_to_config(sample_size=128)
    pipeline.text_encoder.config.num_hidden_layers = 12
    pipeline.text_encoder_2.config.num_hidden_layers = 32
    return build_contract(pipeline, FAMILIES["sdxl"], HandlerConfig(), graphs=None)


def make_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |\n" for line in lines)


def make_field_table(contract: Contract) -> str:
    """Return the fields of a request as a table."""
    rows = [
        [f"`{name}`", schema["description"], describe_schema(schema), _show_default(schema.get("default"))]
        for name, schema in contract.properties.items()
    ]
    return make_table(["field", "meaning", "takes", "default"], rows)


def make_alias_table() -> str:
    """Return the names of other programs for schedulers as a table."""
    groups: dict[str, list[str]] = {}
    for alias, meant in ALIASES.items():
        name, options = split_sampler(meant)
        told = ", ".join(f"`{option}: {json.dumps(value)}`" for option, value in options.items())
        groups.setdefault(f"`{name}`{f' with {told}' if told else ''}", []).append(alias)
    return make_table(["scheduler", "other names"], ((meant, ", ".join(names)) for meant, names in groups.items()))


def make_settings_table(section: Any) -> str:
    """Return the settings of a section of model-config.yaml as a table."""
    defaults = {each.name: each.default for each in dataclasses.fields(section)}
    rows = [
        [
            f"`{name}`",
            declaration.words,
            describe_schema(declaration.build_schema()),
            "none: it is needed" if defaults[name] is NEEDED else f"`{json.dumps(defaults[name])}`",
        ]
        for name, declaration in list_declarations(section).items()
    ]
    return make_table(["key", "meaning", "takes", "default"], rows)


def make_options_table() -> str:
    """Return the options of the openvino backend as a table."""
    from openvino_backend import Options

    rows = []
    for each in dataclasses.fields(Options):
        default = each.default if each.default_factory is dataclasses.MISSING else each.default_factory()
        about = each.metadata
        rows.append([f"`{each.name}`", about["meaning"], about["accepted"], f"`{json.dumps(default)}`"])
    return make_table(["option", "meaning", "takes", "default"], rows)


def make_variables_table() -> str:
    """Return the environment variables of the jobs' programs as a table."""
    from jobs.settings import Settings

    rows = []
    for name, each in Settings.model_fields.items():
        default = str(each.default or "none")
        rows.append([f"`JOBS_{name.upper()}`", str(each.description), f"`{default}`" if each.default else default])
    return make_table(["variable", "meaning", "default"], rows)


def make_settings_page() -> str:
    """Return docs/settings.md."""
    page = (ROOT / "tools/settings.md").read_text()
    tables: Mapping[str, str] = {
        "handler": make_settings_table(HandlerConfig),
        "adapters": make_settings_table(AdapterConfig),
        "embeddings": make_settings_table(EmbeddingConfig),
        "controls": make_settings_table(ControlConfig),
        "published": make_table(["key", "instead"], ([f"`{k}`", v] for k, v in PUBLISHED_KEYS_WITHOUT_EFFECT.items())),
        "pt2": make_settings_table(CompileConfig),
        "options": make_options_table(),
    }
    for name, table in tables.items():
        page = page.replace(f"{{{{ {name} }}}}\n", table)
    return page


def _show_default(value: Any) -> str:
    return "" if value is None else f"`{json.dumps(value) if not isinstance(value, str) else value}`"


def fill(text: str, marks: tuple[str, str], content: str) -> str:
    """Return a text with content between two marks."""
    start, end = marks
    pattern = re.escape(start) + ".*?" + re.escape(end)
    return re.sub(pattern, lambda _: start + content + end, text, flags=re.DOTALL)


def make_all() -> dict[Path, str]:
    """Return each file with what is generated in it."""
    contract = build_shipped_contract()
    requests, jobs = ROOT / "docs/requests.md", ROOT / "docs/jobs.md"
    return {
        ROOT / "docs/openapi.json": json.dumps(build_openapi(contract), indent=2) + "\n",
        requests: fill(
            fill(requests.read_text(), FIELD_MARKS, make_field_table(contract)), ALIAS_MARKS, make_alias_table()
        ),
        ROOT / "docs/settings.md": make_settings_page(),
        jobs: fill(jobs.read_text(), VARIABLE_MARKS, make_variables_table()),
    }


def main() -> None:
    for path, content in make_all().items():
        path.write_text(content)


if __name__ == "__main__":
    main()
