"""The sections of model-config.yaml: what is accepted, and what a mistake is told."""

import dataclasses
import logging
import re
from typing import Any

import pytest
import yaml

from sdxl_server.config.compile_settings import CompileConfig
from sdxl_server.config.settings import PUBLISHED_KEYS_WITHOUT_EFFECT, HandlerConfig, check_server_keys
from sdxl_server.errors import ConfigError
from tools.server import ROOT

SHIPPED = (ROOT / "model-config.yaml").read_text()
# The handler section of the example that the guide was published with.
PUBLISHED = """
model_path: "Base_Diffusion_model"
num_inference_steps: 30
compile_unet: true
compile_mode: "max-autotune"
compile_vae: true
enable_fused_projections: true
do_quant: false
change_comp_config: true
no_bf16: true
no_sdpa: false
upcast_vae: false
is_xl: true
"""


def test_shipped_file_holds_every_key_with_its_default() -> None:
    handler = yaml.safe_load(SHIPPED)["handler"]
    defaults = dataclasses.asdict(HandlerConfig())
    assert handler.pop("profile", False) is defaults.pop("profile")
    assert handler == defaults


def test_shipped_file_has_safe_settings() -> None:
    settings = yaml.safe_load(SHIPPED)
    assert settings["minWorkers"] == settings["maxWorkers"] == 1
    assert 600 <= settings["responseTimeout"] <= 1800
    queue = settings["handler"]["max_running"] + settings["handler"]["max_waiting"]
    assert (
        settings["batchSize"] == queue + settings["jobQueueSize"]
    )  # nobody waits where TorchServe alone knows of them
    assert queue <= settings["jobQueueSize"] <= 10  # as many as there is room for may come within one step
    assert settings["startupTimeout"] >= 3600
    assert CompileConfig.parse(settings["pt2"]) == CompileConfig(backend="openvino")


def test_guides_line_for_profiling_can_be_appended() -> None:
    assert SHIPPED.endswith("\n")
    handler = yaml.safe_load(SHIPPED + "    profile: true\n")["handler"]
    assert HandlerConfig.parse(handler).profile is True


def test_page_of_settings_has_a_row_for_every_key() -> None:
    page, _, _ = (ROOT / "docs/settings.md").read_text().partition("An entry of `adapters`")
    rows = dict(re.findall(r"^\| `(\w+)` \|[^|]*\|[^|]*\| `([^`]*)` \|", page, re.MULTILINE))
    defaults = {key: yaml.safe_load(SHIPPED)["handler"].get(key, False) for key in dataclasses.asdict(HandlerConfig())}
    assert {key: yaml.safe_load(value) for key, value in rows.items() if key in defaults} == defaults


def test_published_file_is_accepted_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        config = HandlerConfig.parse(yaml.safe_load(PUBLISHED))
    assert config == HandlerConfig(is_xl=True, num_inference_steps=30)
    assert len(caplog.records) == 1
    for key in PUBLISHED_KEYS_WITHOUT_EFFECT:
        assert key in caplog.text


@pytest.mark.parametrize(
    ("handler", "key", "accepted", "given"),
    [
        ({"num_inference_steps": "30"}, "num_inference_steps", "whole number from 1 to 1000", "'30'"),
        ({"num_inference_steps": 0}, "num_inference_steps", "whole number from 1 to 1000", "0"),
        ({"num_inference_steps": True}, "num_inference_steps", "whole number from 1 to 1000", "True"),
        ({"guidance_scale": -1}, "guidance_scale", "number from 0 to 100", "-1"),
        ({"guidance_scale": float("nan")}, "guidance_scale", "number from 0 to 100", "nan"),
        ({"width": 100}, "width", "multiple of 8", "100"),
        ({"height": 8192}, "height", "64 to 4096", "8192"),
        ({"dtype": "bf16"}, "dtype", "one of auto, float32, bfloat16, float16", "'bf16'"),
        ({"is_xl": "yes"}, "is_xl", "true or false", "'yes'"),
        ({"profile": 1}, "profile", "true or false", "1"),
        ({"model_path": ""}, "model_path", "a folder", "''"),
        ({"scheduler": 3}, "scheduler", "a scheduler as requests name it", "3"),
        ({"jpeg_quality": 101}, "jpeg_quality", "1 to 100", "101"),
        ({"steps": 3}, "steps", "num_inference_steps", "steps"),
        ({"allowed_sizes": 1024}, "allowed_sizes", "a list of sizes", "1024"),
        ({"allowed_sizes": []}, "allowed_sizes", "a list of sizes", "[]"),
        ({"allowed_sizes": ["100x64"]}, "allowed_sizes", "multiples of 8", "100x64"),
        ({"allowed_sizes": ["1024x1024"], "max_side": 512}, "allowed_sizes", "max_side, 512", "1024x1024"),
        ([1], "handler", "keys and values", "[1]"),
        (5, "handler", "keys and values", "5"),
        ("fast", "handler", "keys and values", "'fast'"),
    ],
)
def test_wrong_handler_settings_are_told(handler: Any, key: str, accepted: str, given: str) -> None:
    with pytest.raises(ConfigError) as caught:
        HandlerConfig.parse(handler)
    for part in ("handler", key, accepted, given):
        assert part in str(caught.value)


@pytest.mark.parametrize("key", ["max_side", "allowed_sizes", "profile", None])
def test_odd_settings_are_told_in_few_words(key: Any) -> None:
    values: tuple[Any, ...] = (10**5000, "x" * 10**6, [["64x64"]] * 10**5, {1: {2: {3: {4: 5}}}}, b"\xff")
    for value in values:
        for parse, raw in ((HandlerConfig.parse, {key: value}), (CompileConfig.parse, {"backend": value})):
            with pytest.raises(ConfigError) as caught:
                parse(raw)
            assert len(str(caught.value)) < 1000
    with pytest.raises(ConfigError, match="handler.'a number of 16610 bits' is not a key"):
        HandlerConfig.parse({10**5000: 1})


def test_odd_options_of_a_backend_are_told() -> None:
    with pytest.raises(ConfigError, match=r"pt2.options"):
        CompileConfig.parse({"backend": "openvino", "options": {"device": 10**5000}})


@pytest.mark.parametrize("key", ["jobQueueSize", "responseTimeout"])
@pytest.mark.parametrize("value", [0, -1, 2**31, 1.5, True, "8", None, []])
def test_numbers_that_torchserve_would_replace_are_refused(key: str, value: Any) -> None:
    check_server_keys(yaml.safe_load(SHIPPED))
    with pytest.raises(ConfigError, match=rf"{key} takes a whole number from 1"):
        check_server_keys({key: value})


@pytest.mark.parametrize("settings", [[], "x", 5])
def test_a_file_without_keys_is_told(settings: Any) -> None:
    with pytest.raises(ConfigError, match="keys and values"):
        check_server_keys(settings)


@pytest.mark.parametrize(
    ("name", "is_passed_on"),
    [
        *((name, True) for name in ("PATH", "HOME", "LC_ALL", "TMPDIR", "PYTHONPATH", "OMP_NUM_THREADS", "TS_X")),
        *((name, True) for name in ("OPENVINO_LOG_LEVEL", "ONEDNN_VERBOSE", "HF_HOME", "TORCHINDUCTOR_CACHE_DIR")),
        *((name, False) for name in ("MYSQL_PWD", "GH_PAT", "DATABASE_URL", "AWS_PROFILE", "PATHX", "MY_HOME")),
        *((name, False) for name in ("HF_TOKEN", "TORCHSERVE_TOKEN", "PYTHON_KEYRING", "https_proxy", "SSH_AUTH_SOCK")),
    ],
)
def test_workers_get_listed_variables(name: str, is_passed_on: bool) -> None:
    lines = (ROOT / "config.properties").read_text().splitlines()
    (pattern,) = (line.partition("=")[2] for line in lines if line.startswith("blacklist_env_vars="))
    assert (re.fullmatch(pattern, name) is None) is is_passed_on


@pytest.mark.parametrize(
    ("pt2", "expected"),
    [
        (None, CompileConfig()),
        ("openvino", CompileConfig(backend="openvino")),
        ({"backend": "openvino"}, CompileConfig(backend="openvino")),
        (
            {"backend": "openvino", "options": {"model_caching": True, "device": "CPU"}},
            CompileConfig(backend="openvino", options={"model_caching": True, "device": "CPU"}),
        ),
        ({"backend": "inductor", "mode": "reduce-overhead"}, CompileConfig(backend="inductor", mode="reduce-overhead")),
        ({"dynamic": False, "fullgraph": True}, CompileConfig(backend="inductor", dynamic=False, fullgraph=True)),
        ({"compile": {"enable": True}}, CompileConfig(backend="inductor")),
        ({"compile": {"enable": True, "backend": "openvino"}}, CompileConfig(backend="openvino")),
        ({"compile": {"enable": False, "backend": "openvino"}}, CompileConfig()),
        ("openvino_stock", CompileConfig(backend="openvino_stock")),
        ("cudagraphs", CompileConfig(backend="cudagraphs")),
    ],
)
def test_forms_of_pt2(pt2: Any, expected: CompileConfig) -> None:
    assert CompileConfig.parse(pt2) == expected


@pytest.mark.parametrize(
    ("pt2", "parts"),
    [
        ("openvinoo", ["pt2.backend", "openvino", "inductor", "'openvinoo'"]),
        ({"backend": 3}, ["pt2.backend", "3"]),
        ({"compile": {"enable": "yes"}}, ["pt2.compile.enable", "true or false", "'yes'"]),
        ({"compile": {"enable": True, "backendd": "x"}}, ["pt2.compile.backendd", "backend, mode"]),
        ({"compile": {"enable": True}, "backend": "inductor"}, ["pt2", "nothing else"]),
        ({"export": {"aot_compile": True}}, ["pt2.export", "backend"]),
        (["openvino"], ["pt2", "keys and values", "['openvino']"]),
        ({"backend": "openvino", "mode": "max-autotune"}, ["pt2.mode", "inductor"]),
        ({"backend": "inductor", "mode": "fast"}, ["pt2.mode", "max-autotune", "'fast'"]),
        ({"mode": "default", "options": {"freezing": True}}, ["mode or options", "not both"]),
        ({"backend": "openvino", "dynamic": True}, ["pt2", "dynamic: false, fullgraph: true"]),
        ({"backend": "openvino", "fullgraph": False}, ["pt2", "dynamic: false, fullgraph: true"]),
        ({"dynamic": "no"}, ["pt2.dynamic", "true or false, or null", "'no'"]),
        ({"backend": "openvino", "options": {"device": "GPU.7"}}, ["pt2.options", "device", "CPU", "'GPU.7'"]),
        ({"backend": "openvino", "options": {"devices": "CPU"}}, ["pt2.options", "'devices'", "model_caching"]),
        ({"backend": "openvino", "options": {"model_caching": "yes"}}, ["model_caching", "true or false", "'yes'"]),
        ({"backend": "openvino", "options": {"config": {"HINT": 1}}}, ["config", "'HINT'", "NUM_STREAMS"]),
        ({"backend": "openvino", "options": {"aot_autograd": False}}, ["aot_autograd", "true"]),
    ],
)
def test_wrong_pt2_is_told(pt2: Any, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        CompileConfig.parse(pt2)
    for part in parts:
        assert part in str(caught.value)
