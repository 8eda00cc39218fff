"""Says whether the part of a completion with its answer is one number, with nothing beside it that changes it."""

from __future__ import annotations

import re

ARITHMETIC = re.compile(r"[-+*/^().,0-9\s]*[0-9][-+*/^().,0-9\s]*")
LETTERS = r"[A-Za-z][A-Za-z'’]*(?:/[A-Za-z]+)?(?:\^\{?[23]\}?)?"  # a word or a unit: apples, m/s, cm^2
ATTACHED = r"(?:km|cm|mm|kg|mg|ml|mi|ft|lbs?|oz|hrs?|min|mph|st|nd|rd|th)(?:\^\{?[23]\}?)?(?:/h|/s)?(?![A-Za-z])"
MONEY = r"(?:\\?\$|[€£¥₹])?"
WORDED = re.compile(
    rf"(?P<before>(?:{LETTERS}[,:]?\s+)*){MONEY}\s*[-+]?{MONEY}\s*[0-9][0-9,]*(?:\.[0-9]+)?(?:\s*/\s*[0-9]+)?"
    rf"\s*(?:\\?%|°|[€£¥₹])?(?:{ATTACHED})?(?P<after>(?:[\s,;.()*-]+{LETTERS})*)[\s,;.()*]*"
)
CHANGES = re.compile(  # words beside a number that change it
    "mod|modulo|pi|sqrt|root|sin|cos|tan|log|ln|exp|over|times|plus|minus|negative|squared|cubed|factorial|hundred|"
    "thousand|[mbtr]+illion|dozens?|half|than|least|most|not|no|or|under|above|below|between|[xyznk]+"
)
SHORT = re.compile(  # words of one or two letters that stand beside a number; others are names in a formula
    "[aimgshljwvcf]|km|cm|mm|kg|mg|ml|mi|ft|in|lb|oz|hr|am|pm|is|it|so|we|he|to|of|an|as|at|by|be|on|if|my"
)
SENTENCE = re.compile(r"(?<=[\w)%°}$])\.\s+(?=[A-Z])")
OPTION = re.compile(r"(?:option|choice)?[\s(\[*_]*([A-Za-z])(?![A-Za-z0-9'’])(?:[)\]*_.:]+(?:\s.*)?)?", re.I | re.S)


def is_number(value: str) -> bool:
    """Says whether a value is one number, or arithmetic of digits, with units, currency, percent or plain words.

    Examples: "72", "10^-3", "$18.00 a day.", "5 km" -> True; "2x", "5!", "x > 3", "5 million" -> False
    """
    if ARITHMETIC.fullmatch(value):
        return True
    found = WORDED.fullmatch(value)
    return found is not None and all(map(_plain, _words(found)))


def _words(found: re.Match[str]) -> list[str]:
    return re.findall("[A-Za-z]+", found["before"] + " " + found["after"])


def _plain(word: str) -> bool:
    word = word.lower()
    return not CHANGES.fullmatch(word) and (len(word) > 2 or SHORT.fullmatch(word) is not None)


def option(text: str) -> str | None:
    """Returns the letter of a choice. Examples: "(B) Paris", "B.", "b" -> "B"; "2", "Both" -> None"""
    found = OPTION.fullmatch(text.strip())
    return found.group(1).upper() if found else None
