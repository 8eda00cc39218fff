"""Turns examples into tokens, of which some are trained: what a template puts around the texts, and what ends them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import islice
from typing import NamedTuple

import tokenizers

from llmtrain.config.schema import DataConfig
from llmtrain.data.chat import OPEN, Chat, Message
from llmtrain.data.faults import Faults
from llmtrain.data.rows import Example, read_examples
from llmtrain.data.special import SpecialText
from llmtrain.data.tokenizer import Tokenizer

CHUNK = 1024  # texts that are encoded together: their encodings are large
LEAD = "\n"  # put before a text that goes on, where a tokenizer would begin it as a text of its own, and dropped again


class Piece(NamedTuple):
    """Holds a text that is encoded by itself, and the parts of it that are trained: (first, end) in characters."""

    text: str  # special tokens have their names (`SpecialText.mark`)
    trained: Sequence[tuple[int, int]] = ()
    goes_on: bool = False  # the text goes on where another piece ended


class Draft(NamedTuple):
    """Holds an example before it is encoded."""

    pieces: list[Piece]
    first_ids: list[int]  # before the pieces, not trained
    end_ids: list[int]  # behind them, trained


class Encoded(NamedTuple):
    """Holds the tokens of an example, and which of them are trained. The first `bos` of them begin every text."""

    where: str  # file:line
    example: Example
    ids: list[int]
    trained: list[bool]
    bos: int = 0


class Encoder:
    """Makes drafts of examples and encodes them. `all_turns`: every turn of the assistant is trained, else the last."""

    def __init__(self, tokenizer: Tokenizer, examples: Sequence[Example], all_turns: bool) -> None:
        self.tokenizer, self.all_turns = tokenizer, all_turns
        self.chat: Chat | None = None
        chats = [e for e in examples if isinstance(e.prompt, list)]
        needs_chat = any(e.plain is None for e in chats)
        if needs_chat or ((chats or any(e.rendered for e in examples)) and tokenizer.has_chat):
            self.chat = tokenizer.chat

    @property
    def special(self) -> SpecialText:
        """Returns what the drafts mark special tokens with."""
        return self.tokenizer.special_text if self.chat is None else self.chat.special

    def prompt(self, example: Example) -> Draft:
        """Returns the prompt of an example, up to where its answer begins. Raises ValueError, without a place, when the
        chat template refuses it."""
        prompt, kwargs = example.prompt, example.template_kwargs
        if isinstance(prompt, list) and self.chat is not None:
            text = self.chat.render(prompt, True, example.tools, kwargs)
            return Draft([Piece(text + example.prefill)], [], [])
        if isinstance(prompt, list):
            prompt = example.plain
        assert isinstance(prompt, str)
        if example.rendered:
            return Draft([Piece(self.special.mark(prompt + example.prefill))], [], [])
        return Draft([Piece(prompt + example.prefill)], self.tokenizer.prefix_ids, [])

    def demonstration(self, example: Example) -> Draft:
        """Returns an example whose answer is trained, with the token that ends it. Raises ValueError, without a place,
        when the chat template refuses it, or prompt and answer both open the thinking."""
        if example.turns:
            return self.conversation(example)
        if example.prompt is None:
            return self.whole_text(example)
        draft, (answer, ended) = self.prompt(example), self.answer(example)
        if draft.pieces[-1].text.rstrip().endswith(OPEN) and answer.lstrip().startswith(OPEN):
            raise ValueError(f"the prompt ends with {OPEN}, and the answer begins with it again; remove it there")
        end_ids = [] if ended else self.end_ids(example)
        return Draft([*draft.pieces, Piece(answer, [(0, len(answer))], goes_on=True)], draft.first_ids, end_ids)

    def answer(self, example: Example) -> tuple[str, bool]:
        """Returns what is trained behind the prompt, and whether it ends with a special token already, as rendered text
        may."""
        if not example.rendered:
            return example.answer, False
        text = self.special.mark(example.answer)
        bare = text.rstrip()
        ended = bare.endswith(tuple(self.special.names.values()))
        return (bare, True) if ended else (text, False)

    def end_ids(self, example: Example) -> list[int]:
        """Returns what ends an answer: the end of a turn in a chat, the end of a document behind plain text."""
        is_chat = isinstance(example.prompt, list) or example.rendered
        return list(self.chat.turn_end_ids[:1]) if self.chat is not None and is_chat else [self.tokenizer.eos_id]

    def whole_text(self, example: Example) -> Draft:
        """Returns a text without a prompt, all of it trained."""
        text, ended = self.answer(example)
        first_ids = [] if example.rendered else self.tokenizer.prefix_ids
        return Draft([Piece(text, [(0, len(text))])], first_ids, [] if ended else [self.tokenizer.eos_id])

    def conversation(self, example: Example) -> Draft:
        """Returns a conversation whose last turn, or each of the assistant's turns, is trained."""
        assert self.chat is not None and isinstance(example.prompt, list)
        messages = [*example.prompt, *example.turns]
        chosen = [i for i in range(1, len(messages)) if self.is_trained(messages, i)]
        if not chosen:
            raise ValueError("no turn of the assistant is trained (weight: 0); remove the row")
        turns = self.chat.turns(messages, chosen, example.tools, example.template_kwargs)
        end_ids = [] if turns.ended else list(self.chat.turn_end_ids[:1])
        return Draft([Piece(turns.text, turns.trained)], [], end_ids)

    def is_trained(self, messages: Sequence[Message], i: int) -> bool:
        """Returns whether a turn is trained: one of the assistant, whose `weight` (as OpenAI has it) is not 0."""
        chosen = self.all_turns or i == len(messages) - 1
        return chosen and messages[i]["role"] == "assistant" and messages[i].get("weight") != 0

    @cached_property
    def lead(self) -> str:
        """Returns what is put before a text that goes on; nothing where the tokenizer puts no space before a text."""
        first, both = (self.special.backend.encode(text, add_special_tokens=False).ids for text in ("a", LEAD + "a"))
        return "" if both[-len(first) :] == first else LEAD

    def encode(self, drafts: Iterable[Draft]) -> Iterator[tuple[list[int], list[bool]]]:
        """Yields the tokens of the drafts, in their order, and which are trained."""
        stream = iter(drafts)
        while chunk := list(islice(stream, CHUNK)):
            pieces = [self.led(piece) for draft in chunk for piece in draft.pieces]
            places = any(is_partly_trained(piece) for piece in pieces)
            encodings = zip(pieces, self.special.encode_batch([piece.text for piece in pieces], places), strict=True)
            for draft in chunk:
                yield self.joined(draft, list(islice(encodings, len(draft.pieces))))

    def led(self, piece: Piece) -> Piece:
        """Returns the piece with the lead before it, where it goes on."""
        if not (piece.goes_on and self.lead):
            return piece
        moved = [(first + len(self.lead), end + len(self.lead)) for first, end in piece.trained]
        return piece._replace(text=self.lead + piece.text, trained=moved)

    def joined(
        self, draft: Draft, encoded: Sequence[tuple[Piece, tokenizers.Encoding]]
    ) -> tuple[list[int], list[bool]]:
        """Returns the tokens of a draft, and which are trained, from those of its pieces."""
        ids, trained = list(draft.first_ids), [False] * len(draft.first_ids)
        for piece, encoding in encoded:
            skipped = token_at(piece.text, encoding, len(self.lead)) if piece.goes_on and self.lead else 0
            ids += encoding.ids[skipped:]
            trained += trained_tokens(piece, encoding)[skipped:]
        return ids + draft.end_ids, trained + [True] * len(draft.end_ids)


def encode_rows(
    path: str, tokenizer: Tokenizer, settings: DataConfig, faults: Faults, answered: bool
) -> Iterator[Encoded]:
    """Yields the tokens of every row of a file that can be used; the others go to `faults`.

    `answered`: the rows are demonstrations; else the prompt alone is wanted, up to where an answer begins.
    """
    examples = read_examples(path, settings, faults, answered)
    encoder = Encoder(tokenizer, [example for _, example in examples], settings.trained_turns == "all")
    make, drafted = encoder.demonstration if answered else encoder.prompt, []
    for where, example in examples:
        try:
            drafted.append((where, example, make(example)))
        except ValueError as error:
            faults.add(where, str(error))
    tokens = encoder.encode(draft for _, _, draft in drafted)
    for (where, example, draft), (ids, trained) in zip(drafted, tokens, strict=True):
        yield Encoded(where, example, ids, trained, len(draft.first_ids))


def is_partly_trained(piece: Piece) -> bool:
    """Returns whether some of a piece is trained and some is not."""
    return bool(piece.trained) and list(piece.trained) != [(0, len(piece.text))]


def trained_tokens(piece: Piece, encoding: tokenizers.Encoding) -> list[bool]:
    """Returns which tokens of a piece are trained: those that begin in one of its trained parts."""
    if not is_partly_trained(piece):
        return [bool(piece.trained)] * len(encoding.ids)
    flags = [False] * len(encoding.ids)
    for first, end in piece.trained:
        begin, stop = token_at(piece.text, encoding, first), token_at(piece.text, encoding, end)
        flags[begin:stop] = [True] * (stop - begin)
    return flags


def token_at(text: str, encoding: tokenizers.Encoding, character: int) -> int:
    """Returns the first token that begins at this character or behind it."""
    for at in range(character, len(text)):
        token = encoding.char_to_token(at)
        if token is not None:
            begins = encoding.token_to_chars(token)[0] >= character
            return token if begins else token + 1
    return len(encoding.ids)
