"""Studies as job arrays: submitit's local executor, and refusals where there is no SLURM."""

import shutil
from pathlib import Path

import pytest

from mpvg.cli.main import main
from mpvg.study.folder import open_folder
from mpvg.study.slurm import parse_options


def test_options_are_read_as_submitit_names_them() -> None:
    assert parse_options("slurm_partition=gpu,timeout_min=120") == {"slurm_partition": "gpu", "timeout_min": 120}
    assert parse_options("local") == {}
    for text in ("gpu", "a=1,b", "=3", "a b=1"):
        with pytest.raises(ValueError, match="allowed: NAME=VALUE"):
            parse_options(text)


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
    assert main(["study", str(study_file), "--out", str(out), "--slurm", "slurm_partition=gpu"]) == 2
    error = capsys.readouterr().err
    assert "this machine has no SLURM" in error
    assert error.count("\n") == 1
    assert open_folder(out).rows() == []
