"""Requests as clients of OpenAI's images API send them, made from the clients' sources; no test asks their servers."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from openai.types import ImagesResponse

GENERATIONS, EDITS = "v1/images/generations", "v1/images/edits"
LONG = "A photograph of a red fox in the snow, at dawn, with long shadows. " * 70  # as language models write prompts


class ReportedError(Exception):
    """What a client tells its user of an answer without a picture."""


def read_all(answer: Mapping[str, Any]) -> Any:
    """Read as Open WebUI and LangChain do: a loop over `data`, which raises where there is none."""
    return [each.get("url") or each["b64_json"] for each in answer["data"]]


def read_first(answer: Mapping[str, Any]) -> Any:
    """Read `data[0]`, which raises where there is none."""
    return [answer["data"][0]]


def read_by_axios(answer: Mapping[str, Any]) -> Any:
    """Read as LibreChat's edits do, which tell its user that there was no picture."""
    if not answer.get("data"):
        raise ReportedError("No image data returned from OpenAI API.")
    return answer["data"]


def read_by_litellm(answer: Mapping[str, Any]) -> Any:
    """Look for an error first: litellm_core_utils/llm_response_utils/convert_dict_to_response.py."""
    error = answer.get("error")
    if error is not None and (error.get("message") or error.get("code") is not None):
        raise ReportedError(error["code"], error["message"])
    return answer["data"]


def read_by_litellm_edit(answer: Mapping[str, Any]) -> Any:
    """Let the official client's class check what is there; no `data` is no pictures: litellm/types/utils.py."""
    return ImagesResponse(created=answer.get("created") or 1, data=answer.get("data") or []).data


@dataclass(frozen=True)
class Recorded:
    """What a client sends, and where it looks for the picture.

    Attributes:
        source: the repository and the file that it was made from.
        fields: of the JSON, or the texts of a form where there are files.
        files: the form's parts that hold a picture, by their names.
        query: what follows the path; TorchServe drops it, and nginx before it warns of that.
        reads: the key of each of the answer's `data` that the client reads.
        warned: what the answer warns of.
        read: gets the pictures out of an answer of status 200 as the client's source does, or raises.
        takes_sdk: it has the answer from the official SDK for Python.
    """

    source: str
    path: str
    fields: Mapping[str, Any]
    files: tuple[str, ...] = ()
    query: str = ""
    reads: str = "b64_json"
    warned: tuple[str, ...] = field(default=())
    read: Callable[[Mapping[str, Any]], Any] = read_all
    takes_sdk: bool = False

    def make_form(self, picture: bytes) -> dict[str, bytes]:
        """Return the parts of a form as TorchServe hands them over."""
        texts = {name: str(value).encode() for name, value in self.fields.items()}
        return {**texts, **dict.fromkeys(self.files, picture)}

    def make_body(self) -> bytes:
        return json.dumps(self.fields).encode()


RECORDED = {
    "Open WebUI": Recorded(
        "open-webui/open-webui: backend/open_webui/routers/images.py",
        GENERATIONS,
        {"model": "dall-e-2", "prompt": "a red fox", "n": 1, "size": "64x64", "response_format": "b64_json"},
    ),
    "Open WebUI with an API version and parameters of its operator": Recorded(
        "open-webui/open-webui: backend/open_webui/routers/images.py",
        GENERATIONS,
        {"model": "gpt-image-1", "prompt": LONG, "n": 1, "size": "auto", "steps": 20, "negative_prompt": "snow"},
        query="api-version=2025-04-01-preview",
        warned=("'steps'", "prompt has 4690 characters", "reads the first 77"),
    ),
    "Open WebUI's edit": Recorded(
        "open-webui/open-webui: backend/open_webui/routers/images.py",
        EDITS,
        {"model": "gpt-image-1", "prompt": "a red fox", "n": 1, "size": "64x64", "background": "transparent"},
        files=("image",),
        warned=("the image is opaque",),
    ),
    "LibreChat": Recorded(
        "danny-avila/LibreChat: api/app/clients/tools/structured/OpenAIImageTools.js",
        GENERATIONS,
        {
            **{"model": "gpt-image-1", "prompt": "a red fox", "n": 1, "background": "transparent"},
            **{"output_format": "webp", "output_compression": 100, "quality": "auto", "size": "auto"},
        },
        warned=("background has no effect here with 'transparent'",),
        read=read_first,
    ),
    "LibreChat's edit": Recorded(
        "danny-avila/LibreChat: api/app/clients/tools/structured/OpenAIImageTools.js",
        EDITS,
        {"model": "gpt-image-1", "prompt": "a red fox", "quality": "auto", "size": "auto"},
        files=("image[]",),
        query="api-version=2025-04-01-preview",
        read=read_by_axios,
    ),
    "LibreChat's DALL-E 3": Recorded(
        "danny-avila/LibreChat: api/app/clients/tools/structured/DALLE3.js",
        GENERATIONS,
        {
            **{"model": "dall-e-3", "quality": "standard", "style": "vivid", "size": "64x64"},
            **{"prompt": "a red fox", "n": 1},
        },
        reads="url",
        read=read_first,
    ),
    "LangChain": Recorded(
        "langchain-ai/langchain: libs/community/langchain_community/utilities/dalle_image_generator.py",
        GENERATIONS,
        {"prompt": "a red fox", "model": "dall-e-2", "n": 1, "quality": "standard", "size": "64x64"},
        reads="url",
        takes_sdk=True,
    ),
    "LangChain.js": Recorded(
        "langchain-ai/langchainjs: libs/langchain-openai/src/tools/dalle.ts",
        GENERATIONS,
        {
            **{"model": "gpt-image-1", "prompt": "a red fox", "n": 1, "size": "64x64", "response_format": "url"},
            **{"style": "vivid", "quality": "standard"},
        },
        reads="url",
    ),
    "LiteLLM": Recorded(
        "BerriAI/litellm: litellm/main.py, whose unknown parameters go into the body",
        GENERATIONS,
        {
            **{"model": "diffusion_fast", "prompt": "a red fox", "n": 2, "size": "64x64", "quality": "ultra"},
            **{"user": "proxy", "seed": -1, "metadata": {"team": "a"}, "guidance": 3},
        },
        warned=("'metadata', 'guidance'", "quality has no effect here with 'ultra'"),
        read=read_by_litellm,
        takes_sdk=True,
    ),
    "LiteLLM's edit": Recorded(
        "BerriAI/litellm: litellm/llms/openai/image_edit/transformation.py",
        EDITS,
        {"model": "dall-e-2", "prompt": "a red fox", "n": "1", "response_format": "b64_json", "user": "proxy"},
        files=("image[]",),
        read=read_by_litellm_edit,
    ),
    "OpenAI's SDK for Python": Recorded(
        "openai/openai-python: src/openai/resources/images.py",
        GENERATIONS,
        {
            **{"prompt": "a red fox", "background": "opaque", "model": "gpt-image-1.5", "moderation": "low", "n": 1},
            **{"output_compression": 90, "output_format": "jpeg", "partial_images": 0, "quality": "high"},
            **{"size": "64x64", "stream": False, "user": "user-1234", "seed": 7},
        },
        takes_sdk=True,
    ),
    "OpenAI's SDK for JavaScript": Recorded(
        "openai/openai-node: src/resources/images.ts",
        EDITS,
        {"prompt": "a red fox", "model": "gpt-image-1", "n": "1", "input_fidelity": "high", "stream": "false"},
        files=("image",),
    ),
}
