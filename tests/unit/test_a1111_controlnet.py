"""A1111's extension sd-webui-controlnet: units of requests, lists, and texts of images."""

import base64
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webuiapi
from PIL import Image, ImageDraw

from sdxl_server.api.a1111_documents import CONTROLNET_DOCUMENTS
from sdxl_server.api.http import HttpRequest
from sdxl_server.api.infotext import read_infotext, write_infotext
from sdxl_server.api.metadata import read_metadata
from sdxl_server.config.settings import HandlerConfig
from sdxl_server.errors import RequestError
from sdxl_server.model.loaded_pipeline import LoadedPipeline
from sdxl_server.request.controls import RegisteredControl
from sdxl_server.request.preprocessing import load_opencv
from sdxl_server.service import Service, describe_error
from tests.unit.pipelines import encode, load, make_picture
from tests.unit.test_a1111 import MASK, PHOTO, finish, open_images, read
from tests.unit.test_a1111 import ask as ask_a1111
from tests.unit.test_request import LIMITS, make_contract
from tools.random_model import save_controlnet

CONTROLS = {
    "edges": RegisteredControl(0.8),
    "Sketch": RegisteredControl(0.5),
    "union": RegisteredControl(0.6, modes=("openpose", "depth", "scribble", "canny")),
    "style": RegisteredControl(0.7, is_map=False),
}
UNIT_LIMITS = dataclasses.replace(LIMITS, controls=CONTROLS)
CONTRACT = make_contract(UNIT_LIMITS)
PLACE = "alwayson_scripts.controlnet.args[0]"
# The defaults of ControlNetUnit in Mikubill/sd-webui-controlnet: internal_controlnet/args.py
DEFAULTS: dict[str, Any] = {
    **{"is_ui": False, "input_mode": "simple", "batch_images": "", "output_dir": "", "loopback": False},
    **{"enabled": True, "module": "none", "weight": 1.0, "resize_mode": "Crop and Resize", "low_vram": False},
    **{"processor_res": -1, "threshold_a": -1.0, "threshold_b": -1.0, "guidance_start": 0.0, "guidance_end": 1.0},
    **{"pixel_perfect": False, "control_mode": "Balanced", "inpaint_crop_input_image": True, "hr_option": "Both"},
    **{"save_detected_map": True, "advanced_weighting": None, "effective_region_mask": None, "mask": None},
    **{"image_fg": None, "mask_image_fg": None},  # Forge's
    **{"pulid_mode": "Fidelity", "union_control_type": "Unknown", "ipadapter_input": None, "mask_image": None},
}


def draw_disc(width: int = 128, height: int = 64) -> Image.Image:
    image = Image.new("RGB", (width, height), "white")
    ImageDraw.Draw(image).ellipse((8, 8, 40, 40), fill="navy")
    return image


DISC = encode(draw_disc())


def wrap(*units: Any, script: str = "controlnet") -> dict[str, Any]:
    return {"alwayson_scripts": {script: {"args": list(units)}}}


def make_unit(**keys: Any) -> dict[str, Any]:
    return {"image": DISC, "model": "edges", **keys}


def read_unit(is_img2img: bool = False, **keys: Any) -> Any:
    """Return the control of a unit; there must be no warning."""
    request, warnings = read(is_img2img, CONTRACT, **wrap(make_unit(**keys)))
    assert warnings == []
    (control,) = request.control
    return control


def test_a_unit_is_a_control() -> None:
    control = read_unit(weight=0.6, guidance_start=0.1, guidance_end="0.9", resize_mode="Resize and Fill")
    assert control.describe() == {"name": "edges", "scale": 0.6, "from": 0.1, "to": 0.9, "resize_mode": "pad"}
    assert control.image.size == CONTRACT.size  # the unit decides no size
    assert read_unit().describe() == {"name": "edges", "scale": 0.8, "from": 0.0, "to": 1.0}  # this server's defaults
    assert read_unit(**DEFAULTS).scale == 1.0
    assert read_unit(guidance=0.5).end == 0.5  # the older name


@pytest.mark.parametrize("script", ["controlnet", "ControlNet", "CONTROLNET"])
def test_the_script_has_its_name_in_any_case(script: str) -> None:
    request, warnings = read(contract=CONTRACT, **wrap(make_unit(), script=script))
    assert (len(request.control), warnings) == (1, [])


@pytest.mark.parametrize(
    "model", ["edges", "Edges", "edges [abcd1234]", "edges.safetensors", "t2i/edges.pth [12345678]"]
)
def test_models_are_known_by_their_names(model: str) -> None:
    assert read_unit(model=model).name == "edges"
    assert read_unit(model="sketch [abcd1234]").name == "Sketch"


@pytest.mark.parametrize(
    "image",
    [
        {"image": DISC},
        {"image": f"data:image/png;base64,{DISC}"},
        {"image": {"image": DISC, "mask": None}},
        {"image": None, "input_image": DISC},
        {"image": "", "input_image": f"data:image/png;base64,{DISC}"},
    ],
)
def test_images_come_in_several_forms(image: dict[str, Any]) -> None:
    assert np.array_equal(np.asarray(read_unit(**image).image), np.asarray(draw_disc()))


@pytest.mark.parametrize(
    ("given", "mode"),
    [
        *(
            (0, "stretch"),
            (1, "crop"),
            (2, "pad"),
            ("2", "pad"),
            ("Just Resize", "stretch"),
            ("crop and resize", "crop"),
        ),
        *(
            ("Resize and Fill", "pad"),
            ("Scale to Fit (Inner Fit)", "crop"),
            ("Envelope (Outer Fit)", "pad"),
            (None, None),
        ),
    ],
)
def test_resize_modes(given: Any, mode: str | None) -> None:
    assert read_unit(resize_mode=given).resize_mode == mode


@pytest.mark.parametrize("mode", [0, "0", "Balanced", "balanced", None])
def test_balanced_is_the_only_control_mode(mode: Any) -> None:
    assert read_unit(control_mode=mode)


@pytest.mark.parametrize(
    ("keys", "thresholds"),
    [
        ({}, (100, 200)),
        ({"threshold_a": -1, "threshold_b": -1}, (100, 200)),
        ({"threshold_a": 64, "threshold_b": "64"}, (64, 64)),
        ({"threshold_a": 150, "threshold_b": 50}, (50, 150)),
        ({"threshold_b": 120.5}, (100, 120.5)),
    ],
)
def test_canny_draws_the_edges(keys: dict[str, Any], thresholds: tuple[float, float]) -> None:
    control = read_unit(module="Canny", **keys)
    assert control.thresholds == thresholds
    assert set(np.unique(np.asarray(control.image))) == {0, 255}
    assert read_unit(threshold_a=3).thresholds is None


def test_an_ip_adapter_encodes_its_image_itself() -> None:
    for module in ("none", "ip-adapter-auto", "ip-adapter_clip_sdxl", "CLIP-ViT-H (IPAdapter)"):
        assert read_unit(model="style", module=module).name == "style"


def test_union_types_are_modes() -> None:
    for given, mode in (("Hard Edge", "canny"), ("openpose", "openpose"), ("Unknown", None), (None, None)):
        assert read_unit(model="union", union_control_type=given).mode == mode
    assert read_unit(union_control_type="Hard Edge").mode is None


@pytest.mark.parametrize(
    "unit",
    [
        {"enabled": False, "model": "openpose", "module": "openpose"},
        {"enabled": "false", "model": "edges"},
        {"model": "None"},
        {"model": None, "module": "None", "image": DISC},
        {**DEFAULTS, "model": "None", "image": None},
        {},
    ],
)
def test_units_without_an_effect_are_left_out(unit: dict[str, Any]) -> None:
    for contract in (CONTRACT, make_contract(LIMITS)):
        request, warnings = read(contract=contract, **wrap(unit))
        assert (request.control, warnings) == (None, [])
    both, _ = read(contract=CONTRACT, **wrap(unit, make_unit(), unit))
    assert [each.name for each in both.control] == ["edges"]


@pytest.mark.parametrize("script", [{}, {"args": []}, {"args": None}, [], {"args": make_unit(enabled=False)}])
def test_an_empty_script_has_no_effect(script: Any) -> None:
    request, warnings = read(contract=CONTRACT, alwayson_scripts={"ControlNet": script})
    assert (request.control, warnings) == (None, [])


@pytest.mark.parametrize(
    ("keys", "warning"),
    [
        ({"mask": DISC}, f"{PLACE}.mask has no effect here"),
        ({"image": {"image": DISC, "mask": DISC}}, f"{PLACE}.mask has no effect here"),
        ({"guess_mode": True}, f"{PLACE}.guess_mode has no effect here, and True is ignored"),
        ({"foo": 1}, f"ignored, since there is no such field: '{PLACE}.foo'"),
        (
            {"model": "None", "module": "reference_only"},
            f"{PLACE} has no model, and its module 'reference_only' is ign",
        ),
    ],
)
def test_keys_without_an_effect_are_warned_of(keys: dict[str, Any], warning: str) -> None:
    (found,) = read(contract=CONTRACT, **wrap(make_unit(**keys)))[1]
    assert found.startswith(warning)


def test_other_scripts_are_warned_of() -> None:
    scripts = {**wrap(make_unit())["alwayson_scripts"], "ADetailer": {"args": [True]}}
    request, (warning,) = read(contract=CONTRACT, alwayson_scripts=scripts)
    assert len(request.control) == 1
    assert warning == "alwayson_scripts has no effect here, and {'ADetailer': {'args': [True]}} is ignored"


@pytest.mark.parametrize(
    ("keys", "field", "message"),
    [
        ({"model": "depth"}, "model", "takes one of edges, Sketch, union, style, not 'depth'"),
        ({"model": 3}, "model", "takes one of edges, Sketch, union, style, not 3"),
        ({"module": "openpose"}, "module", "takes none or canny, not 'openpose'; send the finished map"),
        (
            {"model": "style", "module": "canny"},
            "module",
            "takes none or ip-adapter-auto, not 'canny'; send the finished",
        ),
        ({"module": "canny", "threshold_a": "x"}, "threshold_a", "takes a number from -1 to 255, not 'x'"),
        ({"weight": "strong"}, "weight", "takes a number from 0 to 10, not 'strong'"),
        ({"weight": -1}, "weight", "takes a number from 0 to 10, not -1"),
        ({"guidance_start": 1.5}, "guidance_start", "takes a number from 0 to 1, not 1.5"),
        (
            {"guidance_start": 0.5, "guidance_end": 0.5},
            "guidance_end",
            "takes a share above guidance_start, 0.5, not 0.5",
        ),
        ({"control_mode": "ControlNet is more important"}, "control_mode", "takes Balanced, not 'ControlNet is more"),
        ({"control_mode": 2}, "control_mode", "takes Balanced, not 2"),
        ({"resize_mode": "Tile"}, "resize_mode", "takes Just Resize or Crop and Resize or Resize and Fill, not 'Tile'"),
        ({"resize_mode": 3}, "resize_mode", "takes Just Resize or Crop and Resize or Resize and Fill, not 3"),
        ({"enabled": "maybe"}, "enabled", "takes true or false, not 'maybe'"),
        ({"image": None}, "image", "is missing: send the image of the control"),
        ({"image": "AAAA"}, "image", "takes a whole image as JPEG"),
        ({"image": {"image": 3}}, "image", "takes an image in base64, not 3"),
        ({"image": None, "input_image": "http://host/a.png"}, "input_image", "takes base64, not 'http://host/a.png'"),
        (
            {"model": "union", "union_control_type": "Tile"},
            None,
            "mode takes one of openpose, depth, scribble, canny, not",
        ),
    ],
)
def test_mistakes_are_told_in_the_extensions_names(keys: dict[str, Any], field: str | None, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        read(contract=CONTRACT, **wrap(make_unit(**keys)))
    status, described = describe_error(caught.value, "id", path="sdapi/v1/txt2img")
    (detail,) = described["detail"]
    assert message in detail["msg"]
    assert "\n" not in detail["msg"]
    if field:
        assert detail["msg"].startswith(f"{PLACE}.{field} ")
        assert (status, detail["loc"]) == (422, ["body", f"{PLACE}.{field}"])


@pytest.mark.parametrize(
    ("scripts", "message"),
    [
        (wrap("x"), f"{PLACE} takes an object with image and model, not 'x'"),
        (wrap(True, make_unit()), f"{PLACE} takes an object with image and model, not True"),
        ({"alwayson_scripts": {"controlnet": {"args": "x"}}}, "alwayson_scripts.controlnet.args takes a list of units"),
        ({"alwayson_scripts": {"controlnet": 3}}, "alwayson_scripts.controlnet.args takes a list of units, not 3"),
        (wrap(*[make_unit()] * 3), "alwayson_scripts.controlnet.args takes at most 2 enabled units, not 3"),
        (wrap(*[make_unit()] * 2), "alwayson_scripts.controlnet.args takes each control once, not edges, edges"),
    ],
)
def test_wrong_lists_are_told(scripts: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as caught:
        read(contract=CONTRACT, **scripts)
    assert str(caught.value).startswith(message)


def test_a_server_without_controls_says_so() -> None:
    with pytest.raises(RequestError, match=r"model takes None, since this server has no controls, not 'edges \[ab\]'"):
        read(**wrap(make_unit(model="edges [ab]")))


def test_without_opencv_canny_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    load_opencv.cache_clear()
    try:
        assert read_unit(module="none")
        with pytest.raises(
            RequestError, match="module takes none, not 'canny'; canny needs the package opencv-python-head"
        ):
            read_unit(module="canny")
    finally:
        load_opencv.cache_clear()


def test_image_to_image_lends_its_image() -> None:
    start = encode(PHOTO)
    fields = {"init_images": [start], "width": 64, "height": 64, "resize_mode": 2}
    request, warnings = read(True, CONTRACT, **fields, **wrap({"model": "edges", "resize_mode": "Just Resize"}))
    (control,) = request.control
    assert warnings == []
    assert control.resize_mode is None  # it is resized as the image to start from is
    assert np.array_equal(np.asarray(control.image)[20:40], np.asarray(request.image)[20:40])
    request, _ = read(True, CONTRACT, **fields, **wrap(make_unit(resize_mode="Just Resize")))
    assert np.array_equal(
        np.asarray(request.control[0].image), np.asarray(draw_disc().resize((64, 64), Image.Resampling.LANCZOS))
    )
    request, warnings = read(True, CONTRACT, init_images=[start], mask=encode(MASK), **wrap({"model": "edges"}))
    assert (request.is_crop, warnings) == (True, [])  # A1111's default draws only the masked part
    assert np.array_equal(np.asarray(request.control[0].image), np.asarray(PHOTO))


# Drawings and lists of a model.


@pytest.fixture(scope="module")
def loaded(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> LoadedPipeline:
    folder = tmp_path_factory.mktemp("controlnets") / "edges"
    save_controlnet(tiny_model, folder)
    entries = [{"name": "edges", "path": str(folder)}]
    controls = HandlerConfig.parse({"controls": entries}).controls
    return load(tiny_model, num_inference_steps=2, width=64, height=64, controls=controls)


def ask(service: Service, path: str) -> Any:
    return finish(service.answer(HttpRequest({}, path=f"controlnet/{path}")))


def test_webuiapi_draws_with_its_units(loaded: LoadedPipeline) -> None:
    """The body that webuiapi.WebUIApi.txt2img sends."""
    service, image = Service(loaded), draw_disc(64, 64)
    (model,) = ask(service, "model_list")["model_list"]
    assert model == f"edges [{loaded.controls[0].sha256[:8]}]"
    modules = ask(service, "module_list")["module_list"]
    for module in modules:
        unit = webuiapi.ControlNetUnit(image, module=module, model=model, weight=0.9, resize_mode="Just Resize")
        body = {"prompt": "a red fox", "seed": 1, "steps": 2, **wrap(unit.to_dict(), script="ControlNet")}
        answer = finish(ask_a1111(service, "txt2img", body))
        (drawn,) = open_images(answer)
        edges = {"preprocess": "canny", "low_threshold": 64, "high_threshold": 64} if module == "canny" else {}
        native, sizes = {"name": "edges", "image": encode(image), "scale": 0.9, **edges}, {"width": 64, "height": 64}
        expected = make_picture(loaded, num_inference_steps=2, control=native, **sizes)
        assert np.array_equal(np.asarray(drawn), expected)
        assert not np.array_equal(expected, make_picture(loaded, num_inference_steps=2))
        assert answer["parameters"]["alwayson_scripts"] == {}  # without images
        info = json.loads(answer["info"])
        assert info["warnings"] == []
        assert (
            f'ControlNet 0: "Module: {module}, Model: {model}, Weight: 0.9, Resize Mode: Just' in info["infotexts"][0]
        )
        assert (
            read_metadata_of(answer, loaded)["control"][0].items() >= {"name": "edges", "scale": 0.9, **edges}.items()
        )


def read_metadata_of(answer: Any, loaded: LoadedPipeline) -> Any:
    return read_metadata(base64.b64decode(answer["images"][0]), loaded.contract.limits)["request"]


def test_lists_have_the_extensions_form(loaded: LoadedPipeline) -> None:
    service = Service(loaded)
    assert ask(service, "version") == {"version": 3}
    assert ask(service, "settings") == {"control_net_unit_count": 2}
    listed = ask(service, "module_list")
    assert (listed["module_list"], listed["module_detail"]["none"]["sliders"]) == (["none", "canny"], [])
    assert [each["value"] for each in listed["module_detail"]["canny"]["sliders"]] == [100, 200]
    (types,) = ask(service, "control_types")["control_types"].values()
    assert types["model_list"] == ["None", *ask(service, "model_list")["model_list"]]
    assert {types["default_model"], types["default_option"]} == {"None", "none"}
    assert finish(ask_a1111(service, "scripts"))["txt2img"] == ["controlnet"]
    with pytest.raises(RequestError) as caught:
        ask(service, "detect")
    status, described = describe_error(caught.value, "id", path="controlnet/detect")
    assert (status, list(described)) == (404, ["error", "detail", "body", "errors"])
    assert "the paths are controlnet/version, controlnet/settings" in described["detail"]


def test_lists_of_a_server_without_controls(tiny_model: Path) -> None:
    service = Service(load(tiny_model))
    for path in CONTROLNET_DOCUMENTS:
        assert ask(service, path) is not None
    assert ask(service, "model_list") == {"model_list": []}
    assert ask(service, "module_list")["module_list"] == ["none"]
    assert finish(ask_a1111(service, "scripts")) == {"txt2img": [], "img2img": []}


# Texts of images.

LAST = "Steps: 20, Sampler: Euler, CFG scale: 7, Seed: 5, Size: 128x64"


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"weight": 0.65, "guidance_start": 0.25, "guidance_end": 0.75},
        {"resize_mode": "Resize and Fill", "module": "canny", "threshold_a": 20, "threshold_b": 90.5},
        {"model": "union", "union_control_type": "Depth"},
    ],
)
def test_what_is_written_is_read(keys: dict[str, Any]) -> None:
    request, _ = read(contract=CONTRACT, **wrap(make_unit(**keys), make_unit(model="Sketch", weight=0)))
    described = request.describe()
    digests = [{"name": name, "sha256": "ab" * 32} for name in ("edges", "Sketch")]
    text = write_infotext({"request": described, "made_with": {"controls": digests}})
    again = read_infotext(text, UNIT_LIMITS)
    assert again["request"]["control"] == described["control"]
    name = described["control"][0]["name"]
    assert again["warnings"] == [
        f"control: the metadata lacks the image of {each}; send it again" for each in (name, "Sketch")
    ]


def test_the_text_is_the_extensions() -> None:
    request, _ = read(contract=CONTRACT, **wrap(make_unit(module="canny", weight=1, guidance_end=0.8)))
    made_with = {"controls": [{"name": "edges", "sha256": "ab" * 32}]}
    text = write_infotext({"request": request.describe(), "made_with": made_with})
    assert (
        'ControlNet 0: "Module: canny, Model: edges [abababab], Weight: 1.0, Resize Mode: Crop and Resize, '
        "Threshold A: 100.0, Threshold B: 200.0, Guidance Start: 0.0, Guidance End: 0.8, Pixel Perfect: True, "
        'Control Mode: Balanced"' in text
    )


@pytest.mark.parametrize(
    ("unit", "control", "warnings"),
    [
        (
            "Module: none, Model: edges [d14c016b], Weight: 1.0, Resize Mode: Crop and Resize, Processor Res: 512, "
            "Threshold A: 0.5, Guidance Start: 0.0, Guidance End: 0.8, Pixel Perfect: True, Control Mode: Balanced",
            {"name": "edges", "scale": 1.0, "from": 0.0, "to": 0.8},
            ["control: the metadata lacks the image of edges; send it again"],
        ),
        (
            "preprocessor: canny, model: sketch [d14c016b], weight: 0.5, starting/ending: (0, 0.5), resize mode: "
            "Just Resize, pixel perfect: True, control mode: Balanced, preprocessor params: (512, 100, 200)",
            {
                **{"name": "Sketch", "scale": 0.5, "from": 0.0, "to": 0.5, "resize_mode": "stretch"},
                **{"preprocess": "canny", "low_threshold": 100.0, "high_threshold": 200.0},
            },
            ["control: the metadata lacks the image of Sketch; send it again"],
        ),
        (
            "Module: openpose_full, Model: edges, Weight: 0.9",
            {"name": "edges", "scale": 0.9},
            [
                "control: the metadata lacks the image of edges; send it again",
                "ControlNet 0.module takes none or canny, not 'openpose_full'; send the finished map",
            ],
        ),
        (
            "Module: none, Model: control_v11p_sd15_lineart [43d4be0d], Weight: 1",
            None,
            ["a control is left out: ControlNet 0.model takes one of edges, Sketch, union, style, not 'contr"],
        ),
        ("Module: none, Model: edges, Weight: much", None, ["a control is left out: ControlNet 0.weight takes a numb"]),
        ("x", None, ["a control is left out: ControlNet 0.model takes one of edges"]),
    ],
)
def test_texts_of_the_extension_are_read(unit: str, control: Any, warnings: list[str]) -> None:
    described = read_infotext(f"a fox\n{LAST}, ControlNet 0: {json.dumps(unit)}, Version: v1.10.1", UNIT_LIMITS)
    found = described["request"].get("control", [None])
    assert found == [control]
    assert len(described["warnings"]) == len(warnings)
    for one, other in zip(described["warnings"], warnings, strict=True):
        assert one.startswith(other)


def test_long_texts_take_no_time() -> None:
    unit = "Module: none, Model: edges" + ", a: b" * 60_000
    start = time.monotonic()
    read = read_infotext(f"a fox\n{LAST}, ControlNet 0: {json.dumps(unit)}", UNIT_LIMITS)
    assert read["request"]["control"] == [{"name": "edges"}]
    assert time.monotonic() - start < 5
