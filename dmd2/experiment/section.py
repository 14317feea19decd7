"""What every section of a configuration is made of."""

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(ge=1)]
Weight = Annotated[float, Field(ge=0)]
Precision = Literal["fp32", "tf32", "bf16"]  # of networks that are not trained by this: see dmd2.core.precision
Index = Annotated[int, Field(ge=0, le=999)]
Scale = Annotated[float, Field(ge=1)]  # of guidance: 1 is none


def _ascending(value: tuple[float, float]) -> tuple[float, float]:
    if value[0] > value[1]:
        raise ValueError(f"the range [{value[0]}, {value[1]}] is empty: write the smaller one first")
    return value


def _folder_name(value: str) -> str:
    if not re.fullmatch(r"\w[\w.-]*", value):  # it becomes part of Snakemake's patterns, too
        raise ValueError(f"{value!r} is no name of a folder: use letters, digits, _, - and .")
    return value


def _distinct(values: list[Any]) -> list[Any]:
    for i, value in enumerate(values):
        if value in values[:i]:
            raise ValueError(f"{value} is given twice")
    return values


IndexRange = Annotated[tuple[Index, Index], Field(strict=False), AfterValidator(_ascending)]
Scales = Annotated[tuple[Scale, Scale], Field(strict=False), AfterValidator(_ascending)]
FolderName = Annotated[str, AfterValidator(_folder_name)]
Distinct = AfterValidator(_distinct)


class Strict(BaseModel):
    """A frozen part of a file: unknown keys and wrong types are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


# Values of keys that are left out, by section; see the file.
DEFAULTS = yaml.safe_load(Path(__file__).with_name("defaults.yaml").read_text(encoding="utf-8"))


class Section(Strict):
    """A part of a run or table. What is made from it is identified by its values.

    Raises:
        TypeError: the defaults of a class that is defined are not those of defaults.yaml.
    """

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        fixed = DEFAULTS.get(cls.__name__, {})
        given = {name: field.default for name, field in cls.model_fields.items() if not field.is_required()}
        for name, value in json.loads(json.dumps(given)).items():
            if name not in fixed or fixed[name] != value:
                raise TypeError(
                    f"the default of {cls.__name__}.{name} is {value!r}, and that of runs made before is "
                    f"{fixed.get(name, 'not known')!r}: see dmd2/experiment/defaults.yaml"
                )

    def settings(self, **which: Any) -> dict[str, Any]:
        """The JSON values that differ from the defaults. Digests are made of them, and jobs are given them.

        A key that a later version adds therefore changes no digest of what was made before. `which` is handed to
        ``model_dump``: include, exclude.
        """
        return self.model_dump(mode="json", exclude_defaults=True, **which)
