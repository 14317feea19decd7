"""What every section of a configuration is made of."""

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import to_jsonable_python

Positive = Annotated[int, Field(ge=1)]
Weight = Annotated[float, Field(ge=0)]
Index = Annotated[int, Field(ge=0, le=999)]


def _ascending(value: tuple[int, int]) -> tuple[int, int]:
    if value[0] > value[1]:
        raise ValueError(f"the range [{value[0]}, {value[1]}] is empty: write the smaller index first")
    return value


IndexRange = Annotated[tuple[Index, Index], Field(strict=False), AfterValidator(_ascending)]


def later(default: Any) -> Any:
    """Field of a key that came after runs were recorded: records leave it out at its default, so theirs stay valid.

    Otherwise a new switch would change the digest of every config, and every finished training would be made again.
    """
    return Field(default=default, exclude_if=lambda value: value == default)


class Section(BaseModel):
    """A frozen section: unknown keys and wrong types are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    def complete(self) -> dict[str, Any]:
        """Every key as a plain JSON value, also those that a record leaves out."""
        values = self.model_dump(mode="json")
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, Section):
                values[name] = value.complete()
            elif name not in values:
                values[name] = to_jsonable_python(value)
        return values
