"""What a table says about the code that trained its rows."""

from collections.abc import Mapping, Sequence

from dmd2.core.retraining import Part, differences, named, other_code


def code_warnings(trained: Mapping[str, Sequence[Sequence[Part]]]) -> list[str]:
    """Warnings about rows, by the parts of each of their seeds' trainings; what is not known is passed over.

    The table itself is not out of date when the code changes: it says of what it shows how that was made.
    """
    parts = {run: [part for seed in seeds for part in seed] for run, seeds in trained.items()}
    warnings = []
    if files := differences([part for found in parts.values() for part in found]):
        warnings.append(f"not all of this was trained by the same code: {named(files)} differ")
    if mixed := [run for run, seeds in trained.items() if any(len(seed) > 1 for seed in seeds)]:
        warnings.append(f"other code went on with half-trained runs: {', '.join(mixed)}")
    if other := [run for run, found in parts.items() if other_code(found)]:
        warnings.append(f"trained by other code than the table was made with: {', '.join(other)}")
    return warnings
