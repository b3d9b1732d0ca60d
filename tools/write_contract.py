"""Write openapi.json and README's table of the fields, for SDXL base under the shipped model-config.yaml.

python -m tools.write_contract
"""

import json
import re

from generation_request import Contract, build_openapi, describe_schema
from pipeline_utils import HandlerConfig, build_contract
from tools.random_model import make_pipeline
from tools.server import ROOT

DOCUMENT = ROOT / "openapi.json"
README = ROOT / "README.md"
START, END = "<!-- fields: python -m tools.write_contract -->\n", "<!-- end of fields -->"


def build_shipped_contract() -> Contract:
    """Return the contract of Stable Diffusion XL base 1.0 under the shipped settings."""
    pipeline = make_pipeline("tiny")
    pipeline.unet.register_to_config(sample_size=128)
    pipeline.text_encoder.config.num_hidden_layers = 12
    pipeline.text_encoder_2.config.num_hidden_layers = 32
    return build_contract(pipeline, HandlerConfig())


def make_table(contract: Contract) -> str:
    """Return the fields as a Markdown table."""
    rows = ["| field | meaning | takes | default |", "| --- | --- | --- | --- |"]
    for name, schema in contract.properties.items():
        accepted = describe_schema(schema)
        default = f"`{schema['default']}`" if "default" in schema else ""
        rows.append(f"| `{name}` | {schema['description']} | {accepted} | {default} |")
    return "\n".join(rows) + "\n"


def fill_readme(text: str, contract: Contract) -> str:
    """Return README's text with the table between its marks."""
    table = START + make_table(contract) + END
    return re.sub(re.escape(START) + ".*?" + re.escape(END), lambda _: table, text, flags=re.DOTALL)


def main() -> None:
    contract = build_shipped_contract()
    DOCUMENT.write_text(json.dumps(build_openapi(contract), indent=2) + "\n")
    README.write_text(fill_readme(README.read_text(), contract))


if __name__ == "__main__":
    main()
