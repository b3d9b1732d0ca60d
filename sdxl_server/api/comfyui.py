"""ComfyUI's graph, which its PNG files hold in its API's format: the settings of its sampler, under A1111's names."""

import json
from collections.abc import Iterator, Mapping
from pathlib import PureWindowsPath
from typing import Any

from sdxl_server.api.infotext import build_metadata, write_value
from sdxl_server.errors import RequestError
from sdxl_server.request.limits import Limits

MAX_CHARACTERS = 5_000_000
SAMPLERS = ("KSampler", "KSamplerAdvanced", "SamplerCustom")
ENCODERS = ("CLIPTextEncode", "CLIPTextEncodeSDXL")
NO_PROMPT = "ConditioningZeroOut"
EMPTY_LATENT = "EmptyLatentImage"
LORAS = ("LoraLoader", "LoraLoaderModelOnly")
CHECKPOINT = "CheckpointLoaderSimple"
SCHEDULES = {  # nodes that name a schedule by their class
    "KarrasScheduler": "karras",
    "ExponentialScheduler": "exponential",
    "PolyexponentialScheduler": "polyexponential",
}
CONDITIONING = ("conditioning", "conditioning_to", "conditioning_1", "positive")  # inputs that a node passes on
LATENT = ("samples", "latent_image")
VALUE = ("value", "text", "string", "seed", "int", "float")
Node = Mapping[str, Any]


def read_graph(text: str, limits: Limits) -> dict[str, Any]:
    """Return an image's metadata from ComfyUI's graph; see `read_infotext`.

    Raises:
        RequestError: the text is no graph, or it has no sampler that is known here.
    """
    graph = _Graph(text)
    sampler = graph.choose_sampler()
    parameters = graph.read_sampler(sampler)
    latent = graph.find(sampler, ("latent_image",), LATENT, (EMPTY_LATENT,))
    if latent:
        parameters.pop("Denoising strength")
        sides = [graph.read(latent, name) for name in ("width", "height")]
        parameters["Size"] = "x".join(map(write_value, sides))
    positive = graph.find(sampler, ("positive",), CONDITIONING, ENCODERS)
    negative = graph.find(sampler, ("negative",), CONDITIONING, (*ENCODERS, NO_PROMPT))
    prompt, more = graph.read_prompt(positive, "prompt_2")
    negative_prompt, more_negative = graph.read_prompt(negative, "negative_prompt_2")
    parameters |= more_negative | more
    skip = graph.find(positive, ("clip",), ("clip",), ("CLIPSetLastLayer",), is_noted=False)
    if skip and isinstance(layer := graph.read(skip, "stop_at_clip_layer"), int):
        parameters["Clip skip"] = -layer
    tags, more = graph.read_model(sampler)
    parameters |= more
    parameters["Nodes"] = ", ".join(dict.fromkeys(graph.left)) or None
    texts = {name: write_value(value) for name, value in parameters.items() if value is not None}
    return build_metadata((prompt or "") + tags, negative_prompt, texts, limits)


class _Graph:
    """A graph of nodes. Each node has a class and inputs: values, or links to the outputs of other nodes.

    Attributes:
        left: the classes of nodes that are not understood.
    """

    def __init__(self, text: str) -> None:
        try:
            if len(text) > MAX_CHARACTERS:
                raise ValueError(f"it has {len(text)} characters; at most {MAX_CHARACTERS} are read")
            found = json.loads(text)  # with NaN, which ComfyUI writes
        except (ValueError, RecursionError) as error:
            raise RequestError(f"the graph of ComfyUI is not JSON: {error}") from error
        self.left: list[str] = []
        self._nodes: dict[str, Node] = {
            name: node for name, node in (found.items() if isinstance(found, dict) else ()) if _is_node(node)
        }

    def choose_sampler(self) -> Node:
        """Return the sampler of the first pass.

        Raises:
            RequestError: there is none.
        """
        samplers = [node for node in self._nodes.values() if node["class_type"] in SAMPLERS]
        if not samplers:
            raise RequestError(f"the graph of ComfyUI has none of the samplers that are read: {', '.join(SAMPLERS)}")
        first = next((each for each in samplers if not self._follows_sampler(each)), samplers[0])
        self.left += [f"second {each['class_type']}" for each in samplers if each is not first]
        return first

    def read_sampler(self, node: Node) -> dict[str, Any]:
        """Return the parameters of a sampler and of the nodes that choose its method and its noise levels."""
        method, sigmas = node, node
        if node["class_type"] == "SamplerCustom":
            method = self.find(node, ("sampler",), (), ("KSamplerSelect",)) or {"inputs": {}}
            kinds = ("BasicScheduler", *SCHEDULES)
            sigmas = self.find(node, ("sigmas",), ("sigmas",), kinds) or {"class_type": "", "inputs": {}}
        steps, end = self.read(sigmas, "steps"), self.read(node, "end_at_step")
        seed = "noise_seed" if "noise_seed" in node["inputs"] else "seed"
        is_cut = isinstance(end, int) and isinstance(steps, int) and 0 < end < steps
        if self.read(node, "start_at_step"):
            self.left.append("start_at_step")
        return {
            "Steps": steps,
            "Sampler": self.read(method, "sampler_name"),
            "Schedule type": SCHEDULES.get(sigmas["class_type"]) or self.read(sigmas, "scheduler"),
            "CFG scale": self.read(node, "cfg"),
            "Seed": self.read(node, seed),
            "Denoising strength": self.read(sigmas, "denoise"),
            "denoising_end": end / steps if is_cut else None,
        }

    def read_prompt(self, node: Node | None, second: str) -> tuple[str | None, dict[str, Any]]:
        """Return a prompt, and what SDXL's node adds to it.

        Args:
            second: the field of the second text encoder's prompt.
        """
        if node is None or node["class_type"] == NO_PROMPT:
            return None, {}
        if node["class_type"] != ENCODERS[1]:
            return write_value(self.read(node, "text") or ""), {}
        prompt, other = (write_value(self.read(node, name) or "") for name in ("text_l", "text_g"))
        pairs = {
            "original_size": ("height", "width"),
            "crops_coords_top_left": ("crop_h", "crop_w"),
            "target_size": ("target_height", "target_width"),
        }
        more = {field: [self.read(node, name) for name in names] for field, names in pairs.items()}
        more = {field: each for field, each in more.items() if all(type(side) is int for side in each)}
        return prompt, more | ({second: other} if other != prompt else {})

    def read_model(self, sampler: Node) -> tuple[str, dict[str, Any]]:
        """Return the LoRAs of a sampler's model as A1111's tags, and the parameters of the model."""
        tags, parameters = "", {}
        for node in self._follow(sampler, ("model",), ("model",)):
            kind = node["class_type"]
            if kind in LORAS:
                name = PureWindowsPath(write_value(self.read(node, "lora_name"))).stem
                names = ("strength_clip", "strength_model")[0 if kind == LORAS[0] else 1 :]
                tags = f" <lora:{name}:{':'.join(write_value(self.read(node, each)) for each in names)}>" + tags
            elif kind == CHECKPOINT:
                parameters["Model"] = PureWindowsPath(write_value(self.read(node, "ckpt_name"))).stem
            elif kind == "RescaleCFG":
                parameters["CFG rescale"] = self.read(node, "multiplier")
            else:
                self.left.append(kind)
        return tags, parameters

    def find(
        self,
        node: Node | None,
        first: tuple[str, ...],
        passed: tuple[str, ...],
        kinds: tuple[str, ...],
        *,
        is_noted: bool = True,
    ) -> Node | None:
        """Return the first node of some kinds behind an input; note the others on the way.

        Args:
            first: the input of the node, then `passed`: those of the nodes behind it.
        """
        for each in self._follow(node, first, passed):
            if each["class_type"] in kinds:
                return each
            self.left += [each["class_type"]] if is_noted else []
        return None

    def read(self, node: Node, name: str) -> Any:
        """Return the value of an input, also from a node that holds one value. None: there is none."""
        if not _is_link(value := node["inputs"].get(name)):
            return value
        for each in self._follow(node, (name,), VALUE):
            for held in (name, *VALUE):
                if held in each["inputs"] and not _is_link(each["inputs"][held]):
                    return each["inputs"][held]
            self.left.append(each["class_type"])
        return None

    def _follows_sampler(self, node: Node) -> bool:
        return any(each["class_type"] in SAMPLERS for each in self._follow(node, ("latent_image",), LATENT))

    def _follow(self, node: Node | None, first: tuple[str, ...], passed: tuple[str, ...]) -> Iterator[Node]:
        """Yield the nodes behind an input, each once."""
        names, seen = first, set[str]()
        while node is not None:
            link = next((node["inputs"][name] for name in names if _is_link(node["inputs"].get(name))), None)
            if link is None or link[0] in seen:
                return
            seen.add(link[0])
            node, names = self._nodes.get(link[0]), passed
            if node is not None:
                yield node


def _is_node(node: Any) -> bool:
    return isinstance(node, dict) and isinstance(node.get("class_type"), str) and isinstance(node.get("inputs"), dict)


def _is_link(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)
