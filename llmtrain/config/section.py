"""Defines the base of every section of a document, and the kinds of values that several have."""

from __future__ import annotations

import os.path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Count = Annotated[int, Field(gt=0, le=10_000)]
"""A number of things that are looked at one by one; a slip of the keyboard must not fill the memory."""
UserPath = Annotated[str, AfterValidator(os.path.expanduser)]
"""A path, in which `~` is the home directory."""
Share = Annotated[float, Field(ge=0.0, le=1.0)]
"""A share of a whole."""
DeadlineS = Annotated[float, Field(gt=0.0, le=86_400.0)]
"""Seconds, a day at most."""
LEAST_TEMPERATURE = 1e-6
"""The lowest temperature that is not greedy: far below it, fp32 divides by 0."""
Dtype = Literal["auto", "bf16", "fp16", "fp32"]
Decay = Annotated[float, Field(ge=0.0, lt=1.0)]
"""The share of a moving mean that an update keeps."""


class Section(BaseModel):
    """Rejects unknown keys and changes after loading; the base of all sections."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
