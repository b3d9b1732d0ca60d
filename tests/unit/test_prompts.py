"""What prompts say in the languages of other programs."""

import time

import pytest

from sdxl_server.api.warnings import warn_of_syntax


@pytest.mark.parametrize(
    ("prompt", "shown"),
    [
        ("a (red:1.3) fox", ["'(red:1.3)'"]),
        ("a (red fox : .5), snow", ["'(red fox : .5)'"]),
        ("a ((red)) fox", ["'((red))'"]),
        ("a (red fox)1.4 in snow", ["'(red fox)1.4'"]),
        ("a (red fox)++ in snow", ["'(red fox)++'"]),
        ("a fox BREAK snow", ["'BREAK'"]),
        ("a fox AND snow", ["'AND'"]),
        ("a fox <lora:add_detail:0.8>", ["'<lora:add_detail:0.8>'"]),
        ("a fox <hypernet:x>", ["'<hypernet:x>'"]),
        ("a [fox:cat:0.5]", ["'[fox:cat:0.5]'"]),
        ("a [fox|cat]", ["'[fox|cat]'"]),
        ("ugly, embedding:EasyNegative", ["'embedding:EasyNegative'"]),
        (
            "<lora:x:1> a (red:1.3) fox BREAK snow",
            ["'<lora:x:1>', '(red:1.3)', 'BREAK' have no special meaning here and are"],
        ),
        (f"a ({'x' * 150}:1.3) fox", ["...", "has no special meaning here and is read as plain words"]),
        ("a (f\u00fcchs\n:1.3)", ["\\xfc", "\\n"]),
    ],
)
def test_other_programs_syntax_is_told(prompt: str, shown: list[str]) -> None:
    (warning,) = warn_of_syntax("negative_prompt", prompt)
    assert warning.startswith("negative_prompt: ")
    assert all(each in warning for each in shown)
    assert warning.isascii()
    assert warning.isprintable()


@pytest.mark.parametrize(
    "prompt",
    [
        *(
            "a red fox",
            "a fox (animal) at 10:30",
            "a clock (10:30 in the morning)",
            "BREAK THE ICE AND GO",
            ":)",
            "C++",
        ),
        *(
            "a poster that says [sic]",
            "portrait, 16:9",
            "break and and",
            "a \\(red:1.3\\) fox",
            "ratio (16:9",
            "x < y > z",
        ),
    ],
)
def test_plain_words_are_not(prompt: str) -> None:
    assert warn_of_syntax("prompt", prompt) == []


@pytest.mark.parametrize("piece", ["(", "[", "(:", "[:", "[|", "(a", "<lora:", "[::", "((", "1", "embedding:", " AND"])
def test_no_prompt_takes_long(piece: str) -> None:
    start = time.process_time()
    warn_of_syntax("prompt", piece * (3000 // len(piece)))
    assert time.process_time() - start < 0.5
