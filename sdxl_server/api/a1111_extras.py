"""A1111's extras: an uploaded image, or several, enlarged by the upscaler without drawing."""

import base64
import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from sdxl_server.api.a1111 import A1111Api
from sdxl_server.api.a1111_values import coerce, read_as, warn_of_effects
from sdxl_server.api.bodies import read_fields
from sdxl_server.api.native import JSON, EncodedImage
from sdxl_server.api.warnings import warn_of_unknown
from sdxl_server.errors import RequestError
from sdxl_server.request.contract import Contract
from sdxl_server.request.fields import GenerationRequest
from sdxl_server.request.uploads import Upload, read_upload
from sdxl_server.schemas import choice, shorten, whole

DEFAULT_FACTOR = 2  # A1111's
FIELDS = ("resize_mode", "upscaler_1", "upscaling_resize")
# Without an equivalent: the values that have no effect anyway. Other values get a warning.
NO_EQUIVALENT: Mapping[str, Sequence[Any]] = {
    **{"upscaler_2": ("None",), "extras_upscaler_2_visibility": (0,), "gfpgan_visibility": (0,)},
    **{"codeformer_visibility": (0,), "codeformer_weight": (0,)},
}
# For the other resize mode, for faces, and for A1111's own page.
SILENT = ("upscaling_resize_w", "upscaling_resize_h", "upscaling_crop", "upscale_first", "show_extras_results")


class A1111ExtraApi(A1111Api):
    """Reads extra-single-image."""

    uploads, is_batch = "image", False

    def __init__(self, model: Mapping[str, str] = MappingProxyType({})) -> None:
        super().__init__(model)
        self._files: list[str] = []

    def read(
        self, values: Mapping[str, Any], *, content_type: str, contract: Contract
    ) -> tuple[GenerationRequest, list[str]]:
        """Return the request in TorchServe's parameters, and warnings.

        Raises:
            RequestError: names the field as A1111 does, what is accepted and what was given.
        """
        given = read_fields(values, content_type=content_type or JSON, properties={}, aliases={})
        known = {name: value for name, value in given.items() if value not in (None, "")}
        if contract.limits.upscaler is None:
            raise RequestError("this server has no upscaler", param="upscaler_1")
        if read_as(known, "resize_mode", whole(0, 1), 0):
            raise RequestError("resize_mode takes 0, a factor: send upscaling_resize", param="resize_mode")
        read_as(known, "upscaler_1", choice(contract.limits.upscaler.name), None)
        factor = coerce(known.get("upscaling_resize", DEFAULT_FACTOR), contract.properties["upscale"])
        fields = {"image": self.read_uploads(known, contract), "upscale": factor, "output_format": "png"}
        request = contract.check(fields, names={"image": self.uploads, "upscale": "upscaling_resize"})
        read = (*FIELDS, *NO_EQUIVALENT, *SILENT, self.uploads)
        unknown = warn_of_unknown([name for name in given if name not in read])
        return request, [*warn_of_effects(known, NO_EQUIVALENT), *unknown]

    def read_uploads(self, known: Mapping[str, Any], contract: Contract) -> tuple[Upload, ...]:
        """Return the images."""
        if "image" not in known:
            raise RequestError("image is missing; send an image in base64", param="image")
        return (read_upload("image", known["image"], max_side=contract.limits.config.max_upscaled_side),)

    def write_image(
        self, request: GenerationRequest, image: EncodedImage, index: int, *, kind: str, warnings: Sequence[str]
    ) -> bytes:
        """Keep the image for the JSON at the end."""
        self._files.append(base64.b64encode(image.file).decode())
        return b""

    def write_end(self, request: GenerationRequest, warnings: Sequence[str]) -> bytes:
        """Return the JSON."""
        images = {"images": self._files} if self.is_batch else {"image": next(iter(self._files), "")}
        return json.dumps({"html_info": "; ".join(warnings), **images}).encode()


class A1111ExtraBatchApi(A1111ExtraApi):
    """Reads extra-batch-images."""

    uploads, is_batch = "imageList", True

    def read_uploads(self, known: Mapping[str, Any], contract: Contract) -> tuple[Upload, ...]:
        """Return the images."""
        listed, most = known.get("imageList"), contract.properties["num_images_per_prompt"]["maximum"]
        if not isinstance(listed, list) or not 1 <= len(listed) <= most:
            count = f"{len(listed)} entries" if isinstance(listed, list) else shorten(listed)
            raise RequestError(
                f'imageList takes 1 to {most} images such as {{"data": "<base64>", "name": "a.png"}}, not {count}',
                param="imageList",
            )
        files = [each.get("data") if isinstance(each, Mapping) else each for each in listed]
        side = contract.limits.config.max_upscaled_side
        return tuple(read_upload(f"imageList[{index}].data", each, max_side=side) for index, each in enumerate(files))
