"""What a command line asks for: options, filled in by a named protocol where they are left out."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dmd2.core.errors import UserError
from dmd2.experiment.protocols import NamedProtocol, named
from eval.pixels.resize import NONE
from eval.score.measure import COMPARE, METRICS, known

CLIP, DIVERSITY = "clip-score", "lpips-diversity"
VALUES = (CLIP, DIVERSITY)  # one value per image or prompt: they need neither detector nor reference


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
        known(asked.metrics, dict.fromkeys([*table, *VALUES]))
        return asked

    @property
    def features(self) -> tuple[str, ...]:
        """The metrics of a detector's features."""
        return tuple(name for name in self.metrics if name in METRICS)

    @property
    def compared(self) -> tuple[str, ...]:
        """The metrics that need a reference."""
        return tuple(name for name in self.metrics if name in COMPARE)

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
        if CLIP in self.metrics and inputs.prompts is None:
            raise UserError(f"{CLIP}: --prompts is missing: a file with one caption for each image, in their order")
        if DIVERSITY in self.metrics and inputs.per_prompt is None:
            raise UserError(f"{DIVERSITY}: --per-prompt K is missing: images i K to i K + K - 1 belong to prompt i")

    def unused(self, inputs: Inputs, **options: Any) -> list[str]:
        """Warnings about inputs and options that no metric uses."""
        users = {
            "reference": self.compared, "prompts": [CLIP], "clip": [CLIP], "per_prompt": [DIVERSITY],
            "detector": self.features, "geometry": [*self.features, DIVERSITY], "reference_sampled": ["fd"],
        }  # fmt: skip
        given = {name: value for name, value in {**vars(inputs), **options}.items() if value}
        idle = [name for name in given if not set(users[name]) & set(self.metrics)]
        shown = ["REFERENCE" if name == "reference" else f"--{name.replace('_', '-')}" for name in idle]
        return [f"{name} is not used: no metric of {','.join(self.metrics)} needs it" for name in shown]
