"""Typed configuration: every field validated, and a misspelt one answered with the right one."""

from __future__ import annotations

import difflib
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator


class Settings(BaseModel):
    """Base of the configuration models: immutable, and an unknown key is an error.

    Raises:
        pydantic.ValidationError (a ValueError): names the field, what came and what is accepted.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    accepted_beside: ClassVar[tuple[str, ...]] = ()
    """Arguments that the owner of these settings takes itself; suggested like the fields."""

    @model_validator(mode="before")
    @classmethod
    def _suggest_known_key(cls, given: Any) -> Any:
        for key in given if isinstance(given, dict) else ():
            if key not in cls.model_fields:
                known = [*cls.accepted_beside, *cls.model_fields]
                near = difflib.get_close_matches(str(key), known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"accepted: {', '.join(known)}"
                raise ValueError(f"unknown key {key!r}; {hint}")
        return given
