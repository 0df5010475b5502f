"""The tutorials' scripts do what their pages say, with fewer epochs."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

import mpvg
from mpvg import data

EXAMPLES = Path(__file__).parent.parent / "examples"


def script(name: str) -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="example")


def test_first_run_names_what_the_network_sees(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = script("first_run")["main"](tmp_path / "run", epochs=1)
    run = mpvg.load(tmp_path / "run")
    test = data.open_listing(run.config, ["val"]).val
    assert test is not None
    prepare = data.make_preprocess(run.info)
    with torch.no_grad():
        logits = run.model("best")(torch.stack([prepare(test.read(index).image) for index in range(10)]))
    assert names == [run.info.class_names[index] for index in logits.argmax(1)]
    printed = capsys.readouterr().out
    assert f"accuracy after 1 epochs: {100 * run.metrics()[-1]['accuracy']:.2f} %" in printed
    assert f"last checkpoint: NLL {run.metrics()[-1]['nll']:.4f} on 360 images" in printed


def test_compare_methods_ends_with_a_table_and_verdicts(tmp_path: Path) -> None:
    lines = script("compare_methods")["main"](tmp_path / "study", epochs=1, seeds=2)
    rows = [json.loads(line) for line in (tmp_path / "study/ledger.jsonl").read_text().splitlines()]
    assert sorted((row["arm"], row["seed"]) for row in rows) == [
        (arm, seed) for arm in ("flat", "pvg") for seed in (0, 1)
    ]
    assert [line.split("  ")[0] for line in lines[1:3]] == ["PVG", "PVG, flat"]
    assert lines[-1].startswith("digits: PVG - (PVG, flat): nll ")
    assert (tmp_path / "study/table.md").is_file()


def test_fine_tune_timm_starts_from_the_outputs_of_the_original(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example = script("fine_tune_timm")
    accuracy = example["main"](tmp_path / "run", *example["make_inputs"](tmp_path), epochs=1)
    assert "largest difference before training: 0.0e+00" in capsys.readouterr().out
    run = mpvg.load(tmp_path / "run")
    assert run.metrics()[-1]["accuracy"] == accuracy
    assert run.config.model == "timm/test_vit"
    assert "delivery.layer_norms.1.weight" in run.model().state_dict()
