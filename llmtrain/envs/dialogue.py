"""Holds a conversation as tokens: those that the policy wrote as it wrote them, and between them what the chat template
puts there."""

from __future__ import annotations

from collections.abc import Sequence

from llmtrain.data.chat import CLOSE, OPEN, PROBE, Message, common
from llmtrain.data.encode import Draft, Encoder, Piece
from llmtrain.data.rows import Example
from llmtrain.data.tokenizer import Tokenizer
from llmtrain.envs.base import ToolSchema
from llmtrain.types import Sample

THOUGHT = "9876543210"  # a thought that is found again in the rendered text
KEEPS = "such as one that renders every message by itself"
NEW_ROW = "rollout.environment.rewritten=new_row: an episode then goes on in a new row, as it is rendered from there on"


class Rewritten(ValueError):
    """Says that the chat template renders earlier turns in another way once more turns follow."""


class Renderer:
    """Renders and encodes conversations with the tools of an environment, for one tokenizer; threads may share it.

    Raises ValueError when the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.chat = tokenizer.chat
        self.encoder = Encoder(tokenizer, [Example({}, prompt=[])], all_turns=False)
        names = self.chat.special.names
        self.ends = {self.chat.special.ids[content]: name for content, name in names.items()}

    def rendered(self, messages: Sequence[Message], tools: Sequence[ToolSchema]) -> str:
        """Returns the marked text of a conversation, up to the policy's next turn. Raises ValueError, without a place,
        when the template refuses it."""
        return self.chat.render(messages, True, list(tools) or None)

    def ids(self, text: str, goes_on: bool) -> list[int]:
        """Returns the tokens of marked text; with `goes_on` it follows tokens that are there already."""
        # all of it counts as trained, so that the encoder keeps the places by which it cuts what leads a text off
        piece = Piece(text, [(0, len(text))] if goes_on else (), goes_on)
        return next(self.encoder.encode([Draft([piece], [], [])]))[0] if text else []

    def between(
        self, before: str, history: Sequence[Message], new: Sequence[Message], tools: Sequence[ToolSchema]
    ) -> tuple[str, str]:
        """Returns (the whole rendered text, the part of it behind the policy's turn), up to its next turn.

        `history` ends with that turn, PROBE in place of what the policy wrote, behind the rendered text `before`; white
        space between them is the policy's to write. Raises Rewritten.
        """
        whole = self.rendered([*history, *new], tools)
        turn = whole[len(before) :].lstrip()
        if not (whole.startswith(before) and turn.startswith(PROBE)):
            raise Rewritten(
                "the chat template renders earlier turns in another way once more turns follow, so the tokens of an "
                f"episode would not be those that it renders; set tokenizer.chat_template to another, {KEEPS}, or "
                f"{NEW_ROW}"
            )
        return whole, turn[len(PROBE) :]

    def written(self, ids: Sequence[int]) -> str:
        """Returns a turn of the policy as text, without the token that ends it."""
        ended = bool(ids) and ids[-1] in self.ends
        return self.encoder.tokenizer.decode(ids[:-1] if ended else ids, skip_special=False)

    def following(self, behind: str, last_id: int) -> list[int]:
        """Returns the tokens of what stands behind a turn of the policy, without the token that ends the turn where
        that is `last_id`, its own last token."""
        end, bare = self.ends.get(last_id), behind.lstrip()
        if end and bare.startswith(end):
            return self.ids(bare, goes_on=False)[1:]
        return self.ids(behind, goes_on=True)


def policy_turn(content: str = PROBE) -> Message:
    """Returns a turn of the policy; PROBE stands for what it wrote, which the row that it wrote it in never renders."""
    return {"role": "assistant", "content": content}


def text_behind(whole: str, begun: str) -> str:
    """Returns what follows in a text behind `begun`, with which it begins but for white space. Raises Rewritten where
    it does not.

    Example: text_behind("say: 7<end> so?", "say:\n7 ") -> "<end> so?"
    """
    wanted = "".join(begun.split())
    places = [i for i, character in enumerate(whole) if not character.isspace()][: len(wanted)]
    if "".join(whole[i] for i in places) != wanted:
        raise Rewritten("the chat template renders in another way what the policy wrote")
    rest = whole[places[-1] + 1 if places else 0 :]
    return rest[common(rest, begun[len(begun.rstrip()) :]) :]  # white space that was written already


def check_template(
    renderer: Renderer,
    start: Sequence[Message],
    role: str,
    tools: Sequence[ToolSchema],
    keep_thinking: bool,
    new_rows: bool = False,
) -> None:
    """Raises ValueError, with the remedy, when the chat template refuses a conversation of several turns, or shows no
    tools where no system message could tell of them; without `new_rows` also when it rewrites earlier turns, or drops
    what the policy thought in them (not with `keep_thinking`).

    The conversation begins with `start`, and messages of `role` answer the policy.
    """
    heard = {"role": role, "content": "1"}
    history, before = list(start), renderer.rendered(start, tools)
    told = any(message["role"] == "system" for message in start)
    if tools and not told and before == renderer.rendered(start, []):
        raise ValueError(
            "the chat template shows no tools, so the policy would never read of them; set tokenizer.chat_template to "
            "one that does, tell of them in rollout.environment.system, or set rollout.environment.calls=plain"
        )
    for _ in range(2):
        history.append(policy_turn())
        try:
            if new_rows:
                renderer.rendered([*history, heard], tools)
            else:
                before, _ = renderer.between(before, history, [heard], tools)
        except Rewritten:
            raise
        except ValueError as error:
            more = "; or, with tools, set rollout.environment.results=user" if role == "tool" else ""
            raise ValueError(f"a message of the role {role} answers the policy, and {error}{more}") from None
        history.append(heard)
    if keep_thinking or new_rows:
        return
    thinking = policy_turn(f"{OPEN}\n{THOUGHT}\n{CLOSE}\n\n{PROBE}")
    if THOUGHT not in renderer.rendered([*start, thinking, heard, policy_turn(), heard], tools):
        raise Rewritten(
            "the chat template drops what the policy thought once more turns follow; set tokenizer.chat_template to "
            "one that keeps it, rollout.environment.keep_thinking=true: episodes then go on from what was written, or "
            f"{NEW_ROW}"
        )


class Dialogue:
    """Holds one side's conversation, as far as it is one row. `ids` and the lists beside them are those of `Sample`,
    behind `prompt_ids`."""

    def __init__(
        self,
        renderer: Renderer,
        messages: Sequence[Message],
        tools: Sequence[ToolSchema],
        prompt_ids: list[int] | None = None,
    ) -> None:
        """`prompt_ids` are the tokens of `messages` where they are known; without messages nothing can follow them."""
        self.renderer, self.tools, self.messages = renderer, tools, list(messages)
        self.first, self.turns = len(self.messages), []
        self.rendered = renderer.rendered(self.messages, tools) if messages else ""
        self.prompt_ids = renderer.ids(self.rendered, goes_on=False) if prompt_ids is None else prompt_ids
        self.ids: list[int] = []
        self.trained: list[bool] = []
        self.logprobs: list[float] = []
        self.versions: list[int] = []

    @property
    def context(self) -> list[int]:
        """Returns all tokens so far."""
        return self.prompt_ids + self.ids

    def say(self, sample: Sample) -> None:
        """Adds a turn of the policy."""
        self.messages.append(policy_turn())
        self.turns.append(sample.ids)
        self._add(sample.ids, True, sample.logprobs, sample.versions)

    def history(self) -> list[Message]:
        """Returns the messages with the turns that the policy wrote in this row as text."""
        written = map(self.renderer.written, self.turns)
        heard = self.messages[self.first :]
        said = [policy_turn(next(written)) if each["role"] == "assistant" else each for each in heard]
        return self.messages[: self.first] + said

    def hear(self, messages: Sequence[Message], most_tokens: int, as_text: bool = False) -> bool:
        """Adds what the environment says to the policy's turn, and what begins its next one. Returns whether that fits
        into `most_tokens` in all; else nothing is added. Raises Rewritten, or ValueError when the template refuses.

        `as_text`: the template must render the text that the policy wrote as it wrote it, but for white space, too: it
        may not drop what was thought.
        """
        whole, behind = self._go_on(messages, as_text)
        ids = self.renderer.following(behind, self.ids[-1])
        if len(self.prompt_ids) + len(self.ids) + len(ids) > most_tokens:
            return False
        self.messages, self.rendered = [*self.messages, *messages], whole
        self._add(ids, False, [0.0] * len(ids), [self.versions[-1]] * len(ids))
        return True

    def _go_on(self, messages: Sequence[Message], as_text: bool) -> tuple[str, str]:
        """Returns (the whole rendered text, the part of it behind the policy's turn), as `Renderer.between` does."""
        if not as_text:
            return self.renderer.between(self.rendered, self.messages, messages, self.tools)
        whole = self.renderer.rendered([*self.history(), *messages], self.tools)
        return whole, text_behind(whole, self.rendered + self.renderer.written(self.turns[-1]))

    def _add(self, ids: Sequence[int], trained: bool, logprobs: Sequence[float], versions: Sequence[int]) -> None:
        self.ids += ids
        self.trained += [trained] * len(ids)
        self.logprobs += logprobs
        self.versions += versions

    def sample(self, finished: bool, prompt_tokens: int, version: int) -> Sample:
        """Returns the row as a sample, without what followed the policy's last turn. Its prompt is the first
        `prompt_tokens`; what else stood before the first turn is then as what an environment wrote, of `version`."""
        moved = self.prompt_ids[prompt_tokens:]
        n, end = len(moved), max((i + 1 for i, trained in enumerate(self.trained) if trained), default=0)
        return Sample(
            self.prompt_ids[:prompt_tokens],
            moved + self.ids[:end],
            [False] * n + self.trained[:end],
            [0.0] * n + self.logprobs[:end],
            [version] * n + self.versions[:end],
            finished,
        )
