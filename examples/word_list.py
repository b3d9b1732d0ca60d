"""An example of a content filter: it refuses prompts that contain a word of words.txt.

words.txt has one word per line and lies next to this file. docs/security.md says how to use both.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

WORDS = {line.strip().casefold() for line in Path(__file__).with_name("words.txt").read_text().splitlines()} - {""}


def check(fields: Mapping[str, Any], image: Any) -> str | None:
    """Return why a request is refused, or None. This filter does not look at images."""
    texts = (str(fields.get(name, "")) for name in ("prompt", "prompt_2"))
    found = WORDS & set(re.findall(r"\w+", " ".join(texts).casefold()))
    return f"this server draws nothing with {', '.join(sorted(found))}" if found else None
