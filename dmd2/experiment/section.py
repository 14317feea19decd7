"""What every section of a configuration is made of."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(ge=1)]
Weight = Annotated[float, Field(ge=0)]
Precision = Literal["fp32", "tf32", "bf16"]  # of networks that are not trained by this: see dmd2.core.precision
Index = Annotated[int, Field(ge=0, le=999)]


def _ascending(value: tuple[int, int]) -> tuple[int, int]:
    if value[0] > value[1]:
        raise ValueError(f"the range [{value[0]}, {value[1]}] is empty: write the smaller index first")
    return value


IndexRange = Annotated[tuple[Index, Index], Field(strict=False), AfterValidator(_ascending)]


class Section(BaseModel):
    """A frozen section: unknown keys and wrong types are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    def settings(self, **which: Any) -> dict[str, Any]:
        """JSON values that identify it, for digests: a key at its default is left out, so that a later version's new
        switch leaves everything made before it as it is. `which` is that of ``model_dump``: include, exclude.
        """
        return self.model_dump(mode="json", exclude_defaults=True, **which)
