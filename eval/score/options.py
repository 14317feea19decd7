"""The options of a call of the command line, completed by a named protocol where they are left out."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dmd2.core.errors import UserError
from dmd2.core.options import workspace_or_cache
from dmd2.experiment.metrics import of_option
from dmd2.experiment.protocols import NamedProtocol, named
from dmd2.experiment.run_inputs import FEATURES, WEIGHTS

FID = "; FID is what fd is called with --detector inception-2015-12-05, with any other detector it is an FD"
OF_A_PROTOCOL = ("images", "classes", "detector", "geometry", "metrics")


@dataclass(frozen=True)
class Options:
    """The options by their names on the command line; `given` holds those that `of` got, before it completed them."""

    metrics: tuple[str, ...]
    detector: str | None = None
    geometry: str | None = None
    images: int | None = None
    classes: int | None = None
    first: int | None = None
    reference: Path | None = None
    prompts: Path | None = None
    clip: Path | None = None
    per_prompt: int | None = None
    reference_sampled: bool = False
    allow_duplicates: bool = False
    json: Path | None = None
    csv: Path | None = None
    shard: str | None = None
    cache: Path = field(default_factory=lambda: workspace_or_cache(FEATURES))
    weights: Path = field(default_factory=lambda: workspace_or_cache(WEIGHTS))
    batch: int | None = None
    workers: int | None = None
    threads: int = 0
    device: str = "cpu"
    protocol: NamedProtocol | None = None
    given: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(known: Collection[str], protocol: str | None, metrics: str | None, **options: Any) -> Options:
        """The options that are not None, then those of the protocol, then the defaults.

        Args:
            known: metrics that may be asked for.
            protocol: its name.
            metrics: comma-separated; by default those of the protocol, or ``fd``.
            options: the other fields.

        Raises:
            UserError: an unknown metric or protocol.
        """
        given = {key: value for key, value in options.items() if value is not None}
        if metrics is not None:
            given["metrics"] = tuple(metrics.split(","))
        found = named(protocol) if protocol else None
        asked = Options(**{"metrics": ("fd",), **_settings(found), **given}, protocol=found, given=given)
        unknown = [name for name in asked.metrics if name not in known]
        if unknown or not asked.metrics:
            told = f"there is no metric {', '.join(unknown) or 'given'}: choose from {', '.join(known)}"
            raise UserError(told + (FID if "fid" in unknown else ""))
        return asked

    def which(self, sees: str | None = None, needs: str | None = None) -> tuple[str, ...]:
        """Names of the metrics that see or need something."""
        found = ((name, of_option(name)) for name in self.metrics)
        return tuple(name for name, m in found if (sees is None or m.sees == sees) and (not needs or needs in m.needs))

    @property
    def features(self) -> tuple[str, ...]:
        """The metrics of a detector's features."""
        return self.which(sees="detector")

    @property
    def compared(self) -> tuple[str, ...]:
        """The metrics that need a reference."""
        return self.which(needs="reference")

    @property
    def ones(self) -> int:
        """Processes of the official evaluator whose covariance starts from ones, if the protocol has that quirk."""
        return self.protocol.ranks if self.protocol and "fd" in self.metrics else 0

    @property
    def counts_reference(self) -> bool:
        """Whether the error of the Frechet distance counts the sampling of the reference."""
        return self.reference_sampled and "fd" in self.metrics

    @property
    def overridden(self) -> dict[str, Any]:
        """The options given that differ from the protocol."""
        base = _settings(self.protocol)
        shared = (key for key in OF_A_PROTOCOL if key in base and key in self.given)
        return {key: self.given[key] for key in shared if self.given[key] != base[key]}

    def about(self) -> dict[str, Any] | None:
        """The protocol for a record; what it says of labels, rounding and reference cannot be seen in the images."""
        if self.protocol is None:
            return None
        title = self.protocol.title(self.overridden)
        return {"title": title, "overridden": self.overridden, **self.protocol.model_dump(mode="json")}

    def check(self) -> None:
        """Refuse a call that lacks what its metrics need.

        Raises:
            UserError: the first thing that lacks.
        """
        needed = [
            (self.features, self.detector, "--detector is missing, for example lite0-320@64"),
            (self.compared, self.reference, "REFERENCE is missing: give the images or moments to compare with"),
            (
                self.which(needs="captions"),
                self.prompts,
                "--prompts is missing: a file with one caption for each image, in their order",
            ),
            (
                self.which(needs="images per prompt"),
                self.per_prompt,
                "--per-prompt K is missing: images i K to i K + K - 1 belong to prompt i",
            ),
        ]
        for names, value, lacking in needed:
            if names and value is None:
                raise UserError(f"{', '.join(names)}: {lacking}")

    def unused(self) -> list[str]:
        """Warnings about options that were given and no metric uses."""
        captioned, diversity = self.which(needs="captions"), self.which(needs="images per prompt")
        users = {
            "reference": self.compared,
            "prompts": captioned,
            "clip": captioned,
            "per_prompt": diversity,
            "reference_sampled": [name for name in self.metrics if name == "fd"],
            "detector": self.features,
            "geometry": [*self.features, *diversity],
        }
        idle = [name for name in users if self.given.get(name) and not users[name]]
        shown = ["REFERENCE" if name == "reference" else f"--{name.replace('_', '-')}" for name in idle]
        return [f"{name} is not used: no metric of {','.join(self.metrics)} needs it" for name in shown]


def _settings(protocol: NamedProtocol | None) -> dict[str, Any]:
    """Options that a protocol sets."""
    if protocol is None:
        return {}
    # the class of an image follows from its index only where labels go round the classes
    classes = protocol.classes if protocol.labels == "cyclic" else None
    return {**{key: getattr(protocol, key) for key in OF_A_PROTOCOL}, "classes": classes}
