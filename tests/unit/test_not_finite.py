"""Numbers that are not finite end the work."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sdxl_server.diffusion.generation import generate, run_to_end
from sdxl_server.diffusion.previews import draw_preview
from sdxl_server.errors import ConfigError, NotFiniteError
from tests.spoiled import spoil_model
from tests.unit.pipelines import UNET_ONLY, encode, load


@pytest.mark.parametrize(
    ("kind", "pt2", "told"),
    [
        ("early", None, "in step 1: the UNet's output"),
        ("late", None, "in step 3: the UNet's output"),
        ("late", "openvino", "in step 3: the UNet's output"),
        ("overflow", None, "in step 1: the scheduler's result"),
        ("decoder", None, "in step 4: the VAE's decoded image"),
        ("encoder", None, "in step 0: the VAE's encoding of the image"),
        ("text", None, "in step 1: the UNet's output"),
    ],
)
def test_numbers_that_are_not_finite_are_no_picture(
    tiny_model: Path, tmp_path: Path, kind: str, pt2: Any, told: str
) -> None:
    settings = {} if pt2 is None else {"graphs": "static", **UNET_ONLY}
    loaded = load(spoil_model(tiny_model, tmp_path / "model", kind), pt2, preview="exact", **settings)
    fields = {"image": encode(Image.new("RGB", (128, 128)))} if kind == "encoder" else {}
    request = loaded.contract.check({"prompt": "a red fox", "seed": 7, **fields})
    with pytest.raises(NotFiniteError) as caught:
        run_to_end(generate(loaded, request))
    assert str(caught.value) == f"the image of seed 7 failed {told} holds numbers that are not finite"
    if kind == "decoder":
        with pytest.raises(NotFiniteError, match="seed 7 failed in step 1: the VAE's decoded image"):
            draw_preview(loaded, next(generate(loaded, request)))


@pytest.mark.parametrize(
    ("kind", "pt2"), [("early", None), ("late", None), ("overflow", None), ("decoder", "openvino"), ("text", None)]
)
def test_numbers_that_are_not_finite_end_the_warm_up(tiny_model: Path, tmp_path: Path, kind: str, pt2: Any) -> None:
    folder = spoil_model(tiny_model, tmp_path / "model", kind)
    with pytest.raises(
        ConfigError, match="^handler.dtype: float32: at the warm-up the image of seed .* not finite. The"
    ):
        load(folder, pt2, compile_unet=pt2 is None, compile_text_encoders=False, warm_up=True)
