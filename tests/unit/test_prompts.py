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
        ("a fox <ti:add_detail:0.8>", ["'<ti:add_detail:0.8>'"]),
        (r"miku \(vocaloid\)", [r"'\\('"]),
        ("a {red|blue} fox", ["'{red|blue}'"]),
        ("a {2$$red|blue|green} fox", ["'{2$$red|blue|green}'"]),
        ("{{masterpiece}}, a fox", ["'{{masterpiece}}'"]),
        ("a __colour__ fox", ["'__colour__'"]),
        ("a __animals/wild*__", ["'__animals/wild*__'"]),
        ("a fox++ in snow", ["'fox++'"]),
        ("a fox --ar 16:9 --v 6.1", ["'--ar 16:9'"]),
        ("a fox --no snow", ["'--no'"]),
        ("a fox \u2014ar 16:9", ["ar 16:9'"]),
        ("fox::2 snow::-0.5", ["'::2'"]),
        ("a fox ### ugly", ["'###'"]),
        ("a [fox:cat:0.5]", ["'[fox:cat:0.5]'"]),
        ("a [fox|cat]", ["'[fox|cat]'"]),
        ("ugly, embedding:EasyNegative", ["'embedding:EasyNegative'"]),
        (
            "<ti:x:1> a (red:1.3) fox BREAK snow",
            ["'<ti:x:1>', '(red:1.3)', 'BREAK' have no special meaning here and are"],
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
            "ratio (16:9",
            "x < y > z",
            "Disney+, 18+, a grade of A++, C++ and Notepad++",
            "a fox--a red one--runs; wow-- it runs -- fast --- and far",
            "a sign that says '--sale--' at 10::30, std::vector",
            "fill in the ____, snake__case, a {frame}, a|b, #1, ## title",
            "a shrug \u00af\\_(o)_/\u00af \u2014 so it goes",
        ),
    ],
)
def test_plain_words_are_not(prompt: str) -> None:
    assert warn_of_syntax("prompt", prompt) == []


@pytest.mark.parametrize(
    "piece",
    [
        "(",
        "[",
        "(:",
        "[:",
        "[|",
        "(a",
        "<lora:",
        "[::",
        "((",
        "1",
        "embedding:",
        " AND",
        "{",
        "{a|",
        "__a",
        "--ar ",
        "a+",
        "::1",
    ],
)
def test_no_prompt_takes_long(piece: str) -> None:
    start = time.process_time()
    warn_of_syntax("prompt", piece * (3000 // len(piece)))
    assert time.process_time() - start < 0.5
