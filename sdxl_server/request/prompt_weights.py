"""Prompt weights in A1111's syntax: `(word:1.3)`, `[word]` and `BREAK`."""

import re
from typing import NamedTuple

from sdxl_server.errors import RequestError
from sdxl_server.request.fields import GenerationRequest
from sdxl_server.request.prompts import LITERAL, PROMPTS
from sdxl_server.schemas import shorten

MAX_WEIGHT = 10.0  # a larger weight makes noise, and float16 may overflow
FACTORS = {"(": 1.1, "[": 1 / 1.1}
TOKEN = re.compile(
    rf"""
      (?P<literal>{"|".join(f"(?:{each.pattern})" for each in LITERAL)})
    | \\(?P<escaped>[()\[\]\\]?)
    | (?P<open>[(\[])
    | :\s*(?P<weight>[-+]?[.\d]+)\s*\)
    | (?P<close>[)\]])
    | (?P<break>\bBREAK\b)
    | (?:(?!\bBREAK\b)[^\\()\[\]:<])+
    | .
    """,
    re.VERBOSE | re.DOTALL,
)


class Fragment(NamedTuple):
    """Words of one weight."""

    text: str
    weight: float


def parse_weights(prompt: str) -> list[list[Fragment]]:
    """Return a prompt's words with their weights, split at BREAK.

    The rules are A1111's. `(` means a weight of 1.1 and `[` of 1 / 1.1, and nested weights multiply. An open bracket
    applies to the end. A closing bracket without an opening one is plain text.

    Raises:
        ValueError: a weight is no number, or is too large. The message continues the field's name.
    """
    found: list[tuple[str | None, float]] = []  # None is BREAK
    opened: dict[str, list[int]] = {bracket: [] for bracket in FACTORS}

    def close(bracket: str, factor: float) -> None:
        start = opened[bracket].pop()
        found[start:] = [(text, weight * factor) for text, weight in found[start:]]

    for match in TOKEN.finditer(prompt):
        opening = "[" if match["close"] == "]" else "("
        if match["open"]:
            opened[match["open"]].append(len(found))
        elif (match["weight"] or match["close"]) and opened[opening]:
            close(opening, _read_number(match["weight"]) if match["weight"] else FACTORS[opening])
        else:
            plain = match[0] if match["escaped"] is None else match["escaped"]  # "" for a backslash before other text
            found.append((None if match["break"] else plain, 1.0))
    for bracket, starts in opened.items():
        while starts:
            close(bracket, FACTORS[bracket])
    return _merge(found)


def _read_number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"takes weights such as (word:1.3), not {shorten(text)}") from None


def _merge(found: list[tuple[str | None, float]]) -> list[list[Fragment]]:
    """Return the parts that are not empty; join neighbours of equal weight."""
    parts: list[list[Fragment]] = [[]]
    for text, weight in found:
        if text is None:
            parts.append([])
            continue
        if not abs(weight) <= MAX_WEIGHT:
            raise ValueError(
                f"takes weights from {-MAX_WEIGHT:g} to {MAX_WEIGHT:g} (nested weights multiply), not {weight:g} for "
                rf"{shorten(text)}; write plain brackets as \( and \)"
            )
        last = parts[-1].pop() if parts[-1] and parts[-1][-1].weight == weight else Fragment("", weight)
        parts[-1].append(Fragment(last.text + text, weight))
    said = [part for part in parts if any(each.text.strip() for each in part)]
    return said or [[Fragment("", 1.0)]]


def check_weights(request: GenerationRequest) -> None:
    """Refuse prompts with wrong weights.

    Raises:
        RequestError: names the field.
    """
    for name in PROMPTS:
        try:
            parse_weights(getattr(request, name) or "")
        except ValueError as error:
            raise RequestError(f"{name} {error}", param=name) from error
