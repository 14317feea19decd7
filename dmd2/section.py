"""What every section of a configuration is made of."""

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(ge=1)]
Weight = Annotated[float, Field(ge=0)]
Index = Annotated[int, Field(ge=0, le=999)]


def _ascending(value: tuple[int, int]) -> tuple[int, int]:
    if value[0] > value[1]:
        raise ValueError(f"the range [{value[0]}, {value[1]}] is empty: write the smaller index first")
    return value


IndexRange = Annotated[tuple[Index, Index], Field(strict=False), AfterValidator(_ascending)]


class Section(BaseModel):
    """A frozen section: unknown keys and wrong types are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
