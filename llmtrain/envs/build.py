"""Makes the environments that `rollout.environment` names."""

from __future__ import annotations

from collections.abc import Callable

from llmtrain.config.environment import EnvironmentConfig
from llmtrain.envs.base import Environment
from llmtrain.envs.calculator import CALCULATOR
from llmtrain.envs.python_tool import python_tool
from llmtrain.envs.toolbox import Tool, ToolBox
from llmtrain.envs.tools import ToolEnvironment
from llmtrain.rewards.scorer import absolute
from llmtrain.sandbox.server import load

Make = Callable[[], Environment]
"""Makes the environment of one episode."""

MAKERS: dict[str, Callable[[EnvironmentConfig], Tool]] = {
    "calculator": lambda settings: CALCULATOR,
    "python": lambda settings: python_tool(settings.deadline_s),
}
"""Maps the names in `rollout.environment.tools` to what makes the tool, once for all episodes of a rank."""


def environment_maker(settings: EnvironmentConfig) -> Make:
    """Returns what makes an environment for each episode; what they share, as workers of the sandbox, starts now.

    Raises ValueError for a class of the user's that cannot be loaded or made, RuntimeError where there is no sandbox.
    """
    if settings.function is not None:
        return own_maker(settings)
    box = ToolBox([MAKERS[name](settings) for name in settings.tools], settings.result_characters)
    return lambda: ToolEnvironment(box, settings.calls, settings.results, settings.system)


def own_maker(settings: EnvironmentConfig) -> Make:
    """Returns what makes the user's own environment, which runs in this process. One is made now, as a trial."""
    key = f"rollout.environment.function={settings.function}"
    try:
        kind = load(absolute(settings.function))
        trial = kind(**settings.args)
    except Exception as error:  # of any kind: it is the user's own code
        raise ValueError(f"{key}: cannot be made: {type(error).__name__}: {error}; mend it") from error
    missing = [name for name in ("tools", "role", "players", "start", "step", "close") if not hasattr(trial, name)]
    if missing:
        raise ValueError(f"{key}: has no {', '.join(missing)}, which llmtrain/envs/base.py asks for; add them")
    trial.close()
    return lambda: kind(**settings.args)
