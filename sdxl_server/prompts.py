"""What prompts say in the languages of other programs, which mean nothing here."""

import re

from sdxl_server.schemas import shorten

PROMPTS = ("prompt", "prompt_2", "negative_prompt", "negative_prompt_2")
NUMBER = r"[-+]?(?:\d{1,9}(?:\.\d{0,9})?|\.\d{1,9})"
# A1111's, ComfyUI's and compel's. Each is bounded, so that no prompt takes long; `\(` is a plain bracket there too.
SYNTAX = tuple(
    re.compile(pattern)
    for pattern in (
        rf"(?<!\\)\([^()]{{1,200}}:\s{{0,9}}{NUMBER}\s{{0,9}}\)",  # (word:1.3)
        r"(?<!\\)\([^()]{1,200}\)(?:\d\.\d|[+-]{1,9}(?!\w))",  # (some words)1.3, (some words)++
        r"(?<!\\)\(\([^()]{1,200}\)\)",  # ((word))
        rf"(?<!\\)\[[^\[\]]{{0,100}}:[^\[\]]{{0,100}}:{NUMBER}\]",  # [from:to:when]
        r"(?<!\\)\[[^\[\]|]{1,100}\|[^\[\]]{1,100}\]",  # [one|other]
        r"<(?:lora|lyco|hypernet|ti|wildcard):[^<>]{0,200}>",
        r"\bembedding:[\w.-]{1,200}",
    )
)
WORDS = re.compile(r"\b(?:BREAK|AND)\b")  # in a prompt that is not all in capitals
MAX_SHOWN = 5


def find_syntax(name: str, prompt: str) -> list[str]:
    """Return a warning of what means something to other programs, none where there is nothing."""
    found = {each: each.search(prompt) for each in (*SYNTAX, *([] if prompt.isupper() else [WORDS]))}
    starts = sorted({match.start(): match[0] for match in found.values() if match}.items())
    if not starts:
        return []
    shown = ", ".join(shorten(text, length=40) for _, text in starts[:MAX_SHOWN])
    verbs = ("means", "is") if len(starts) == 1 else ("mean", "are")
    return [f"{name}: {shown} {verbs[0]} nothing here and {verbs[1]} read as plain words"]
