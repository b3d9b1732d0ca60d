"""Prompt syntax of other programs: tags of adapters, and syntax that has no meaning here."""

import re

PROMPTS = ("prompt", "prompt_2", "negative_prompt", "negative_prompt_2")
NUMBER_PATTERN = r"[-+]?(?:\d{1,9}(?:\.\d{0,9})?|\.\d{1,9})"
TAG = re.compile(r"\s{0,9}<(lora|lyco|hypernet):([^<>]{0,200})>", re.IGNORECASE)  # A1111's; never words of the prompt
# The syntax of A1111, ComfyUI and compel. Each pattern has a maximum length, so that the search is fast. `\(` is a
# plain bracket in these programs too.
WEIGHTS = (  # prompt_weights.py reads them with weighted_prompts
    re.compile(rf"(?<!\\)\([^()]{{1,200}}:\s{{0,9}}{NUMBER_PATTERN}\s{{0,9}}\)"),  # (word:1.3)
    re.compile(r"(?<!\\)\(\([^()]{1,200}\)\)"),  # ((word))
    re.compile(r"\\[()\[\]]"),  # \(
)
LITERAL = (  # always plain words, with brackets and numbers
    re.compile(rf"(?<!\\)\[[^\[\]]{{0,100}}:[^\[\]]{{0,100}}:{NUMBER_PATTERN}\]"),  # [from:to:when]
    re.compile(r"(?<!\\)\[[^\[\]|]{1,100}\|[^\[\]]{1,100}\]"),  # [one|other]
    re.compile(r"<(?:ti|wildcard):[^<>]{0,200}>"),
)
FOREIGN = (  # plain words too, but weights may be inside
    re.compile(r"\bembedding:[\w.-]{1,200}"),
    re.compile(r"(?<!\\)\([^()]{1,200}\)(?:\d\.\d|[+-]{1,9}(?!\w))"),  # (some words)1.3, (some words)++
    re.compile(r"(?<![\w+-])(?!(?i:notepad|libstdc)\+)[^\W\d_]{3,40}\+{2,9}(?![\w+-])"),  # word++, but not C++
    re.compile(r"\{[^{}|]{0,100}\|[^{}]{0,200}\}"),  # {one|other}
    re.compile(r"\{\{[^{}]{1,200}\}\}"),  # {{word}}
    re.compile(r"(?<!\w)__\w[\w/*.-]{0,100}?__(?!\w)"),  # __name__
    # --ar 16:9, also with the dash that phones make of it
    re.compile(r"(?<!\S)(?:--|[\u2013\u2014])[a-z]{1,9}\s{1,9}\d[\d:.]{0,20}(?!\w)"),
    re.compile(r"(?<!\S)--(?:no|raw|tile|style|sref|cref)(?![\w-])"),
    re.compile(r"(?<=\w)::-?\d(?:\.\d{1,9})?(?!\w)"),  # word::2
    re.compile(r"(?<!#)#{3}(?!#)"),  # before AI Horde's negative prompt
)
# In a prompt that has small letters too.
BREAK, AND = re.compile(r"\bBREAK\b"), re.compile(r"\bAND\b")
