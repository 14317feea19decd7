"""What a command line asks for: options, filled in by a named protocol where they are left out."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dmd2.core.errors import UserError
from dmd2.experiment.metrics import Metric, of_option
from dmd2.experiment.protocols import NamedProtocol, named
from eval.pixels.resize import NONE


@dataclass(frozen=True)
class Inputs:
    """What some metrics need besides the images: see the options of these names."""

    reference: Path | None
    prompts: Path | None
    clip: Path | None
    per_prompt: int | None


@dataclass(frozen=True)
class Asked:
    """Metrics and their settings.

    `diversity_geometry` is the one asked for by option, None leaves LPIPS diversity its own: a protocol's `geometry` is
    that of its Frechet distance. `overridden` holds the options that differ from the protocol.
    """

    metrics: tuple[str, ...]
    detector: str | None = None
    geometry: str = NONE.name
    diversity_geometry: str | None = None
    images: int | None = None
    classes: int | None = None
    protocol: NamedProtocol | None = None
    overridden: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(table: Collection[str], protocol: str | None, metrics: str | None, **options: str | int | None) -> Asked:
        """Settings of the options given, then of the protocol, then the defaults.

        Args:
            table: metrics that may be asked for.
            protocol: its name.
            metrics: comma-separated; by default those of the protocol, or ``fd``.
            options: detector, geometry, images, classes.

        Raises:
            UserError: an unknown metric or protocol.
        """
        chosen: dict[str, Any] = {key: value for key, value in options.items() if value is not None}
        own = {"diversity_geometry": chosen.get("geometry")}
        if metrics is not None:
            chosen["metrics"] = tuple(metrics.split(","))
        base: dict[str, Any] = {"metrics": ("fd",)}
        found = named(protocol) if protocol else None
        if found:
            base = {
                "metrics": found.metrics, "detector": found.detector, "geometry": found.geometry,
                "images": found.images,
                # only labels that go round the classes can be told from an image's place
                "classes": found.classes if found.labels == "cyclic" else None,
            }  # fmt: skip
        other = {key: value for key, value in chosen.items() if found and value != base[key]}
        asked = Asked(**{**base, **chosen, **own}, protocol=found, overridden=other)
        unknown = [name for name in asked.metrics if name not in table]
        if unknown or not asked.metrics:
            raise UserError(f"there is no metric {', '.join(unknown) or 'given'}: choose from {', '.join(table)}")
        return asked

    def which(self, sees: str | None = None, needs: str | None = None) -> tuple[str, ...]:
        """Names of the metrics that see or need something."""
        found = ((name, of_option(name)) for name in self.metrics)
        return tuple(name for name, m in found if (sees is None or m.sees == sees) and (not needs or needs in m.needs))

    @property
    def chosen(self) -> list[Metric]:
        """The metrics: those of a detector's features, then the others."""
        return sorted(map(of_option, self.metrics), key=lambda metric: ("detector", "clip", "lpips").index(metric.sees))

    @property
    def features(self) -> tuple[str, ...]:
        """The metrics of a detector's features."""
        return self.which(sees="detector")

    @property
    def compared(self) -> tuple[str, ...]:
        """The metrics that need a reference."""
        return self.which(needs="reference")

    @property
    def ones(self) -> int | None:
        """Processes of the official evaluator whose covariance starts from ones, if the protocol has that quirk."""
        if self.protocol is None or "fd" not in self.metrics:
            return None
        return self.protocol.ranks or None

    def title(self) -> str | None:
        """Name of the protocol and what differs from it."""
        return self.protocol.title(self.overridden) if self.protocol else None

    def about(self) -> dict[str, Any] | None:
        """The protocol for a record; what it says of labels, rounding and reference cannot be seen in the images."""
        if self.protocol is None:
            return None
        return {"title": self.title(), "overridden": self.overridden, **self.protocol.model_dump(mode="json")}

    def check(self, inputs: Inputs) -> None:
        """Refuse a call that lacks what its metrics need.

        Raises:
            UserError: the first thing that lacks.
        """
        if self.features and self.detector is None:
            raise UserError(f"{', '.join(self.features)}: --detector is missing, for example lite0-320@64")
        if self.compared and inputs.reference is None:
            raise UserError(
                f"{', '.join(self.compared)}: REFERENCE is missing: give the images or moments to compare with"
            )
        if inputs.prompts is None and (names := self.which(needs="captions")):
            told = "a file with one caption for each image, in their order"
            raise UserError(f"{', '.join(names)}: --prompts is missing: {told}")
        if inputs.per_prompt is None and (names := self.which(needs="images per prompt")):
            told = "images i K to i K + K - 1 belong to prompt i"
            raise UserError(f"{', '.join(names)}: --per-prompt K is missing: {told}")

    def unused(self, inputs: Inputs, **options: Any) -> list[str]:
        """Warnings about inputs and options that no metric uses."""
        captioned, diversity = self.which(needs="captions"), self.which(needs="images per prompt")
        users = {
            "reference": self.compared, "prompts": captioned, "clip": captioned, "per_prompt": diversity,
            "detector": self.features, "geometry": [*self.features, *diversity],
            "reference_sampled": [name for name in self.metrics if name == "fd"],
        }  # fmt: skip
        given = {name: value for name, value in {**vars(inputs), **options}.items() if value}
        shown = ["REFERENCE" if n == "reference" else f"--{n.replace('_', '-')}" for n in given if not users[n]]
        return [f"{name} is not used: no metric of {','.join(self.metrics)} needs it" for name in shown]
