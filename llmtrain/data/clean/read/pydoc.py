"""Renders Python's standard library as a small web of HTML pages, with what real ones have: frames of links, copies,
near copies, pages without content, and personal data. Nothing is downloaded."""

from __future__ import annotations

import html
import json
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from llmtrain.config.clean import CollectConfig
from llmtrain.data.clean.read.apart import Apart
from llmtrain.data.clean.read.items import Found, Item

# Modules with a docstring of some length, whose import does nothing else and whose signatures name no path of here.
MODULES = tuple(
    """
base64 bdb bisect cmd code copy csv dataclasses datetime dis email fileinput filecmp fnmatch fractions functools
gettext glob graphlib gzip hashlib heapq hmac importlib json linecache locale lzma mimetypes multiprocessing netrc
numbers operator pickle pickletools pkgutil plistlib poplib pprint profile queue reprlib sched secrets
shelve shlex shutil stat string struct subprocess symtable sysconfig tempfile textwrap timeit token tokenize trace
traceback tracemalloc uuid venv warnings wave webbrowser zipimport zlib
""".split()  # noqa: SIM905 - a list of so many texts would take a page
)
HOST = "https://pages.example.org"
MENU = "".join(f'<a href="{name}.html">{name}</a> | ' for name in MODULES[:20])
FRAME = (
    "<nav>{menu}</nav><main>{body}</main><footer>This site uses cookies. Read our <a href='terms.html'>terms of "
    "use</a> and our <a href='privacy.html'>privacy policy</a>. All rights reserved.</footer>"
)
LIMIT_S = 300.0  # to render them; it takes a second or two
COPY_EVERY, NEAR_EVERY, PII_EVERY, EMPTY_EVERY = 6, 5, 4, 12  # one page in so many


class Page(NamedTuple):
    """Holds an HTML page, its address, and what was planted in it: '', copy, near, pii or empty."""

    url: str
    text: str
    planted: str


def pages(seed: int = 0) -> Iterator[Page]:
    """Yields the pages, the same for one version of Python and one seed."""
    rng = random.Random(f"pydoc:{seed}")
    for number, (name, body) in enumerate(rendered().items(), 1):
        has_pii = number % PII_EVERY == 0
        page = framed(body + contact(rng) if has_pii else body)
        yield Page(f"{HOST}/{name}.html", page, "pii" if has_pii else "")
        if number % COPY_EVERY == 0:
            yield Page(f"{HOST}/mirror/{name}.html", page, "copy")
        if number % NEAR_EVERY == 0:
            yield Page(f"{HOST}/old/{name}.html", framed(altered(body, rng)), "near")
        if number % EMPTY_EVERY == 0:
            yield Page(f"{HOST}/missing/{name}.html", framed("<h1>404</h1><p>Not found. Try the menu.</p>"), "empty")


def pydoc_pages(path: str, config: CollectConfig, _: Apart) -> Iterator[Item]:
    """Yields the pages as a crawler would have found them."""
    for number, page in enumerate(pages(), 1):
        yield Found(number, page.text, {"url": page.url, "licence": "PSF-2.0", "planted": page.planted or None})


def rendered() -> dict[str, str]:
    """Returns what pydoc makes of each module, in a process that has imported nothing else."""
    command = [sys.executable, "-I", "-S", str(Path(__file__).with_name("pydoc_render.py")), *MODULES]
    done = subprocess.run(command, capture_output=True, check=True, timeout=LIMIT_S)
    return json.loads(done.stdout)


def framed(body: str) -> str:
    """Returns a whole page around a body: a menu before it and a footer behind it."""
    return f'<!DOCTYPE html><html lang="en"><body>{FRAME.format(menu=MENU, body=body)}</body></html>'


def altered(body: str, rng: random.Random) -> str:
    """Returns a body in which one word in a hundred of the text is another, as an older version of a page has it."""
    return re.sub(r"(?<= )[a-z]{5,}(?= )", lambda word: changed(word[0], rng), body)


def changed(word: str, rng: random.Random) -> str:
    """Returns the word, or, once in a hundred times, another."""
    return rng.choice(("formerly", "perhaps", "usually")) if rng.random() < 0.01 else word


def contact(rng: random.Random) -> str:
    """Returns a paragraph with an invented name's mail address, telephone number, IP address and payment card."""
    user = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=7))
    address = ".".join(str(rng.randint(1, 254)) for _ in range(4))
    text = (
        f"Questions about this page are answered by its author, who reads every letter that is written to "
        f"{user}@mail.example.com. The server at {address} keeps the archive. Donations are taken by card, "
        f"as with {card(rng)}."
    )
    return f"<p>{html.escape(text)}</p>"


def card(rng: random.Random) -> str:
    """Returns the number of a payment card that nobody has, with the right last digit (Luhn)."""
    digits = [4, *(rng.randint(0, 9) for _ in range(14))]
    doubled = [d * 2 - 9 * (d > 4) if at % 2 == 0 else d for at, d in enumerate(digits)]
    return "".join(map(str, [*digits, -sum(doubled) % 10]))
