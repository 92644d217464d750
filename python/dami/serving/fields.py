"""The types of the fields of requests."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictInt, StrictStr
from pydantic_core import PydanticCustomError

STOP = 1024  # maximum characters of a stop string

Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Count = Annotated[StrictInt, Field(ge=1, le=1 << 30)]
Preset = Annotated[StrictStr, Field(max_length=64)]  # or "auto"
Intensity = Number | Preset
Tail = Annotated[StrictInt, Field(ge=0, le=1 << 30)] | Literal["turn"]
TokenId = Annotated[StrictInt, Field(ge=0, lt=1 << 31)]
Point = tuple[Count, Number]
Penalty = Annotated[Number, Field(ge=-2, le=2)]
StopString = Annotated[StrictStr, Field(min_length=1, max_length=STOP)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


def neutral(*values: Any) -> BeforeValidator:
    """Accepts only the values with which an unsupported field has no effect."""

    def check(value: Any) -> Any:
        if value is not None and value not in values:
            raise ValueError("is not supported by this server: leave it out")
        return None

    return BeforeValidator(check)


def disagreement(param: str, message: str) -> PydanticCustomError:
    """Returns an error about fields that contradict each other; `param` is the one to blame."""
    return PydanticCustomError("disagreement", "{message}", {"message": message, "param": param})
