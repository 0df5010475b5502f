"""The ledger: what is appended is there once, what is torn is done again, and what is damaged is named."""

import dataclasses
import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from mpvg.recipes import recipe
from mpvg.study.folder import make_folder
from mpvg.study.ledger import Row, append_row, config_differences, read_ledger
from mpvg.study.plan import Study
from mpvg.study.replay import choose_row
from study_text import row_values, write_ledger


def row(arm: str = "gap", seed: int = 0, **more: Any) -> Row:
    return Row(**row_values(arm, seed, **more))


def test_rows_come_back_as_they_were_appended(tmp_path: Path) -> None:
    file = tmp_path / "ledger.jsonl"
    assert read_ledger(file) == []
    rows = [row("gap", 0), row("gap", 1), row("pvg", 0, status="diverged", metrics={}, reason="the loss is nan")]
    assert [append_row(file, one) for one in rows] == [True, True, True]
    assert read_ledger(file) == rows
    assert append_row(file, row("gap", 1, nll=3.0)) is False, "a run counts once"
    assert read_ledger(file) == rows


@pytest.mark.parametrize("torn", [b"{", b'{"format": 1', json.dumps(row_values("gap", 1)).encode(), b"\xff\xfe"])
def test_a_torn_last_line_is_not_a_row_and_goes_when_the_next_is_appended(tmp_path: Path, torn: bytes) -> None:
    file = tmp_path / "ledger.jsonl"
    write_ledger(file, [row_values("gap", 0)])
    file.write_bytes(file.read_bytes() + torn)
    assert [one.seed for one in read_ledger(file)] == [0]
    append_row(file, row("gap", 2))
    assert [one.seed for one in read_ledger(file)] == [0, 2]
    assert file.read_bytes().count(b"\n") == 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": "one"}, "seed is 'one'"),
        ({"format": 2}, "it has format 2, and this version of mpvg reads 1"),
        ({"status": "fine"}, "status is 'fine'"),
        ({"metrics": {"nll": "low"}}, "metrics"),
        ({"metrics": {"nll": None}}, "metrics"),
        ({"more": 1}, "unknown config key 'more'"),
        ({"epochs": True}, "epochs is True"),
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    file = tmp_path / "ledger.jsonl"
    write_ledger(file, [row_values("gap", 0), row_values("gap", 1) | change, row_values("gap", 2)])
    with pytest.raises(ValueError, match=r"ledger.jsonl, line 2 is damaged") as caught:
        read_ledger(file)
    assert said in str(caught.value)


def test_a_run_that_is_there_twice_is_refused_with_both_lines(tmp_path: Path) -> None:
    write_ledger(tmp_path / "ledger.jsonl", [row_values("gap", 0), row_values("pvg", 0), row_values("gap", 0)])
    with pytest.raises(ValueError, match=r"arm gap, seed 0, in setting digits twice \(lines 1 and 3\)"):
        read_ledger(tmp_path / "ledger.jsonl")


def _append(file: str, first: int) -> None:
    for seed in range(first, first + 20):
        append_row(Path(file), row("gap", seed))


def test_processes_that_append_at_once_lose_and_tear_nothing(tmp_path: Path) -> None:
    file = tmp_path / "ledger.jsonl"
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_append, args=(str(file), 10 * number)) for number in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert sorted(one.seed for one in read_ledger(file)) == list(range(50))  # the ranges overlap by half


@pytest.mark.parametrize("name", ["digits", "t2t_vit_7_cifar100", "deit_tiny"])
def test_a_row_rebuilds_its_config(name: str) -> None:
    config = dataclasses.replace(recipe(name), seed=7, method={"first_layer": 1, "gain": 0.02})
    values = json.loads(json.dumps(config_differences(config)))
    assert row(digest=config.digest(), config=values).run_config().digest() == config.digest()
    with pytest.raises(ValueError, match="the row says 2-000000000000"):
        row(config=values).run_config()


def test_a_row_of_another_plan_is_refused_and_nothing_is_lost(study: Study, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "out", study, "tiny")
    cell = folder.cells()[0]
    write_ledger(folder.ledger, [row_values(cell.arm, 0, digest=cell.config.digest())])
    assert len(folder.missing()) == len(folder.cells()) - 1
    content = json.dumps(row_values(cell.arm, 0)) + "\n"
    folder.ledger.write_text(content)
    with pytest.raises(ValueError, match="line 1: arm gap in setting digits was run as 2-000000000000") as caught:
        folder.missing()
    assert "give another --out, or the study that it was run with" in str(caught.value)
    assert folder.ledger.read_text() == content


def test_a_row_with_a_metric_that_nobody_knows_is_not_run_again(tmp_path: Path) -> None:
    config = recipe("digits")
    made = {"config": config_differences(config), "digest": config.digest(), "seed": config.seed}
    values = row_values("gap", 0) | made | {"metrics": {"nll": 1.0, "foo": 2.0}}
    write_ledger(tmp_path / "ledger.jsonl", [values])
    with pytest.raises(ValueError, match=r"ledger.jsonl, line 1: unknown metric 'foo'. Known: accuracy"):
        choose_row(tmp_path / "ledger.jsonl", 1)
