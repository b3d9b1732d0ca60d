"""Mark image files for machines as made by a model: in XMP with IPTC's digital source type, and signed by C2PA.

IPTC: https://cv.iptc.org/newscodes/digitalsourcetype/. C2PA: https://spec.c2pa.org.
"""

import io
from pathlib import Path
from typing import Any

from sdxl_server import __version__
from sdxl_server.config.settings import HandlerConfig
from sdxl_server.errors import ConfigError
from sdxl_server.request.fields import GenerationRequest
from sdxl_server.schemas import shorten

SOURCES = "http://cv.iptc.org/newscodes/digitalsourcetype/"
NAMESPACES = {
    "xmlns:Iptc4xmpExt": "http://iptc.org/std/Iptc4xmpExt/2008-02-29/",
    "xmlns:xmp": "http://ns.adobe.com/xap/1.0/",
}


def find_source_type(request: GenerationRequest) -> str:
    """Return IPTC's address for the origin of an image: of the model alone, or of an uploaded image, too."""
    is_composite = request.image is not None
    return SOURCES + ("compositeWithTrainedAlgorithmicMedia" if is_composite else "trainedAlgorithmicMedia")


class Marker:
    """Marks files as `handler.marking` says.

    Raises:
        ConfigError: C2PA's library, the certificate or its key is missing or wrong.
    """

    def __init__(self, config: HandlerConfig) -> None:
        self._has_xmp, self._model, self._context = config.marking != "none", Path(config.model_path).name, None
        if config.marking == "c2pa":
            self._context = _load_signer(config)
            self._check_signature(config)
        elif config.c2pa_certificate or config.c2pa_key:
            raise ConfigError(f"handler.c2pa_certificate and c2pa_key need marking: c2pa, not {config.marking}")

    def list_properties(self, request: GenerationRequest) -> dict[str, str]:
        """Return the XMP properties of an image; none if files are not marked."""
        if not self._has_xmp:
            return {}
        tool, source = f"sdxl_server {__version__}", find_source_type(request)
        return {**NAMESPACES, "xmp:CreatorTool": tool, "Iptc4xmpExt:DigitalSourceType": source}

    def sign(self, file: bytes, request: GenerationRequest) -> bytes:
        """Return an image file with a signed C2PA manifest; unchanged without C2PA."""
        return self._sign(file, request.output_format, find_source_type(request)) if self._context else file

    def _sign(self, file: bytes, kind: str, source: str) -> bytes:
        from c2pa import Builder

        software = {"name": "sdxl_server", "version": __version__}
        action = {"action": "c2pa.created", "digitalSourceType": source, "softwareAgent": software}
        actions = [{**action, "parameters": {"model": self._model}}]
        assertions = [{"label": "c2pa.actions.v2", "data": {"actions": actions}}]
        signed = io.BytesIO()
        builder = Builder({"claim_generator_info": [software], "assertions": assertions}, context=self._context)
        builder.sign(f"image/{kind}", io.BytesIO(file), signed)
        return signed.getvalue()

    def _check_signature(self, config: HandlerConfig) -> None:
        """Sign an empty image, which shows a certificate without this key, or one for other purposes."""
        from c2pa import C2paError
        from PIL import Image

        blank = io.BytesIO()
        Image.new("RGB", (8, 8)).save(blank, "png")
        try:
            self._sign(blank.getvalue(), "png", SOURCES)
        except C2paError as error:
            raise _explain(error, config) from error


def _load_signer(config: HandlerConfig) -> Any:
    """Return c2pa's context with the operator's certificate."""
    try:
        from c2pa import C2paError, C2paSignerInfo, Context, Signer
    except ImportError as error:
        raise ConfigError("handler.marking: c2pa needs its library: pip install c2pa-python") from error
    texts = {}
    for name in ("c2pa_certificate", "c2pa_key"):
        path = getattr(config, name)
        if path is None:
            raise ConfigError(f"handler.marking: c2pa needs handler.{name}, a PEM file")
        try:
            texts[name] = Path(path).read_bytes()
        except OSError as error:
            raise ConfigError(f"handler.{name} takes a PEM file, and {path}: {error.strerror}") from error
    try:
        info = C2paSignerInfo(config.c2pa_algorithm.encode(), *texts.values(), None)
        # A thumbnail would be larger than a small image.
        context = Context.from_dict({"builder": {"thumbnail": {"enabled": False}}}, signer=Signer.from_info(info))
    except C2paError as error:
        raise _explain(error, config) from error
    return context


def _explain(error: Exception, config: HandlerConfig) -> ConfigError:
    accepted = f"a certificate chain for signing and its {config.c2pa_algorithm} key, in PEM"
    reason = shorten(str(error), length=200)
    return ConfigError(f"handler.c2pa_certificate and c2pa_key take {accepted}: {reason}")
