"""Reads source files of repositories, with their language and licence."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from functools import lru_cache

from llmtrain.config.clean import CollectConfig
from llmtrain.data.clean.read.apart import Apart
from llmtrain.data.clean.read.items import BrokenError, Found, Item, UnusableError
from llmtrain.data.clean.read.languages import language_of
from llmtrain.data.clean.read.stream import local_path, whole
from llmtrain.data.clean.read.text import decode

SPDX = re.compile(r"SPDX-License-Identifier:\s*([\w.+() -]{1,100})")
SPDX_CHARS = 4000  # where a file names its licence
LICENCE_FILE = re.compile(r"(un)?licen[cs]e|copying", re.I)
LICENCE_BYTES = 200_000  # what is read of a licence
# Sentences that only this licence has, in the order in which they are looked for, with white space as one blank.
LICENCES = (
    ("AGPL-3.0", "gnu affero general public license version 3"),
    ("LGPL-3.0", "gnu lesser general public license version 3"),
    ("LGPL-2.1", "gnu lesser general public license version 2.1"),
    ("GPL-3.0", "gnu general public license version 3"),
    ("GPL-2.0", "gnu general public license version 2"),
    ("Apache-2.0", "apache license version 2.0"),
    ("MPL-2.0", "mozilla public license version 2.0"),
    ("EPL-2.0", "eclipse public license - v 2.0"),
    ("BSL-1.0", "boost software license - version 1.0"),
    ("CC0-1.0", "cc0 1.0 universal"),
    ("PSF-2.0", "python software foundation license version 2"),
    ("Unlicense", "this is free and unencumbered software released into the public domain"),
    ("MIT", "permission is hereby granted, free of charge, to any person obtaining a copy of this software"),
    ("ISC", "permission to use, copy, modify, and/or distribute this software for any purpose with or without fee"),
    ("BSD-3-Clause", "neither the name of"),
    ("BSD-2-Clause", "redistribution and use in source and binary forms"),
    ("Zlib", "altered source versions must be plainly marked as such"),
)


def code_file(path: str, config: CollectConfig, _: Apart) -> Iterator[Item]:
    """Yields a source file. Its licence is what its head says by SPDX, else that of the nearest folder with one."""
    data = whole(path, config)
    if not data:
        return
    text, notes = decode(data)
    said = SPDX.search(text[:SPDX_CHARS])
    licence = said[1].strip() if said else repository_licence(path, config)
    yield Found(1, text, {"language": language_of(path), "licence": licence}, notes)


def repository_licence(path: str, config: CollectConfig) -> str | None:
    """Returns the licence of the nearest folder above a file, up to that of the input; None where there is none."""
    if (local := local_path(path)) is None:
        return None
    root = os.path.abspath(local_path(config.path) or "")
    folder = os.path.dirname(os.path.abspath(local))
    while folder.startswith(root) and (licence := folder_licence(folder, config)) is None and folder != root:
        folder = os.path.dirname(folder)
    return licence if folder.startswith(root) else None


@lru_cache(maxsize=4096)
def folder_licence(folder: str, config: CollectConfig) -> str | None:
    """Returns the licences of a folder's LICENSE and COPYING files, joined by AND; `other` for one that is not known,
    None where there is no such file."""
    try:
        names = sorted(name for name in os.listdir(folder) if LICENCE_FILE.match(name))
    except OSError:
        return None
    files = [path for name in names if os.path.isfile(path := os.path.join(folder, name)) and not os.path.islink(path)]
    found = {licence for path in files if (licence := licence_of(path, config))}
    return " AND ".join(sorted(found)) if found else None


def licence_of(path: str, config: CollectConfig) -> str | None:
    """Returns the SPDX name of the licence in a file, `other` for one that is not known, None where it has no text."""
    try:
        text = decode(whole(path, config)[:LICENCE_BYTES])[0]
    except (OSError, UnusableError, BrokenError):
        return None
    words = plain(text)
    return next((name for name, sentence in LICENCES if plain(sentence) in words), "other") if words else None


def plain(text: str) -> str:
    """Returns a text in small letters, without marks that copies of a licence have or lack, a blank between words."""
    return " ".join(re.sub(r"[,*#]", " ", text.lower()).split())
