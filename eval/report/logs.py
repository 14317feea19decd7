"""What a table keeps of the logs of its trainings."""

from collections.abc import Iterable, Sequence
from math import isfinite
from typing import Any

import numpy as np

POINTS = 60  # of a curve
# What of a log is shown, if a row has it.
QUANTITIES = {
    "student/dm": "distribution matching loss",
    "student/regression": "regression loss",
    "student/gan": "GAN loss of the student",
    "critic/denoise": "denoising loss of the critic",
    "critic/gan": "GAN loss of the critic",
    "gan/p_real": "probability of real, of real images",
    "gan/p_fake": "probability of real, of samples",
    "dm/g_abs": "mean size of the matching gradient",
    "student/grad_norm": "gradient norm of the student",
    "critic/grad_norm": "gradient norm of the critic",
    "student/std": "SD of the samples' pixels",
}

Log = Sequence[dict[str, Any]]


def summary(logs: Iterable[Log], steps: int) -> dict[str, list[list[float]]]:
    """Curves by quantity: ``[step, value]``, each the mean over seeds and over 1/60 of the training.

    Args:
        logs: lines of the log of each seed.
        steps: of the whole training.
    """
    curves = {}
    lines = [line for log in logs for line in log]
    for name in QUANTITIES:
        points = np.array([(line["step"], line[name]) for line in lines if _is_number(line.get(name))])
        if len(points):
            parts = np.minimum(points[:, 0] * POINTS // max(1, steps), POINTS - 1)
            means = [points[parts == part].mean(axis=0) for part in np.unique(parts)]
            curves[name] = [[round(float(step)), float(f"{value:.4g}")] for step, value in means]
    return curves


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and isfinite(value)
