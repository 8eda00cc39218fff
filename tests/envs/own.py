"""An environment as a user writes it."""

from llmtrain.envs.base import Reply


class Guess:
    tools, role, players = (), "user", 1

    def __init__(self, most: int = 9) -> None:
        if most < 1:
            raise ValueError("most must be positive")
        self.most = most

    def start(self, example: dict) -> list[dict]:
        self.number = example["number"]
        return [{"role": "user", "content": f"Guess a number up to {self.most}."}]

    def step(self, text: str) -> Reply:
        if text.strip() == str(self.number):
            return Reply(done=True, parts={"found": 1.0})
        return Reply([{"role": "user", "content": "no"}])

    def close(self) -> None:
        pass


class Half:
    tools = ()

    def close(self) -> None:
        pass
