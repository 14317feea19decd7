"""The prompts that images are drawn for: encoded once, addressed by sample seed."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dmd2.data.captions import captions_of
from dmd2.data.sets import TensorSet, load_set
from dmd2.experiment.config import RunConfig
from dmd2.experiment.run_inputs import eval_prompts
from dmd2.networks.condition import Condition


@dataclass(frozen=True)
class EvalPrompts:
    """Captions and their encoded rows, of the file ``eval.prompts`` or of the real set; seed s takes number s mod n."""

    captions: list[str]
    rows: TensorSet

    @staticmethod
    def of(cfg: RunConfig) -> EvalPrompts | None:
        """Those of a run, None where it is conditioned on classes.

        Raises:
            UserError: the manifest or a file of it is missing or changed.
        """
        manifest = eval_prompts(cfg)
        return None if manifest is None else EvalPrompts(captions_of(manifest), load_set(manifest))

    def condition(self, seeds: list[int], device: torch.device | str = "cpu") -> Condition:
        """Conditions of sample seeds."""
        return self.rows.condition(torch.tensor(seeds) % len(self.rows), device)

    def captions_of(self, seeds: list[int]) -> list[str]:
        """Captions of sample seeds."""
        return [self.captions[seed % len(self.captions)] for seed in seeds]
