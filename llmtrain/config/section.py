"""Defines the base of every section of a document, and the kinds of values that several have."""

from __future__ import annotations

import os.path
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Count = Annotated[int, Field(gt=0, le=10_000)]
"""A number of things that are looked at one by one; a slip of the keyboard must not fill the memory."""
UserPath = Annotated[str, AfterValidator(os.path.expanduser)]
"""A path, in which `~` is the home directory."""
Share = Annotated[float, Field(ge=0.0, le=1.0)]
"""A share of a whole."""
DeadlineS = Annotated[float, Field(gt=0.0, le=86_400.0)]
"""Seconds, a day at most."""


def _own_code(place: str) -> str:
    if not re.fullmatch(r".+:[A-Za-z_]\w*", place):
        raise ValueError("must be file.py:function or module:function")
    return place


OwnCode = Annotated[str, AfterValidator(_own_code)]
"""Where a function or a class of the user's is: `file.py:name` or `package.module:name`."""
LEAST_TEMPERATURE = 1e-6
"""The lowest temperature that is not greedy: far below it, fp32 divides by 0."""
Dtype = Literal["auto", "bf16", "fp16", "fp32"]
Decay = Annotated[float, Field(ge=0.0, lt=1.0)]
"""The share of a moving mean that an update keeps."""


def file_of(place: str | None) -> str | None:
    """Returns the file of a place of own code, None where it is in a module or there is none."""
    file = (place or "").rpartition(":")[0]
    return file if file.endswith(".py") else None


def files_of(place: str | None, args: Mapping[str, Any] | None) -> dict[str, str]:
    """Returns the files with Python that own code and its arguments name, by key.

    Example: files_of("a.py:run", {"environment": "b.py"}) is {"function": "a.py", "args.environment": "b.py"}
    """
    found = {f"args.{name}": value for name, value in (args or {}).items() if str(value).endswith(".py")}
    file = file_of(place)
    return found if file is None else {"function": file, **found}


class Section(BaseModel):
    """Rejects unknown keys and changes after loading; the base of all sections."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
