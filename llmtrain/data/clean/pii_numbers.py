"""Finds numbers that carry a check: payment cards (Luhn), IBANs (mod 97), and US social security numbers (ranges)."""

from __future__ import annotations

import re
from collections.abc import Iterator

IBANS = (
    "AD24 AE23 AL28 AT20 AZ28 BA20 BE16 BG22 BH22 BI27 BR29 BY28 CH21 CR22 CY28 CZ24 DE22 DJ27 DK18 DO28 EE20 EG29 "
    "ES24 FI18 FK18 FO18 FR27 GB22 GE22 GI23 GL18 GR27 GT28 HR21 HU28 IE22 IL23 IQ23 IS26 IT27 JO30 KW30 KZ20 LB28 "
    "LC32 LI21 LT20 LU20 LV21 LY25 MC27 MD24 ME22 MK19 MN20 MR27 MT31 MU30 NI28 NL18 NO15 OM23 PK24 PL28 PS29 PT25 "
    "QA29 RO24 RS22 RU33 SA24 SC31 SD18 SE24 SI19 SK24 SM27 SO23 ST25 SV28 TL23 TN24 TR26 UA29 VA22 VG24 XK20 YE30"
)  # countries and their lengths, from the registry of ISO 13616
IBAN_CHARS = {each[:2]: int(each[2:]) for each in IBANS.split()}
IBAN = re.compile(r"(?<![A-Za-z0-9])([A-Z]{2})[0-9]{2}(?: ?[A-Z0-9]){11,30}")
CARD = re.compile(
    r"(?<![\w.-])(?:[0-9]{13,19}|[0-9]{4}([ -])[0-9]{4}\1[0-9]{4}\1[0-9]{4}(?:\1[0-9]{3})?|"
    r"[0-9]{4}([ -])[0-9]{6}\2[0-9]{4,5})(?![\w-]|[.,][0-9])"
)
BRANDS = (  # first digits, and how many there are in all
    (re.compile("4"), (13, 16, 19)),  # Visa
    (re.compile("5[1-5]|222[1-9]|22[3-9]|2[3-6]|27[01]|2720"), (16,)),  # Mastercard
    (re.compile("3[47]"), (15,)),  # American Express
    (re.compile("6011|64[4-9]|65"), (16, 19)),  # Discover
    (re.compile("30[0-5]|3[689]"), (14,)),  # Diners Club
    (re.compile("35(?:2[89]|[3-8])"), (16,)),  # JCB
    (re.compile("62"), (16, 17, 18, 19)),  # UnionPay
)
SSN_PARTS = r"(?!000|666|9)[0-9]{3}{0}(?!00)[0-9]{2}{0}(?!0000)[0-9]{4}"
SSN = re.compile(rf"(?<![\w.-]){SSN_PARTS.replace('{0}', '-')}(?![\w-]|\.[0-9])")
NAMED_SSN = re.compile(
    rf"(?:\bSSN|\bsocial security (?:number|no))[^\w\n]{{1,4}}(?:is )?({SSN_PARTS.replace('{0}', '[ -]?')})(?!\w)",
    re.IGNORECASE,
)


def find_cards(text: str) -> Iterator[tuple[int, int]]:
    """Yields the spans of card numbers: first digits and length of a brand, Luhn's check, whole or in its groups."""
    for match in CARD.finditer(text):
        digits = re.sub("[ -]", "", match[0])
        branded = any(begin.match(digits) and len(digits) in lengths for begin, lengths in BRANDS)
        if branded and len(set(digits)) > 1 and luhn(digits):
            yield match.span()


def luhn(digits: str) -> bool:
    """Returns whether a number passes the check of ISO/IEC 7812: 79927398713 does, 79927398710 does not."""
    doubled = (sum(divmod(2 * int(digit), 10)) for digit in digits[-2::-2])
    return (sum(doubled) + sum(map(int, digits[-1::-2]))) % 10 == 0


def find_ibans(text: str) -> Iterator[tuple[int, int]]:
    """Yields the spans of IBANs, whole or in groups: capital letters, their country's length, remainder 1 by 97."""
    at = 0
    while match := IBAN.search(text, at):
        at = match.start() + 2
        end = iban_end(text, match)
        if end is not None:
            yield match.start(), end
            at = end


def iban_end(text: str, match: re.Match[str]) -> int | None:
    """Returns where the IBAN that begins at a match ends, None where it is none."""
    left, end = IBAN_CHARS.get(match[1], 0), match.start()
    while left and end < match.end():
        left -= text[end] != " "
        end += 1
    whole = not left and end > match.start() and not text[end : end + 1].isalnum()
    return end if whole and mod97(text[match.start() : end].replace(" ", "")) == 1 else None


def mod97(iban: str) -> int:
    """Returns the remainder of an IBAN (ISO 13616), its first four characters moved to the end, letters as 10 to 35."""
    return int("".join(str(int(char, 36)) for char in iban[4:] + iban[:4])) % 97


def find_ssns(text: str) -> Iterator[tuple[int, int]]:
    """Yields the spans of US social security numbers of ranges that are given out (no area 000, 666, 9xx, no group 00,
    no serial 0000): with hyphens, or, behind `SSN`, also with spaces or as nine digits."""
    yield from (match.span() for match in SSN.finditer(text))
    yield from (match.span(1) for match in NAMED_SSN.finditer(text))
