"""A training as a Slurm job: what is sent, that it is sent once, and what is said when it fails."""

import dataclasses
import re
import sys

import pytest

import dmd2.launch.slurm
import dmd2.launch.wait
from dmd2.core.errors import UserError
from dmd2.core.retraining import continued
from dmd2.core.run import RunId
from dmd2.core.slurm_queue import NO_SLURM
from dmd2.experiment.run_inputs import goal_of
from dmd2.launch.slurm import SlurmTraining, extra_options
from dmd2.launch.wait import log_path, obituary, wait
from tests.digits_run import CONFIG, OTHER, RUN, finish, queued, submitted, training, whenever_it_sleeps

pytestmark = pytest.mark.usefixtures("digits", "fake")


# Submit or attach.
def test_a_new_training_is_submitted_once_and_its_id_is_kept(fake, capsys):
    assert training().submit_or_attach() == "7"
    queued(fake)
    assert training().submit_or_attach() == "7"
    assert len(fake.calls("sbatch")) == 1
    assert submitted() == ["7"]
    assert "submitted Slurm job 7" in capsys.readouterr().err
    assert fake.calls("squeue")[0].endswith(f"--name {training().name}")


def test_the_name_belongs_to_run_and_workspace(tmp_path, monkeypatch):
    names = {SlurmTraining(RunId("digits", "dmd2", seed), CONFIG, training().cluster).name for seed in (0, 1)}
    assert training().name.startswith("digits.dmd2.seed0.")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert len(names | {training().name}) == 3


def test_a_job_that_ended_is_replaced_and_both_are_remembered(fake):
    training().submit_or_attach()
    queued(fake, state="FAILED")
    fake.answer("sbatch", "Submitted batch job 8")
    assert training().submit_or_attach() == "8"
    assert submitted() == ["7", "8"]


def test_a_job_whose_id_was_lost_is_found(fake):
    fake.refuse("sbatch", "killed here")
    with pytest.raises(UserError):
        training().submit_or_attach()
    queued(fake, job="41")
    assert training().submit_or_attach() == "41"
    assert submitted() == ["41"]


def test_of_two_launchers_at_once_the_second_finds_the_job_of_the_first(fake, monkeypatch):
    monkeypatch.setattr(
        dmd2.launch.slurm, "flock", lambda lock, how: queued(fake)
    )  # so long the first one held the lock
    assert training().submit_or_attach() == "7"
    assert fake.calls("sbatch") == []


def test_a_job_that_is_just_ending_is_waited_for(fake, monkeypatch):
    training().submit_or_attach()
    queued(fake, state="COMPLETING")
    whenever_it_sleeps(monkeypatch, lambda: queued(fake, state="CANCELLED"))
    fake.answer("sbatch", "Submitted batch job 8")
    assert training().submit_or_attach() == "8"


def test_a_live_job_of_another_config_is_not_taken_for_this_one(fake):
    training(OTHER).submit_or_attach()
    queued(fake)
    with pytest.raises(UserError, match=r"Slurm job 7 trains an older config .*dmd2 cancel digits/dmd2/seed0"):
        training().submit_or_attach()
    assert len(fake.calls("sbatch")) == 1


def test_jobs_of_another_config_are_not_counted_as_this_runs(fake):
    training(OTHER).submit_or_attach()
    fake.answer("sbatch", "Submitted batch job 8")
    training().submit_or_attach()
    assert submitted() == ["8"]


def test_a_finished_training_is_submitted_again_if_asked_to_and_once(fake):
    training().submit_or_attach()
    old = training().goal.key
    finish()
    again = dataclasses.replace(training(), again="always")
    fake.answer("sbatch", "Submitted batch job 8")
    assert again.submit_or_attach() == "8" and submitted() == ["8"]  # whose costs are not those of job 7
    assert again.goal.key == training().goal.key != old
    queued(fake, job="8")
    with pytest.raises(UserError, match="Slurm job 8 trains this run: wait for it, or stop it by"):
        again.submit_or_attach()
    assert training().submit_or_attach() == "8"


def test_a_training_of_other_code_is_submitted_again_only_under_the_policy(fake):
    continued(RUN, training().goal.key, 0, {"dmd2.method.batches": "old"})
    record = finish()
    assert training().submit_or_attach() is None and training().goal.reached() == record
    assert dataclasses.replace(training(), again="changed").submit_or_attach() == "7"
    assert training().goal.key != record["key"] and training().goal.reached() is None


def test_a_finished_training_is_not_submitted_again(fake):
    record = finish()
    assert training().submit_or_attach() is None
    assert wait(goal_of(RUN, CONFIG), "7", 15) == record
    assert fake.calls("sbatch") == []


def test_a_record_of_other_inputs_or_another_config_does_not_count(fake):
    finish(seed=1)
    assert training().submit_or_attach() == "7"
    finish()
    assert training(OTHER).submit_or_attach() == "7"
    assert len(fake.calls("sbatch")) == 2


# What is sent.
def test_the_script_asks_for_what_the_cluster_file_says():
    wanted = {"slurm_partition": "gpu", "slurm_account": "me", "qos": "low", "constraint": "h100", "gpu": "h100:4",
              "mem_mb": 64000, "threads": 8, "slurm_extra": "--nice=5 --exclusive"}  # fmt: skip
    script = training(train=wanted, training={"nodes": 2, "signal_seconds": 90}).script()
    options = {"partition=gpu", "account=me", "qos=low", "constraint=h100", "gpus-per-node=h100:4", "mem=64000M",
               "nodes=2", "ntasks-per-node=4", "cpus-per-task=8", "time=60", "signal=USR2@90", "requeue", "nice=5",
               "exclusive", "open-mode=append", f"job-name={training().name}"}  # fmt: skip
    assert options <= set(re.findall(r"^#SBATCH --(.*)$", script, re.M))


def test_what_the_cluster_file_does_not_say_is_not_asked_for():
    script = training().script()
    for option in ("partition", "account", "qos", "constraint", "gpus", "gres", "mem", "exclusive"):
        assert f"--{option}" not in script


def test_generic_resources_and_memory_per_cpu_are_asked_for_as_such():
    script = training(train={"gres": "gpu:h100:1", "mem_mb_per_cpu": 2000}).script()
    assert {"gres=gpu:h100:1", "mem-per-cpu=2000M"} <= set(re.findall(r"^#SBATCH --(.*)$", script, re.M))


def test_cpus_are_asked_for_by_gpu_or_by_process_since_slurm_refuses_both():
    script = training(train={"gpu": 2, "cpus_per_gpu": 4}).script()
    assert "--cpus-per-gpu=4" in script and "--cpus-per-task" not in script


def test_setup_comes_before_srun_and_the_container_before_python():
    script = training(setup=["module load cuda", "export A=1"], container="apptainer exec x.sif").script()
    before, command = script.split("# command")
    assert "\nmodule load cuda\nexport A=1\n" in before
    assert re.search(
        r"^srun .*--kill-on-bad-exit=1 --cpus-per-task=1 apptainer exec x\.sif python -u -m dmd2\.launch\.job ",
        command,
        re.M,
    )
    assert f" {sys.executable} -u -m dmd2.launch.job" in training().script()


def test_the_script_that_is_printed_is_the_one_that_is_sent(fake):
    training(train={"gpu": 2}).submit_or_attach()
    assert (RUN.folder / "jobs/submission.sh").read_text() == training(train={"gpu": 2}).script()


@pytest.mark.parametrize(
    ("text", "options"),
    [
        (None, {}),
        ("--nice=5 --exclude=node7", {"nice": "5", "exclude": "node7"}),
        ("--exclude node7 --exclusive", {"exclude": "node7", "exclusive": True}),
        ("--exclusive --nice=-5", {"exclusive": True, "nice": "-5"}),
        ("--comment='two words'", {"comment": "two words"}),
        ("--export=A=1,B=2", {"export": "A=1,B=2"}),
    ],
)
def test_extra_options_are_read_in_their_long_forms(text, options):
    assert extra_options(text) == options


@pytest.mark.parametrize(
    ("text", "word"),
    [("-p gpu", "-p"), ("--nice=5 -p gpu", "-p"), ("--exclusive -H", "-H"), ("--nice -5", "-5"), ("gpu", "gpu"),
     ("gpu --exclusive", "gpu"), ("--nice=5 gpu", "gpu"), ("--exclude a b", "b")],
)  # fmt: skip
def test_other_forms_of_extra_options_are_refused(text, word):
    with pytest.raises(UserError, match=rf"long form, as --name=value, not '{word}'"):
        extra_options(text)


def test_sbatch_sees_the_users_settings_and_nothing_of_a_surrounding_job(fake, monkeypatch):
    inside = ("SLURM_JOB_ID", "SLURM_MEM_PER_CPU", "SLURM_NTASKS", "RANK", "WORLD_SIZE")
    own = ("SLURM_CONF", "SBATCH_RESERVATION", "SBATCH_ACCOUNT", "HOME")
    for name in (*inside, *own):
        monkeypatch.setenv(name, "1")
    training().submit_or_attach()
    seen = fake.environment("sbatch")
    assert set(own) <= seen
    assert not set(inside) & seen
    assert {"SLURM_JOB_ID", "SLURM_CONF", "SBATCH_RESERVATION"} <= fake.environment("squeue")  # before, untouched
    assert "SLURM_JOB_ID" in dmd2.launch.slurm.os.environ  # and after


# What is said when it fails.
def test_an_option_with_a_key_of_its_own_is_refused_in_slurm_extra():
    with pytest.raises(UserError, match="slurm_extra: --time is the key runtime"):
        extra_options("--nice=5 --time=60")


def test_a_refusal_becomes_one_sentence_and_leaves_no_job(fake):
    fake.refuse("sbatch", "sbatch: error: one\nsbatch: error: Batch job submission failed: Invalid account")
    with pytest.raises(UserError) as told:
        training().submit_or_attach()
    assert str(told.value).startswith("digits/dmd2/seed0: the job could not be submitted: ")
    assert str(told.value).endswith("Batch job submission failed: Invalid account")
    assert "\n" not in str(told.value)
    assert submitted() == []


def test_a_machine_without_slurm_is_told_what_to_do(fake):
    fake.remove()
    for attempt in (training().submit_or_attach, training().script):
        with pytest.raises(UserError) as told:
            attempt()
        assert str(told.value) == NO_SLURM


def test_a_job_that_ended_without_result_is_told_with_slurms_word_and_the_end_of_its_log(fake, monkeypatch):
    monkeypatch.setattr(dmd2.launch.wait, "SETTLE", 0.0)
    fake.answer("sacct", "FAILED|1:0|node1|00:10:00", "OUT_OF_MEMORY|0:125|node2|00:01:00")
    log = log_path(RUN, "7")
    log.parent.mkdir(parents=True)
    log.write_text("".join(f"line {i}\n" for i in range(30)))
    with pytest.raises(UserError, match=r"7 OUT_OF_MEMORY with exit code 0:125 on node2 after 00:01:00") as told:
        wait(goal_of(RUN, CONFIG), "7", 15)
    assert [line.strip() for line in str(told.value).splitlines()[1:]] == [f"line {i}" for i in range(10, 30)]


def test_a_job_that_never_started_is_told_even_without_accounting(fake):
    fake.refuse("sacct", "Slurm accounting storage is disabled")
    told = obituary(RUN, "7")
    assert "sacct has no record of it" in told
    assert told.endswith("7_0_log.err was never written: the job did not start")


def test_a_silent_controller_is_said_once_and_waited_for(fake, monkeypatch, capsys):
    fake.refuse("squeue", "Unable to contact slurm controller")
    whenever_it_sleeps(monkeypatch, lambda: len(fake.calls("squeue")) == 3 and finish())
    wait(goal_of(RUN, CONFIG), "7", 15)
    assert capsys.readouterr().err.count("controller does not answer") == 1
