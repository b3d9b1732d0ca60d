"""What prompts say in the languages of other programs, which mean nothing here."""

import re

PROMPTS = ("prompt", "prompt_2", "negative_prompt", "negative_prompt_2")
NUMBER = r"[-+]?(?:\d{1,9}(?:\.\d{0,9})?|\.\d{1,9})"
# A1111's, ComfyUI's and compel's. Each is bounded, so that no prompt takes long; `\(` is a plain bracket there too.
WEIGHTS = (  # which weighting.py reads, where it is to
    re.compile(rf"(?<!\\)\([^()]{{1,200}}:\s{{0,9}}{NUMBER}\s{{0,9}}\)"),  # (word:1.3)
    re.compile(r"(?<!\\)\([^()]{1,200}\)(?:\d\.\d|[+-]{1,9}(?!\w))"),  # (some words)1.3, (some words)++
    re.compile(r"(?<!\\)\(\([^()]{1,200}\)\)"),  # ((word))
)
LITERAL = (  # always plain words, brackets and numbers included
    re.compile(rf"(?<!\\)\[[^\[\]]{{0,100}}:[^\[\]]{{0,100}}:{NUMBER}\]"),  # [from:to:when]
    re.compile(r"(?<!\\)\[[^\[\]|]{1,100}\|[^\[\]]{1,100}\]"),  # [one|other]
    re.compile(r"<(?:lora|lyco|hypernet|ti|wildcard):[^<>]{0,200}>"),
)
EMBEDDING = re.compile(r"\bembedding:[\w.-]{1,200}")
# In a prompt that is not all in capitals.
BREAK, AND = re.compile(r"\bBREAK\b"), re.compile(r"\bAND\b")
