"""Runs a small study in real processes: killed, shared, stopped, diverging."""

import math
import multiprocessing
import os
import random
import shutil
import signal
import threading
import time
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from mpvg import runs
from mpvg.cli.main import main
from mpvg.files import temp_path
from mpvg.runs.lock import RunLockedError
from mpvg.study import runner
from mpvg.study.folder import StudyFolder, make_folder, open_folder
from mpvg.study.ledger import Row, read_ledger
from mpvg.study.plan import Study, parse_study
from mpvg.study.replay import choose_row, replay
from mpvg.study.runner import run_cell, visible_devices, work
from study_text import TEXT

KILLS = 5
"""Thirty, of the whole command, are in benchmarks/study_kills.py."""


@pytest.mark.parametrize(
    ("given", "expected"), [(None, ["0", "1"]), ("4,5,6", ["4", "5"]), ("GPU-a, GPU-b", ["GPU-a", "GPU-b"])]
)
def test_workers_use_the_gpus_that_this_process_may_use(
    given: str | None, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if given is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    assert visible_devices(2) == expected


def test_a_metric_that_is_not_finite_is_refused_before_the_ledger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_folder(tmp_path / "out", parse_study(TEXT.encode(), "mini.yaml"), "tiny", seeds=1)
    monkeypatch.setattr(runner, "measure", lambda *_: {"r": math.nan})
    with pytest.raises(ValueError, match="r is nan, which cannot be tested; leave it out of the study's margins"):
        runner.work(folder.path)
    assert folder.rows() == []


def worker(path: Path) -> BaseProcess:
    """A worker in a process of its own, which need not import everything again."""
    process = multiprocessing.get_context("fork").Process(target=work, args=(path,))
    process.start()
    return process


@pytest.fixture(scope="module")
def three_workers(tmp_path_factory: pytest.TempPathFactory) -> tuple[StudyFolder, list[int | None]]:
    """A study of nine runs that three workers did together, and how each of them ended."""
    study = parse_study(TEXT.encode(), "mini.yaml")
    folder = make_folder(tmp_path_factory.mktemp("study") / "out", study, "tiny", seeds=3)
    processes = [worker(folder.path) for _ in range(3)]
    for process in processes:
        process.join(120)
    return folder, [process.exitcode for process in processes]


@pytest.fixture
def done(three_workers: tuple[StudyFolder, list[int | None]], tmp_path: Path) -> StudyFolder:
    """A copy of that study."""
    return open_folder(Path(shutil.copytree(three_workers[0].path, tmp_path / "out")))


def forget(folder: StudyFolder, number: int) -> None:
    """Removes the last rows and their runs."""
    for row in folder.rows()[-number:]:
        shutil.rmtree(folder.path / row.run)
    lines = folder.ledger.read_text().splitlines(keepends=True)
    folder.ledger.write_text("".join(lines[:-number]))


def test_workers_that_are_killed_again_and_again_lose_and_double_nothing(study: Study, tmp_path: Path) -> None:
    folder, draw = make_folder(tmp_path / "out", study, "tiny", seeds=3), random.Random(0)
    rows: list[Row] = []
    for _ in range(KILLS):
        process = worker(folder.path)
        process.join(draw.uniform(0.1, 1.2))
        process.kill()
        process.join()
        now = read_ledger(folder.ledger)
        assert now[: len(rows)] == rows, "a row was lost or changed"
        rows = now
    process = worker(folder.path)
    process.join(120)
    assert process.exitcode == 0
    assert sorted(row.key for row in folder.rows()) == sorted(cell.key for cell in folder.cells())
    for row in folder.rows():  # every run folder is kept, and is what its row says
        summary = runs.load(folder.path / row.run).summary()
        assert summary is not None
        assert {name: summary[name] for name in row.metrics} == row.metrics


def test_workers_of_two_commands_share_the_work(three_workers: tuple[StudyFolder, list[int | None]]) -> None:
    folder, codes = three_workers
    assert codes == [0, 0, 0]
    assert sorted(row.key for row in folder.rows()) == sorted(cell.key for cell in folder.cells())
    assert not any((folder.path / "claims").iterdir())


def test_the_command_ends_with_tables_and_does_nothing_twice(
    done: StudyFolder, study_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    forget(done, 2)
    command = ["study", str(study_file), "--out", str(done.path), "--workers", "1"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "2 of 9 runs are missing; 1 at a time" in printed
    assert "digits: PVG - GAP: nll" in printed
    assert {file.name for file in done.path.glob("*.*")} == {
        *("study.yaml", "ledger.jsonl", "table.md", "table.tex", "table.html", "table.csv", "results.json", "bars.svg")
    }
    content = done.ledger.read_bytes()
    assert main(command) == 0
    assert done.ledger.read_bytes() == content


def test_a_claimed_run_is_left_to_its_worker(study: Study, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "out", study, "tiny")
    key = folder.cells()[0].key
    with folder.claim(key) as mine, folder.claim(key) as second:
        assert (mine, second) == (True, False)
    with folder.claim(key) as mine:
        assert mine


def test_sigterm_saves_the_runs_and_says_how_to_continue(
    study_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = study_file.read_text().replace("epochs: 1,", "epochs: 400,")
    study_file.write_text(text)
    out = tmp_path / "out"

    def stop() -> None:
        """SIGTERM to the command, which is this process, once its worker has begun to train."""
        deadline = time.monotonic() + 60
        while not (out / "runs/digits/gap/seed0/metrics.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    stopper = threading.Thread(target=stop)
    stopper.start()
    assert main(["study", str(study_file), "--out", str(out), "--workers", "1"]) == 143
    stopper.join()
    assert "every run is saved, give the same command again" in capsys.readouterr().err
    assert read_ledger(out / "ledger.jsonl") == []


def test_a_run_that_diverges_is_a_row_and_is_not_drawn_again(tmp_path: Path) -> None:
    study = parse_study(TEXT.replace("{method: pvg}", "{method: pvg, lr: 1.0e+30}").encode(), "mini.yaml")
    folder = make_folder(tmp_path / "out", study, "tiny", seeds=1)
    work(folder.path)
    rows = {row.arm: row for row in folder.rows()}
    assert (rows["pvg"].status, rows["pvg"].metrics) == ("diverged", {})
    assert "the loss is" in rows["pvg"].reason
    assert folder.missing() == []
    number = [row.arm for row in folder.rows()].index("pvg") + 1
    assert replay(*choose_row(folder.ledger, number), tmp_path / "again", folder.path).agrees


def test_a_complete_run_without_a_row_is_recorded_and_not_trained_again(study: Study, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "out", study, "tiny", seeds=1)
    first = run_cell(folder, folder.cells()[0])
    written = (folder.path / first.run / "summary.json").stat().st_mtime_ns
    again = run_cell(folder, folder.cells()[0])
    assert (folder.path / first.run / "summary.json").stat().st_mtime_ns == written
    assert (again.metrics, again.weights) == (first.metrics, first.weights)


def test_another_run_in_the_place_of_one_of_the_study_is_refused(study: Study, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "out", study, "tiny", seeds=1)
    gap, pvg = folder.cells()[:2]
    run_cell(folder, gap)
    (folder.path / "runs/digits/pvg").mkdir(parents=True)
    (folder.path / gap.folder).rename(folder.path / pvg.folder)
    with pytest.raises(ValueError, match="holds a run with another config than this plan's; remove it"):
        run_cell(folder, pvg)


def test_a_row_is_run_again_to_the_bit(done: StudyFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(done.ledger), "--row", "2"]) == 0
    assert "the weights are the same to the bit" in capsys.readouterr().out
    text = done.ledger.read_text().replace(done.rows()[1].weights or "", "0" * 64)
    done.ledger.write_text(text)
    assert main(["replay", str(done.ledger), "--row", "2"]) == 1
    assert "the weights differ, although torch and the hardware are the row's" in capsys.readouterr().out
    assert main(["replay", str(done.ledger), "--row", "99"]) == 2
    assert "--row is 99; allowed: 1 to 9" in capsys.readouterr().err


def test_elsewhere_a_row_is_compared_with_its_arms_other_seeds(done: StudyFolder, tmp_path: Path) -> None:
    done.ledger.write_text(done.ledger.read_text().replace('"hardware": "', '"hardware": "other, '))
    row, others = choose_row(done.ledger, 1)
    assert [other.arm for other in others] == [row.arm] * 2
    found = replay(row, others, tmp_path / "again", tmp_path)
    assert found.agrees
    assert found.lines[-1] == "the weights are the same to the bit"
    far = [type(row)(**{**vars(other), "metrics": {"accuracy": 0.9, "nll": 9 + n}}) for n, other in enumerate(others)]
    moved = type(row)(**{**vars(row), "weights": "0" * 64, "metrics": {"accuracy": 0.9, "nll": 9.0}})
    assert not replay(moved, far, tmp_path / "third", tmp_path).agrees


def test_a_run_that_another_machine_holds_stops_only_itself(study: Study, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "out", study, "tiny", seeds=1)
    cell = folder.cells()[0]
    run_cell(folder, cell)
    (folder.path / cell.folder / "summary.json").unlink()
    (folder.path / cell.folder / ".lock").write_text('{"pid": 5, "host": "elsewhere", "boot": "other"}')
    with pytest.raises(RunLockedError, match=r"locked by pid 5 on elsewhere.*--break_lock"):
        work(folder.path)
    assert [one.key for one in folder.missing()] == [cell.key]


def _hold_with_a_child(path: Path, started: Connection) -> None:
    """Claims a run and forks a child that outlives this process, as a loader worker may."""
    folder = open_folder(path)
    with folder.claim(folder.cells()[0].key):
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
        started.send(child)
        time.sleep(60)


def test_a_claim_ends_with_its_process_although_a_child_lives_on(study: Study, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "out", study, "tiny")
    key = folder.cells()[0].key
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=_hold_with_a_child, args=(folder.path, there))
    process.start()
    child = here.recv()
    with folder.claim(key) as mine:
        assert not mine
    process.kill()
    process.join()
    with folder.claim(key) as mine:
        assert mine
    os.kill(child, signal.SIGKILL)


def test_a_study_that_was_killed_while_its_plan_was_written_starts_anew(study: Study, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    temp_path(out / "study.yaml").write_text("study:")
    assert make_folder(out, study, "tiny").missing()


def test_a_pilot_shows_no_arms_result(done: StudyFolder, study_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["study", str(study_file), "--out", str(done.path), "--workers", "1", "--seeds", "3", "--pilot"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "seeds" in printed
    for row in done.rows():
        for value in row.metrics.values():
            assert f"{value:.4f}" not in printed
            assert f"{100 * value:.2f}" not in printed


def test_a_folder_is_gone_on_with_by_its_name(
    study: Study, study_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    folder = make_folder(out, study, "tiny", seeds=1)
    work(folder.path)
    study_file.unlink()
    assert main(["study", str(out), "--workers", "1"]) == 0
    assert f"{out}/table.md" in capsys.readouterr().out
    assert folder.missing() == []
    assert main(["study", str(out), "--data", "cifar10"]) == 2
    assert "another data (None, now cifar10)" in capsys.readouterr().err
    assert main(["study", str(tmp_path)]) == 2
    assert "holds no study: study.yaml is missing" in capsys.readouterr().err


def test_data_that_cannot_be_read_leave_no_folder(
    study_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["study", str(study_file), "--data", str(tmp_path / "nosuch"), "--out", str(out)]) == 2
    assert "nosuch' does not exist" in capsys.readouterr().err
    assert not out.exists()
