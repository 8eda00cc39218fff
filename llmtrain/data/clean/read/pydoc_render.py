"""Renders modules by pydoc: `python -I -S pydoc_render.py NAME ...` prints an object of JSON with a page for each.

It is a program of its own and imports the standard library alone: what other packages have imported or changed in a
process would show in the pages.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import pydoc
import re
import sys
import warnings


class Interface(pydoc.HTMLDoc):
    """Renders what a module offers, without the values of its data, which are this process's own: paths, caches, the
    environment."""

    def docother(self, *_: object) -> str:
        """Returns nothing for a value."""
        return ""


def rendered(name: str) -> str:
    """Returns what pydoc makes of a module, without the path of its file on this machine and addresses in memory."""
    body = Interface().document(importlib.import_module(name), name).replace("&nbsp;", " ")
    body = re.sub(r'<a href="file:[^"]*">[^<]*</a>', "", body)
    body = re.sub(r" at 0x[0-9a-f]+", "", body)
    return re.sub(r"<(/?)(?:table|tr|td)[^>]*>", r"<\1div>", body)  # its tables are there for their looks alone


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    with contextlib.redirect_stdout(io.StringIO()):
        pages = {name: rendered(name) for name in sys.argv[1:]}
    print(json.dumps(pages))
