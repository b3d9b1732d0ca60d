"""Prompt syntax of other programs, which has no meaning here."""

import re

PROMPTS = ("prompt", "prompt_2", "negative_prompt", "negative_prompt_2")
NUMBER_PATTERN = r"[-+]?(?:\d{1,9}(?:\.\d{0,9})?|\.\d{1,9})"
# The syntax of A1111, ComfyUI and compel. Each pattern has a maximum length, so that the search is fast. `\(` is a
# plain bracket in these programs too.
WEIGHTS = (  # prompt_weights.py reads them with weighted_prompts
    re.compile(rf"(?<!\\)\([^()]{{1,200}}:\s{{0,9}}{NUMBER_PATTERN}\s{{0,9}}\)"),  # (word:1.3)
    re.compile(r"(?<!\\)\([^()]{1,200}\)(?:\d\.\d|[+-]{1,9}(?!\w))"),  # (some words)1.3, (some words)++
    re.compile(r"(?<!\\)\(\([^()]{1,200}\)\)"),  # ((word))
)
LITERAL = (  # always plain words, with brackets and numbers
    re.compile(rf"(?<!\\)\[[^\[\]]{{0,100}}:[^\[\]]{{0,100}}:{NUMBER_PATTERN}\]"),  # [from:to:when]
    re.compile(r"(?<!\\)\[[^\[\]|]{1,100}\|[^\[\]]{1,100}\]"),  # [one|other]
    re.compile(r"<(?:lora|lyco|hypernet|ti|wildcard):[^<>]{0,200}>"),
)
EMBEDDING = re.compile(r"\bembedding:[\w.-]{1,200}")
# In a prompt that has small letters too.
BREAK, AND = re.compile(r"\bBREAK\b"), re.compile(r"\bAND\b")
