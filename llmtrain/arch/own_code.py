"""Says why transformers could not load a directory; code that a directory brings along is never run."""

from __future__ import annotations

OWN_CODE = (
    "it asks for code of its own (auto_map), which is never run; give a directory whose class is one of transformers', "
    "and remove auto_map from its JSON files"
)


def loading_fault(error: Exception, longest: int = 200) -> str:
    """Returns the reason of a failed `from_pretrained` as one line.

    With `trust_remote_code=False` transformers refuses code of a directory, and advises to trust it. Without the
    argument it asks at the terminal, and takes the next line of the standard input as the answer.
    """
    text = " ".join(str(error).split())
    return OWN_CODE if "trust_remote_code" in text else text[:longest]
