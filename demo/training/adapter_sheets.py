"""Draw the sheets of the adapters' cards.

Each row has other adapters, with the same prompts and seeds.

python -m demo.training.adapter_sheets
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from demo.measure import Prompt, choose_prompts, choose_vague, draw_prompts, draw_with, load_eager_pipeline, save_sheet

MODEL, ADAPTERS = Path("demo/model"), Path("demo/adapters")
COLUMNS = 8
FEW: Mapping[str, Any] = {"num_inference_steps": 4, "guidance_scale": 0.0}
SheetRow = tuple[Mapping[str, float], Mapping[str, Any]]  # scales of adapters by name, settings


def draw_sheet(path: Path, prompts: Sequence[Prompt], rows: Sequence[SheetRow]) -> None:
    images: list[Any] = []
    for scales, settings in rows:
        entries = [
            {"path": str(ADAPTERS / name / f"{name}.safetensors"), "scale": scale} for name, scale in scales.items()
        ]
        images += draw_prompts(prompts, draw_with(load_eager_pipeline(MODEL, adapters=entries), **settings))
    save_sheet(path, [*prompts] * len(rows), images, columns=COLUMNS)


def main() -> None:
    few_steps = {"few-steps": 1.0}
    draw_sheet(
        ADAPTERS / "inverted/sheet.jpg",
        choose_prompts(COLUMNS, seed=1),
        [({"inverted": scale}, {"num_inference_steps": 10}) for scale in (0.0, 0.5, 1.0)],
    )
    draw_sheet(
        ADAPTERS / "few-steps/sheet.jpg",
        [*choose_prompts(COLUMNS // 2, seed=1), *choose_vague(COLUMNS // 2, seed=1)],
        [({}, {"num_inference_steps": 30}), ({}, FEW), (few_steps, FEW), ({**few_steps, "inverted": 1.0}, FEW)],
    )


if __name__ == "__main__":
    main()
