"""Runs of earlier versions: they are read, evaluated, analyzed and resumed as by the version that made them."""

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mpvg.cli.main import main
from mpvg.config import FORMAT, digest_defaults, digest_format
from mpvg.runs import load
from mpvg.study.plan import make_cells, read_study

ROOT = Path(__file__).parents[1]
FIXTURES = Path(__file__).parent / "fixtures"
FORMAT_1 = FIXTURES / "run-format-1"
EXPECTED: dict[str, Any] = json.loads((FORMAT_1 / "expected.json").read_text())


def processor() -> str:
    """A fingerprint of the kind of processor, which decides about the last bits of sums."""
    first = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    names = ("vendor_id", "cpu family", "model", "flags")
    kept = sorted(line for line in first if line.split("\t")[0].split(":")[0].strip() in names)
    return hashlib.sha256("\n".join(kept).encode()).hexdigest()[:16]


def same_machine() -> bool:
    """Whether the recorded bits must come out here: the same kind of processor and the same torch."""
    recorded = EXPECTED["environment"]["versions"]["torch"]
    return processor() == EXPECTED["processor"] and torch.__version__.split("+")[0] == recorded


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run of format 1, in a folder that may be written to."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(FORMAT_1 / "run", "run", symlinks=True)
    shutil.copy(FORMAT_1 / "five.png", ".")
    torch.set_num_threads(1)
    return Path("run")


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(arguments) == 0
    return capsys.readouterr().out


def numbers(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """All values of nested JSON, each with the way to it."""
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from numbers(inner, f"{path}/{key}")
    else:
        yield path, value


def without_weights(text: str) -> str:
    """What is printed, without the lines on the weights, which format 1 did not print."""
    of_weights = re.compile(r"(run: )?weights: |beside it, the best epoch")
    lines = text.splitlines(keepends=True)
    assert any(map(of_weights.match, lines))
    return "".join(line for line in lines if not of_weights.match(line))


def test_it_is_evaluated_and_predicts_as_before(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, arguments in (
        ("evaluate", ["evaluate", "run"]),
        ("evaluate best", ["evaluate", "run", "--checkpoint", "best"]),
        ("predict", ["predict", "run", "five.png", "--checkpoint", "last"]),
    ):
        given, expected = without_weights(printed(capsys, *arguments)), EXPECTED[name]
        if same_machine():
            assert given == expected
        values = [[float(value) for value in re.findall(r"\d+\.\d+", text)] for text in (given, expected)]
        assert values[0] == pytest.approx(values[1], abs=0.3)  # one image is 0.28 points
        assert re.sub(r"\d+\.\d+", "", given) == re.sub(r"\d+\.\d+", "", expected)


def test_it_is_analyzed_as_before(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the images that were chosen then: a hundred that were not spread over the whole set."""
    monkeypatch.setattr("mpvg.data.factory._spread", lambda source, images: source.select(range(0, 3 * images, 3)))
    assert main(["analyze", "run", "--images", "100", "--out", "report"]) == 0
    found = json.loads(Path("report/results.json").read_text())["runs"][0]
    for which in ("trained", "untrained"):
        given, expected = dict(numbers(found[which])), dict(numbers(EXPECTED["analyze"][which]))
        given = {path: value for path, value in given.items() if not path.startswith("/missing")}
        expected = {path: value for path, value in expected.items() if not path.startswith("/missing")}
        assert given.keys() >= expected.keys()  # the analysis measures more than it did then
        given = {path: given[path] for path in expected}
        if same_machine():
            assert given == expected
        for path, value in expected.items():
            close = pytest.approx(value, abs=1e-3, rel=1e-3) if isinstance(value, float) else value
            assert given[path] == close, path


def test_it_is_resumed_to_the_same_bits(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--resume", "run"]) == 0
    summary = load(run).summary()
    assert summary is not None
    for name, value in EXPECTED["summary"].items():
        if name != "config_hash":
            assert summary[name] == pytest.approx(value, abs=0.01), name
    if same_machine():
        folder = run / "checkpoints/last"
        hashes = {f.stem: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.glob("*.safetensors")}
        assert hashes == EXPECTED["resumed"]
        assert without_weights(printed(capsys, "evaluate", "run")) == EXPECTED["evaluate resumed"].replace(
            "resumed:", "run:"
        )


def test_what_it_saves_after_a_resume_is_read_again(run: Path) -> None:
    """Its config stays as it is; new checkpoints carry digests of the new format."""
    config = (run / "config.yaml").read_bytes()
    assert main(["train", "--resume", "run"]) == 0
    assert (run / "config.yaml").read_bytes() == config
    digests = {json.loads(f.read_text())["digest"] for f in run.glob("checkpoints/step-*/state.json")}
    assert {digest_format(digest) for digest in digests} == {FORMAT}
    assert main(["train", "--resume", "run"]) == 0  # complete: its summary's digest is checked
    (run / "summary.json").unlink()
    assert main(["train", "--resume", "run"]) == 0  # and its checkpoint's


def test_its_digest_is_the_one_that_it_saved() -> None:
    config = load(FORMAT_1 / "run").config
    assert config.digest(1) == EXPECTED["digest"]
    assert digest_format(EXPECTED["digest"]) == 1
    assert digest_format(config.digest()) == FORMAT


def test_committed_records_point_at_the_configs_that_they_came_from() -> None:
    """The demo on digits was recorded in format 1."""
    cells = make_cells(read_study("demo"), "tiny", Path("any"))
    lines = (ROOT / "results/demo-digits.jsonl").read_text().splitlines()
    assert {c.config.digest(1) for c in cells} == {json.loads(line)["config_hash"] for line in lines}
    assert len(cells) == len(lines)


def test_the_defaults_of_a_format_never_change() -> None:
    """A default that must change starts a new format, with this file and the algorithm of the old one kept."""
    fixed = json.loads((FIXTURES / "digest-defaults-2.json").read_text())
    now = digest_defaults()
    assert {name: now.get(name, "missing") for name in fixed} == fixed
    added = now.keys() - fixed.keys()
    from mpvg.config import ADDED_FIELDS

    assert added <= ADDED_FIELDS.keys(), "a new field needs its value for older runs in ADDED_FIELDS"


@pytest.mark.parametrize("format", [3, 17])
def test_a_run_of_a_newer_format_is_refused_naming_both(
    run: Path, format: int, capsys: pytest.CaptureFixture[str]
) -> None:
    file = run / "config.yaml"
    file.write_text(f"format: {format}\n{file.read_text()}")
    for arguments in (["evaluate", "run"], ["train", "--resume", "run"], ["predict", "run", "five.png"]):
        assert main(arguments) == 2
        message = f"mpvg: error: run/config.yaml has format {format}, and this version of mpvg reads 1 to {FORMAT}"
        assert capsys.readouterr().err.startswith(message)
