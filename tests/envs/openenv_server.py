"""An OpenEnv server on a port of this machine, for openenv_test.py."""

from __future__ import annotations

import sys
from typing import Any

import uvicorn
from openenv.core.env_server import Action, Environment, Observation, State, create_fastapi_app


class Guess(Action):
    guess: str


class Told(Observation):
    message: str


class Numbers(Environment):
    SUPPORTS_CONCURRENT_SESSIONS = True

    def reset(self, seed: int | None = None, **more: Any) -> Told:
        self.number, self._state = seed, State()
        return Told(message="a number from 0 to 99", done=False, reward=None)

    def step(self, action: Guess, **more: Any) -> Told:
        if action.guess == str(self.number):
            return Told(message="right", done=True, reward=1.0)
        low = action.guess.isdigit() and int(action.guess) < self.number
        return Told(message="higher" if low else "lower", done=False, reward=0.0)

    @property
    def state(self) -> State:
        return self._state


uvicorn.run(
    create_fastapi_app(Numbers, Guess, Told, max_concurrent_envs=8),
    host="127.0.0.1",
    port=int(sys.argv[1]),
    log_level="warning",
)
