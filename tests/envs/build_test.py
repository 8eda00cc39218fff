"""A user's own environment, by path: made with its arguments, or refused with the reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmtrain.config.environment import EnvironmentConfig
from llmtrain.envs.build import environment_maker

OWN = str(Path(__file__).with_name("own.py"))


def settings(name: str, **args: int) -> EnvironmentConfig:
    return EnvironmentConfig(function=f"{OWN}:{name}", args=args, unsandboxed=True)


def test_each_episode_has_its_own() -> None:
    make = environment_maker(settings("Guess", most=20))
    one, other = make(), make()
    assert one.start({"number": 3}) == [{"role": "user", "content": "Guess a number up to 20."}]
    other.start({"number": 4})
    assert one.step("3").done and not other.step("3").done


@pytest.mark.parametrize(
    ("name", "args", "reason"),
    [
        ("Guess", {"most": 0}, "cannot be made: ValueError: most must be positive; mend it, or its args"),
        ("Guess", {"least": 0}, "cannot be made: TypeError"),
        ("Nothing", {}, "cannot be loaded: AttributeError"),
        ("Half", {}, "has no role, players, start, step, which llmtrain/envs/base.py asks for; add them"),
    ],
)
def test_what_cannot_be_made_is_refused(name: str, args: dict[str, int], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        environment_maker(settings(name, **args))
