"""Tables: one recomputed by hand from a ledger, every form of it, and names that try to break out."""

import base64
import csv
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from mpvg.study.folder import make_folder
from mpvg.study.ledger import read_ledger
from mpvg.study.paper import printed_tables
from mpvg.study.plan import Study, parse_study, read_study, ready_studies
from mpvg.study.results import collect
from mpvg.study.tables import headline, render, write_tables
from study_text import TEXT, row_values, write_ledger

VALUES = {
    "gap": [(2.10, 0.80), (2.05, 0.82), (2.20, 0.79), (2.15, 0.81), (2.08, 0.83)],
    "pvg": [(1.60, 0.90), (1.70, 0.91), (1.65, 0.89), (1.62, 0.92), (1.66, 0.90)],
    "gap_again": [(2.12, 0.80), (2.07, 0.81), (2.19, 0.80), (2.11, 0.82), (2.09, 0.82)],
}


def ledger_rows(**changes: Any) -> list[dict[str, Any]]:
    first = {"gap_again": 1000}
    return [
        row_values(arm, first.get(arm, 0) + seed, nll=nll, accuracy=accuracy, **changes)
        for arm, pairs in VALUES.items()
        for seed, (nll, accuracy) in enumerate(pairs)
    ]


def write(tmp_path: Path, study: Study, rows: list[dict[str, Any]]) -> Path:
    """A study's folder with rows that have the plan's digests."""
    folder = make_folder(tmp_path / "out", study, "tiny", seeds=5)
    digests = {cell.key: cell.config.digest() for cell in folder.cells()}
    write_ledger(folder.ledger, [row | {"digest": digests["digits", row["arm"], row["seed"]]} for row in rows])
    return folder.path


def test_a_table_recomputed_by_hand(study: Study, tmp_path: Path) -> None:
    path = write(tmp_path, study, ledger_rows())
    write_tables(path)
    lines = [json.loads(line) for line in (path / "ledger.jsonl").read_text().splitlines()]
    nll = {arm: np.array([line["metrics"]["nll"] for line in lines if line["arm"] == arm]) for arm in VALUES}
    half = stats.t.ppf(0.975, 4) * nll["gap"].std(ddof=1) / math.sqrt(5)
    page = (path / "table.md").read_text()
    assert f"| GAP | 5 | {nll['gap'].mean():.4f} ± {half:.4f} | 81.00 ±" in page
    difference = nll["pvg"].mean() - nll["gap"].mean()
    error = math.sqrt(sum(nll[arm].var(ddof=1) / 5 for arm in ("pvg", "gap")))
    degrees = error**4 / sum((nll[arm].var(ddof=1) / 5) ** 2 / 4 for arm in ("pvg", "gap"))
    reach = stats.t.ppf(0.975, degrees) * error
    # No seed of PVG is above one of GAP, so that only 2 of the 252 permutations are as far apart.
    row = f"| PVG - GAP | {difference:+.4f} | {difference - reach:+.4f} to {difference + reach:+.4f} | {2 / 252:.3f} |"
    assert row in page
    assert f"{row} {2 / 252:.3f} | 1.000 | lower |" in page  # the control is not in Holm's family
    assert "control holds" in page


def test_every_form_has_the_same_numbers(study: Study, tmp_path: Path) -> None:
    path = write(tmp_path, study, ledger_rows())
    assert {file.name for file in write_tables(path)} == {
        *("table.md", "table.tex", "table.html", "table.csv", "results.json", "bars.svg")
    }
    mean = float(np.mean([nll for nll, _ in VALUES["pvg"]]))
    assert f"{mean:.4f}" in (path / "table.tex").read_text()
    assert f"<td>{mean:.4f} ±" in (path / "table.html").read_text()
    (row,) = [
        row
        for row in csv.DictReader(io.StringIO((path / "table.csv").read_text()))
        if (row["arm"], row["metric"]) == ("pvg", "nll")
    ]
    assert float(row["mean"]) == pytest.approx(mean)
    values = json.loads((path / "results.json").read_text())
    assert [c["verdict"] for c in values["contrasts"] if c["contrast"] == "pvg_over_gap"] == ["lower", "higher"]


def test_the_same_ledger_gives_the_same_bytes(study: Study, tmp_path: Path) -> None:
    path = write(tmp_path, study, ledger_rows())
    first = {file: file.read_bytes() for file in write_tables(path)}
    assert {file: file.read_bytes() for file in write_tables(path)} == first


def test_latex_and_html_escape_names(study: Study, tmp_path: Path) -> None:
    label = r'"<b>100 %_a & {x} \\ $y$ | z"'
    odd = parse_study(TEXT.replace("label: PVG", f"label: {label}").encode(), "mini.yaml")
    path = write(tmp_path, odd, ledger_rows())
    write_tables(path)
    tex, html = (path / "table.tex").read_text(), (path / "table.html").read_text()
    assert r"$<$b$>$100 \%\_a \& \{x\} \textbackslash{} \$y\$ $|$ z & 5" in tex
    assert "<td>&lt;b&gt;100 %_a &amp; {x} \\ $y$ | z</td>" in html
    assert "<b>" not in html
    page = (path / "table.md").read_text()
    assert "&lt;b>100" in page
    assert "$y$ \\| z | 5 |" in page


def test_a_name_stays_in_its_row(study: Study, tmp_path: Path) -> None:
    odd = parse_study(TEXT.replace("label: PVG", r'label: "![x](https://y)\n\n| z"').encode(), "mini.yaml")
    path = write(tmp_path, odd, ledger_rows())
    write_tables(path)
    assert "| !\\[x](https://y) \\| z | 5 |" in (path / "table.md").read_text()
    assert "![x](https://y) $|$ z & 5" in (path / "table.tex").read_text()


def test_the_page_holds_its_picture_and_asks_for_nothing(study: Study, tmp_path: Path) -> None:
    path = write(tmp_path, study, ledger_rows())
    write_tables(path)
    page = (path / "table.html").read_text()
    (picture,) = re.findall(r'<img src="data:image/svg\+xml;base64,([^"]+)"', page)
    assert base64.b64decode(picture) == (path / "bars.svg").read_bytes()
    assert not re.search(r"(src|href)=\"(?!data:)|<script|url\(", page)


def test_runs_that_diverged_are_counted_and_in_no_mean(study: Study, tmp_path: Path) -> None:
    rows = ledger_rows()
    rows[0] |= {"status": "diverged", "metrics": {}, "best": {}, "parameters": None, "reason": "the loss is nan"}
    path = write(tmp_path, study, rows)
    write_tables(path)
    page = (path / "table.md").read_text()
    assert "digits: 1 of 5 runs of GAP diverged; they are in no mean." in page
    assert "Not every arm has as many runs" not in page
    assert f"| GAP | 4 (1 diverged) | {np.mean([nll for nll, _ in VALUES['gap'][1:]]):.4f} ±" in page


def test_a_control_that_differs_comes_first(study: Study, tmp_path: Path) -> None:
    rows = ledger_rows()
    for row in rows:
        if row["arm"] == "gap_again":
            row["metrics"] = {"nll": row["metrics"]["nll"] + 3, "accuracy": 0.1}
    path = write(tmp_path, study, rows)
    results = collect(study, "tiny", read_ledger(path / "ledger.jsonl"))
    assert headline(results)[0].startswith("digits: An arm differs from itself on other seeds")
    assert not results.settings[0].controls_hold


def test_runs_of_other_machines_and_data_are_told(study: Study, tmp_path: Path) -> None:
    rows = ledger_rows(train_hash="a")
    rows[3] |= {"train_hash": "b", "hardware": "another"}
    remarks = collect(study, "tiny", read_ledger(write(tmp_path, study, rows) / "ledger.jsonl")).settings[0].remarks
    assert remarks == ("The runs differ in train hash: a, b.", "The runs differ in hardware: another, some.")


def test_one_seed_gives_means_and_no_test(study: Study, tmp_path: Path) -> None:
    rows = [row for row in ledger_rows() if row["seed"] % 1000 == 0]
    texts = render(collect(study, "tiny", read_ledger(write(tmp_path, study, rows) / "ledger.jsonl")))
    assert "| GAP | 1 | 2.1000 | 80.00 |" in texts["table.md"]
    assert "PVG - GAP" not in texts["table.md"]
    assert "digits: Fewer than 2 runs, so that nothing is tested: GAP, PVG, GAP again." in texts["table.md"]


def test_a_study_that_is_not_complete_says_so(study: Study, tmp_path: Path) -> None:
    rows = [row for row in ledger_rows() if (row["arm"], row["seed"]) not in (("pvg", 3), ("pvg", 4))]
    results = collect(study, "tiny", read_ledger(write(tmp_path, study, rows) / "ledger.jsonl"))
    assert headline(results)[0] == "digits: Not every arm has as many runs: PVG has 3, GAP has 5."


def test_a_control_that_cannot_fail_is_no_control(study: Study, tmp_path: Path) -> None:
    rows = [row for row in ledger_rows() if row["seed"] % 1000 < 4]
    texts = render(collect(study, "tiny", read_ledger(write(tmp_path, study, rows) / "ledger.jsonl")))
    assert "| no control: 4 seeds cannot show a difference |" in texts["table.md"]


def test_the_papers_values_stand_beside_and_below(study: Study, tmp_path: Path) -> None:
    text = TEXT.replace("reference: gap", "reference: gap\ntable: fig5")
    path = write(tmp_path, parse_study(text.encode(), "mini.yaml"), ledger_rows())
    write_tables(path)
    page = (path / "table.md").read_text()
    assert "| paper: DeiT-Ti, top-1, % | paper: above GAP |" in page
    rows = {line.split(" | ")[0]: line for line in page.splitlines() if " ± " in line}
    assert rows["| GAP"].endswith("| 100 | 72.40 | +0.00 |")
    assert rows["| PVG"].endswith("| 100 | 73.17 | +0.77 |")
    assert rows["| GAP again"].endswith("| 100 | - | - |")
    assert "| GAP, PE at the Last LN | 72.14 |" in page


def test_a_network_of_the_paper_stands_beside_its_own_column() -> None:
    table = printed_tables()["table1"]
    assert table.columns[table.column("Swin-Ti")] == "Swin-Ti"
    assert table.columns[table.column("ViT, digits")] == "DeiT-Ti"


def test_the_papers_tables_are_complete() -> None:
    assert set(printed_tables()) == {*(f"table{number}" for number in range(1, 7)), "fig1", "fig5"}
    for table in printed_tables().values():
        assert all(len(row) == len(table.columns) for row in table.rows.values())
    with pytest.raises(ValueError, match="unknown table of the paper 'table9'"):
        parse_study(TEXT.replace("reference: gap", "reference: gap\ntable: table9").encode(), "mini.yaml")


def test_the_arms_of_ready_studies_are_called_as_in_the_paper() -> None:
    for study in map(read_study, ready_studies()):
        if study.table is not None:
            assert printed_tables()[study.table].rows.keys() <= {arm.label for arm in study.arms}, study.name
            columns = printed_tables()[study.table].columns
            if study.name == "table3":  # whose columns are two metrics of one network
                columns = columns[:1]
            assert [s.label for s in study.scales.get("paper", ())] == list(columns), study.name
