"""Finds the answer in a text as people write it. Pure functions of text, without a parser of mathematics."""

from __future__ import annotations

import re
import unicodedata
from decimal import Decimal

MOST_CHARACTERS = 1000  # of the part that is read
MOST_DIGITS = 1000
BOXED = "\\boxed"
JOINS = r"(?:,|;|and|or|,\s*and|,\s*or|\\text\{\s*(?:and|or)\s*\})"
SPACES = r"(?:[\s$~]|\\quad|\\qquad|\\[,;!])*"
BETWEEN = re.compile(SPACES + JOINS + SPACES)  # two boxed values of one answer
DISPLAY = re.compile(r"\\\[.*?\\\]|\$\$.*?\$\$", re.S)
HOPE = re.compile(r"final answer is:?\s*(.*?)\.?\s*I hope it is correct", re.I)  # of Minerva's prompt
HASHES = re.compile(r"####[ \t]*(?![A-Za-z]{2})(\S.*)")  # not the heading `#### Step 2`
ANSWER = re.compile(
    r"^[ \t>*_#]*(?:the[ \t]+|my[ \t]+)?(?:final[ \t]+)?answer[*_]*[ \t]*(?:is[ \t]*)?[:=][*_]*[ \t]*(.*)", re.I | re.M
)
TAG = re.compile(r"<answer>\s*(.*?)\s*</answer>", re.I | re.S)
TOLD = re.compile(r"\banswer is:?\s+([^\s].*)", re.I)  # within the last line
HEADING = re.compile(r"^[ \t>*_#]+(?:final[ \t]+)?answer[*_: \t]*\n+(.*)", re.I | re.M)
WHOLE = re.compile(r"[-+]?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)")  # 1234 or 1,234
NUMBER = re.compile(rf"(?P<whole>{WHOLE.pattern})(?P<rest>(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?(?:\s*/\s*[0-9]+)?)")


def final_answer(completion: str) -> str:
    """Returns the part of a completion that holds its answer, see `answer_part`."""
    return answer_part(completion)[0]


def answer_part(completion: str) -> tuple[str, bool]:
    """Returns the part of a completion that holds its answer, and whether a mark says so.

    The last of these counts: a run of boxed values; what follows `####` on its line; what follows `Answer:` at the
    start of a line; the line below a heading `Answer`; X of `The final answer is X. I hope it is correct`; what stands
    in `<answer>` tags. Without any it is the last line with a digit, a formula or `answer is` (of that, what follows),
    else the last line with text.
    Example: "2+40\\n#### 42\\nThat confirms it." -> ("42", True)
    """
    marks = [
        (m.start(1), m.group(1))
        for pattern in (HASHES, ANSWER, HEADING, HOPE, TAG)
        for m in pattern.finditer(completion)
    ]
    if BOXED in completion:
        start = boxed_start(completion)
        marks.append((start, boxed_run(completion, start)))
    marks = [(place, text) for place, text in marks if text.strip()]
    if marks:
        return max(marks)[1].strip()[:MOST_CHARACTERS], True
    whole = DISPLAY.sub(lambda m: m.group().replace("\n", " "), completion)  # a formula on lines of its own is one line
    lines = [line.strip() for line in whole.splitlines() if line.strip()]
    told = [line for line in lines if re.search(r"[0-9\\$]", line) or TOLD.search(line)]
    last = (told or lines or [""])[-1][-MOST_CHARACTERS:]
    said = TOLD.search(last)
    return (said.group(1), True) if said else (last, False)


def boxed_start(completion: str) -> int:
    """Returns where the last run of boxed values begins.

    Example: "\\\\boxed{1}, no: \\\\boxed{2} and \\\\boxed{3}" -> 15, where 2 stands
    """
    starts = [m.start() for m in re.finditer(re.escape(BOXED), completion)]
    start = starts.pop()
    while starts and BETWEEN.fullmatch(completion[boxed_end(completion, starts[-1]) : start]):
        start = starts.pop()
    return start


def boxed_run(completion: str, start: int) -> str:
    """Returns the boxed values from `start` on, joined by `and`, with a percent sign behind the last."""
    values, end = [], start
    for place in (m.start() for m in re.finditer(re.escape(BOXED), completion)):
        if place >= end:
            end = boxed_end(completion, place)
            values.append(completion[place:end])
    percent = re.match(r"[\s$]*(?:\\?%|percent)", completion[end:])
    return " and ".join(values) + (percent.group().replace("$", "") if percent else "")


def boxed_end(text: str, start: int) -> int:
    """Returns the place behind the closing brace of the boxed value at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0 and text[i] == "}":
            return i + 1
    return len(text)


def plain(text: str) -> str:
    """Returns the text with numbers in the form that parsers read.

    Examples: "−5" -> "-5", "1\\\\,000" -> "1000", "3 1/2" and "3½" -> "7/2", "1.5e3" -> "1500", "2√3" -> "2\\\\sqrt{3}"
    """
    text = re.sub("(?<=[0-9])(?=[¼-¾⅐-⅞])", " ", text)
    text = re.sub("[¼-¾⅐-⅞]", lambda m: unicodedata.normalize("NFKC", m.group()).replace("⁄", "/"), text)
    text = re.sub("[−–](?=[0-9.])", "-", text)
    text = re.sub(r"(?<=[0-9])(?:\\,|\{,\}|[    ])(?=[0-9]{3}(?![0-9]))", "", text)
    text = re.sub(r"(?<![0-9/.,])([0-9]{1,9}) ([0-9]{1,9})/([0-9]{1,9})(?![0-9/.])", _improper, text)
    text = re.sub(r"(?<![\w.])([0-9]{1,9}(?:\.[0-9]{1,9})?)[eE]([-+]?[0-9]{1,2})(?!\w)", _decimal, text)
    text = re.sub("(?:(?<=[0-9)}π])|(?<=\\b[A-Za-z]))[⁻⁰¹²³⁴-⁹]+", lambda m: f"^{{{_raised(m.group())}}}", text)
    text = text.replace("π", "\\pi ")
    return re.sub(r"√\(?([0-9a-zA-Z]+)\)?", r"\\sqrt{\1}", text)


def _raised(text: str) -> str:
    return unicodedata.normalize("NFKC", text).replace("−", "-")


def _improper(match: re.Match[str]) -> str:
    whole, above, below = map(int, match.groups())
    return f"{whole * below + above}/{below}"


def _decimal(match: re.Match[str]) -> str:
    value = format(Decimal(match.group()), "f")
    return value.rstrip("0").rstrip(".") if "." in value else value


def ascii_minus(text: str) -> str:
    """Returns the text with `-` for each Unicode minus before a digit. Example: "−5" -> "-5"."""
    return re.sub("−(?=[0-9])", "-", text)


def first_integer(text: str) -> str | None:
    """Returns the first number of a text if it is an integer, without its separators; else None.

    Examples: "1,234 km" -> "1234", "+5" -> "5", "−5" -> "-5", "5.0" -> "5", "3/4", "2.5" and "no" -> None
    """
    found = NUMBER.search(ascii_minus(text))
    if found is None or found["rest"].strip(".0"):
        return None
    digits = found["whole"].replace(",", "")
    return str(int(digits)) if len(digits) <= MOST_DIGITS else None


def gold_text(answer: object) -> str | None:
    """Returns the right answer of a row as text: what follows `####`, if that is there; None if there is none."""
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        return None
    return str(answer).rpartition("####")[2].strip() or None
