"""Faults of a real cluster on real trainings: each must end with the weights of an undisturbed one, bit for bit."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from tests.slurm.faults import FAULTS, STEPS, Outcome
from tests.slurm.workspace import SlurmWorkspace

NEW_JOB = ("cancelled", "full_disk")  # the only faults after which another job is submitted


@pytest.fixture(scope="module")
def outcomes(calm: str, workspace: SlurmWorkspace) -> Iterator[dict[str, Future[Outcome]]]:
    """All faults, three at a time: most of each is waiting for Slurm."""
    with ThreadPoolExecutor(3) as pool:
        yield {fault.__name__: pool.submit(fault, workspace) for fault in FAULTS}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_the_weights_are_those_of_an_undisturbed_run(
    fault: Callable[..., Outcome], outcomes: dict[str, Future[Outcome]], calm: str
) -> None:
    outcome = outcomes[fault.__name__].result()
    assert outcome.weights == calm
    assert len(outcome.jobs) == (2 if fault.__name__ in NEW_JOB else 1)
    assert outcome.lost_steps <= STEPS["checkpoint_every"]


def test_a_signalled_job_loses_nothing(outcomes: dict[str, Future[Outcome]]) -> None:
    assert outcomes["checkpoint_signal"].result().lost_steps == 0


def test_the_error_of_a_cancelled_job_says_so_and_how_to_go_on(outcomes: dict[str, Future[Outcome]]) -> None:
    output = outcomes["cancelled"].result().output
    assert "CANCELLED" in output and "the same command continues" in output and "_0_log.err" in output
