"""Finds telephone numbers: international ones, those of North America, and national ones behind a word for them."""

from __future__ import annotations

import re
from collections.abc import Iterator

CODES = (
    "1 7 20 27 30 31 32 33 34 36 39 40 41 43 44 45 46 47 48 49 51 52 53 54 55 56 57 58 60 61 62 63 64 65 66 81 82 84 "
    "86 90 91 92 93 94 95 98 211 212 213 216 218 220 221 222 223 224 225 226 227 228 229 230 231 232 233 234 235 236 "
    "237 238 239 240 241 242 243 244 245 246 247 248 249 250 251 252 253 254 255 256 257 258 260 261 262 263 264 265 "
    "266 267 268 269 290 291 297 298 299 350 351 352 353 354 355 356 357 358 359 370 371 372 373 374 375 376 377 378 "
    "379 380 381 382 383 385 386 387 389 420 421 423 500 501 502 503 504 505 506 507 508 509 590 591 592 593 594 595 "
    "596 597 598 599 670 672 673 674 675 676 677 678 679 680 681 682 683 685 686 687 688 689 690 691 692 800 808 850 "
    "852 853 855 856 870 880 881 882 883 886 888 960 961 962 963 964 965 966 967 968 970 971 972 973 974 975 976 977 "
    "979 992 993 994 995 996 998"
)  # ITU-T E.164
CALLING_CODES = frozenset(CODES.split())
DIGITS = (8, 15)  # of an international number; 15 is E.164's most
INTERNATIONAL = re.compile(r"(?<![\w+])\+[1-9](?:[ .()/-]{0,2}[0-9]){7,14}(?!\w)")
NORTH_AMERICAN = re.compile(
    r"(?<![\w.+-])(?:1[ .-])?(?:\([2-9][0-9]{2}\)[ -]?[0-9]{3}[ .-]|[2-9][0-9]{2}([.-])[0-9]{3}\1|"
    r"[2-9][0-9]{2} [0-9]{3}-)[0-9]{4}(?!\w|[.-][0-9])"
)
NAMED = re.compile(
    r"\b(?:tel|telephone|telefon|telefono|teléfono|téléphone|phone|fon|mobile|mobil|handy|cell|call|fax|whatsapp)\b"
    r"\W{0,4}(?:(?:number|no|nr|us at|at|me at|on|is)\b\W{0,4})?(\(?[0-9](?:[ ./()-]{0,2}[0-9]){6,14})(?!\w)",
    re.IGNORECASE,
)
DATE = re.compile(r"(?:[0-9]{4}[./-][0-9]{1,2}[./-][0-9]{1,2}|[0-9]{1,2}[./-][0-9]{1,2}[./-][0-9]{4})(?![0-9])")


def find_phones(text: str) -> Iterator[tuple[int, int]]:
    """Yields the spans of telephone numbers. Ten digits without a separator or a word before them are none."""
    yield from (match.span() for match in INTERNATIONAL.finditer(text) if is_international(match[0]))
    yield from (match.span() for match in NORTH_AMERICAN.finditer(text))
    for match in NAMED.finditer(text):
        if (match[1][0] in "(0" or re.search(r"[ ./()-]", match[1])) and not DATE.match(match[1]) and grouped(match[1]):
            yield match.span(1)


def is_international(number: str) -> bool:
    """Returns whether a number behind + begins with a calling code, in its first group, and a national number may
    follow: not one with a leading zero, except in Italy or as (0); in North America one of ten digits, the first at
    least 2."""
    digits = re.sub(r"[^0-9]", "", number.replace("(0)", ""))
    code = next((digits[:n] for n in (1, 2, 3) if digits[:n] in CALLING_CODES), None)
    if code is None or not DIGITS[0] <= len(digits) <= DIGITS[1] or not re.match(rf"\+{code}", number):
        return False
    national = digits[len(code) :]
    if code == "1":
        return len(national) == 10 and national[0] >= "2" and grouped(number)
    return (national[0] != "0" or code == "39") and grouped(number)


def grouped(number: str) -> bool:
    """Returns whether the digits stand in groups as people write them: at most two of a single digit, none at the
    end."""
    groups = re.findall("[0-9]+", number)
    return sum(len(group) == 1 for group in groups) <= 2 and len(groups[-1]) > 1
