"""Stable Diffusion XL behind a server: settings and requests in, images and events out."""

import sys

__version__ = "0.3.0"

# OpenVINO and NNCF report each import to Google Analytics, from a process that they fork. Where this module is not
# installed they leave it out.
sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
