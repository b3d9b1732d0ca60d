"""The handler's own judgement; all else of it is tested behind a real TorchServe."""

import logging

import pytest

from stable_diffusion_handler import StableDiffusionHandler


def test_steps_that_come_near_to_the_limit_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    handler = StableDiffusionHandler()
    handler.response_timeout, handler.longest = 9.0, 0.0
    told = []
    with caplog.at_level(logging.WARNING):
        for seconds in (2.9, 4.0, 3.5, 5.0):
            handler.watch_pace(seconds)
            told.append(len(caplog.records))
    assert told == [0, 1, 1, 2]
    assert "A call took 5 s. After 9 s TorchServe would have killed" in caplog.text
    assert "raise responseTimeout" in caplog.text
