"""Preprocessing of control images: OpenCV draws edges. Clients make all other maps."""

import functools
from typing import Any

CANNY = "canny"
PACKAGE = "opencv-python-headless"
DEFAULT_THRESHOLDS = (100.0, 200.0)  # of the brightness's gradient: low and high


@functools.cache
def load_opencv() -> Any:
    """Return OpenCV; None if it is not installed, or cannot be loaded."""
    try:
        import cv2
    except ImportError:
        return None
    cv2.setNumThreads(1)  # others would compete with the compute thread
    return cv2


def draw_edges(image: Any, low: float, high: float) -> Any:
    """Return white edges on black of a Pillow image, by Canny's detector.

    Args:
        low, high: thresholds of the gradient. An edge begins above `high`, and goes on above `low`.
    """
    import numpy as np
    from PIL import Image

    return Image.fromarray(load_opencv().Canny(np.asarray(image.convert("RGB")), low, high)).convert("RGB")
