"""Studies as job arrays: submitit's local executor, and refusals where there is no SLURM."""

import itertools
import multiprocessing
import os
import re
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from mpvg.cli.main import main
from mpvg.study import slurm
from mpvg.study.folder import make_folder, open_folder
from mpvg.study.plan import parse_study
from mpvg.study.runner import run_cell
from mpvg.study.slurm import Worker, parse_options
from mpvg.tasks.classification import ClassificationTask
from study_text import TEXT


def test_options_are_read_as_sbatch_names_them() -> None:
    assert parse_options("partition=gpu,time=120") == {"partition": "gpu", "time": 120}
    assert parse_options("local") == {}
    for text in ("gpu", "a=1,b", "=3", "a b=1"):
        with pytest.raises(ValueError, match="allowed: NAME=VALUE"):
            parse_options(text)
    with pytest.raises(ValueError, match="time=2:00:00.*allowed: a whole number of minutes"):
        parse_options("time=2:00:00")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_jobs_do_a_study(study_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    command = ["study", str(study_file), "--out", str(out), "--seeds", "1", "--workers", "2", "--slurm", "local"]
    assert main(command) == 0
    assert "submitted 2 jobs" in capsys.readouterr().out
    assert open_folder(out).missing() == []
    assert any((out / "slurm").iterdir())


@pytest.mark.skipif(shutil.which("srun") is not None, reason="this machine has SLURM")
def test_a_machine_without_slurm_refuses_in_one_line(
    study_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["study", str(study_file), "--out", str(out), "--slurm", "partition=gpu"]) == 2
    error = capsys.readouterr().err
    assert "this machine has no SLURM" in error
    assert error.count("\n") == 1
    assert open_folder(out).rows() == []


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine whose `sbatch` keeps what it is given; returns the file."""
    tools, kept = tmp_path / "bin", tmp_path / "submitted"
    tools.mkdir()
    for name, text in (("srun", "exit 1"), ("sbatch", f'cp "$1" {kept}; echo "Submitted batch job 12"')):
        (tools / name).write_text(f"#!/bin/sh\n{text}\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    return kept


def test_workers_are_submitted_as_an_array_with_the_options_given(
    study_file: Path, tmp_path: Path, cluster: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["study", str(study_file), "--out", str(tmp_path / "out"), "--workers", "3", "--slurm"]
    assert main([*command, "partition=gpu,time=120,gpus_per_node=1"]) == 0
    assert "submitted 3 jobs: 12_0, 12_1, 12_2" in capsys.readouterr().out
    given = cluster.read_text().splitlines()
    for option in ("array=0-2%3", "partition=gpu", "time=120", "gpus-per-node=1", "signal=USR2@90"):
        assert f"#SBATCH --{option}" in given


@pytest.mark.parametrize(
    ("options", "said"),
    [("partition=gpu", "--slurm lacks time=MINUTES"), ("time=9,speed=1", r"\['speed'\].*sbatch's names with _ for -")],
)
def test_options_that_are_missing_or_unknown_are_refused_in_one_line(
    study_file: Path, tmp_path: Path, cluster: Path, capsys: pytest.CaptureFixture[str], options: str, said: str
) -> None:
    assert main(["study", str(study_file), "--out", str(tmp_path / "out"), "--slurm", options]) == 2
    error = capsys.readouterr().err
    assert re.search(said, error)
    assert error.count("\n") == 1
    assert not cluster.exists()


QUEUED_AGAIN = 144
STEP = 3


def _job(path: Path) -> None:
    """A job of submitit's whose time is nearly up during a step; its handlers are as submitit's."""
    losses, calls = ClassificationTask.losses, itertools.count(1)

    def losses_until_the_signal(self: ClassificationTask, *arguments: Any) -> Any:
        if next(calls) == STEP:
            os.kill(os.getpid(), signal.SIGUSR2)
        return losses(self, *arguments)

    def requeue(number: int, frame: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)  # as SLURM does to a job that is queued again
        sys.exit(QUEUED_AGAIN)

    signal.signal(signal.SIGUSR2, requeue)
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ClassificationTask, "losses", losses_until_the_signal)
        Worker()(str(path))


def test_a_job_whose_time_is_nearly_up_saves_its_run_and_is_queued_again(tmp_path: Path) -> None:
    study = parse_study(TEXT.replace("batch_size: 700", "batch_size: 200").encode(), "mini.yaml")
    interrupted, whole = (make_folder(tmp_path / name, study, "tiny", seeds=1) for name in ("out", "whole"))
    job = multiprocessing.get_context("fork").Process(target=_job, args=(interrupted.path,))
    job.start()
    job.join(60)
    assert job.exitcode == QUEUED_AGAIN
    assert interrupted.rows() == []
    cell = interrupted.cells()[0]
    last = interrupted.path / cell.folder / "checkpoints/last"
    assert last.resolve().name == f"step-{STEP + 1:08}", "a signal is read one step later"
    assert run_cell(interrupted, cell).weights == run_cell(whole, whole.cells()[0]).weights


def _idle_job(path: Path) -> None:
    """The same between two runs, where no training handles signals."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slurm, "work", lambda path: os.kill(os.getpid(), signal.SIGUSR2))
        _job(path)


def test_a_job_whose_time_is_nearly_up_between_two_runs_is_queued_again(tmp_path: Path) -> None:
    job = multiprocessing.get_context("fork").Process(target=_idle_job, args=(tmp_path,))
    job.start()
    job.join(60)
    assert job.exitcode == QUEUED_AGAIN
