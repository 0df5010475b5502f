"""What the README and the docs say is what happens, and what they report is what the records say."""

import ast
import csv
import importlib
import inspect
import json
import re
import runpy
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
import timm
import torch

import mpvg
from mpvg.analysis import readout, resolutions
from mpvg.analysis.findings import Estimate
from mpvg.analysis.paired import PairedDifference
from mpvg.cli.main import main
from mpvg.statistics import Interval

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = sorted(path.relative_to(ROOT) for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
TUTORIALS = sorted(path.stem for path in ROOT.glob("docs/tutorials/*.md"))
EXAMPLES = {
    f"{page.relative_to(ROOT)}-{number}": code
    for page in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL), 1)
}


def page(name: str) -> str:
    """A page's text on one line, with single spaces."""
    return " ".join((ROOT / name).read_text().split())


def record(name: str) -> Any:
    return json.loads((ROOT / f"benchmarks/records/{name}.json").read_text())


def test_the_readme_is_read_in_two_minutes() -> None:
    assert len(README.splitlines()) <= 150
    assert README.count("![") == 1, "one picture"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of one epoch."""
    path = tmp_path_factory.mktemp("readme") / "run"
    assert main(["train", "--data", "digits", "--epochs", "1", "--device", "cpu", "--out", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def hub_folder(run: Path) -> Path:
    """What `mpvg export` writes for timm and transformers."""
    out = run.parent / "exported"
    assert main(["export", str(run), "--format", "hub-folder", "--out", str(out)]) == 0
    return out


@pytest.mark.parametrize("name", EXAMPLES)
def test_python_examples_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """With the checkpoint, run or hub folder that they name, and without timm's download."""
    monkeypatch.chdir(tmp_path)
    if '"RUN"' in EXAMPLES[name]:
        shutil.copytree(request.getfixturevalue("run"), "RUN")
    if 'DIR"' in EXAMPLES[name]:
        shutil.copytree(request.getfixturevalue("hub_folder"), "DIR")
    if "theirs.pth" in EXAMPLES[name]:
        torch.save({"encoder.0.norm1.weight": torch.ones(3)}, "theirs.pth")
    if "deit_tiny.pth" in EXAMPLES[name]:
        torch.save(timm.create_model("deit_tiny_patch16_224").state_dict(), "deit_tiny.pth")
    code = (
        EXAMPLES[name]
        if "local-dir:" in EXAMPLES[name]
        else EXAMPLES[name].replace("pretrained=True", "pretrained=False")
    )
    exec(compile(code, name, "exec"), {})


def test_every_page_with_examples_is_run() -> None:
    """Python under another name of the language would not be run."""
    pages = {name.rpartition("-")[0] for name in EXAMPLES}
    assert {"README.md", "docs/own.md", "docs/finetuning.md", "docs/analysis.md", "docs/inference.md"} <= pages
    languages = {name for file in PAGES for name in re.findall(r"^```(\w+)$", (ROOT / file).read_text(), re.MULTILINE)}
    assert languages <= {"python", "bash", "text", "yaml", "bibtex"}


def test_every_public_function_has_an_example() -> None:
    """One that runs, in a page or in a tutorial's script; types come with functions."""
    conf = runpy.run_path(str(ROOT / "docs/conf.py"))
    objects = conf["documented"]((ROOT / "docs/api.md").read_text())
    names = {name for found in objects.values() for name, value in found.items() if inspect.isfunction(value)}
    names |= {f"mpvg.{name}" for name in mpvg.__all__}
    assert len(names) > 40
    codes = [*EXAMPLES.values(), *((ROOT / f"examples/{name}.py").read_text() for name in TUTORIALS)]
    assert {name for name in names if name.rpartition(".")[2] not in set().union(*map(used_names, codes))} == set()


def used_names(code: str) -> set[str]:
    nodes = list(ast.walk(ast.parse(code)))
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    return names | {node.attr for node in nodes if isinstance(node, ast.Attribute)}


def test_the_example_of_an_own_network_is_not_timms() -> None:
    example = EXAMPLES["docs/own.md-1"]
    assert "PositionDelivery" in example
    assert "timm" not in example
    assert "create_model" not in example


def test_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```\n(mpvg .*?)```", README, flags=re.DOTALL)
    commands = [line for block in blocks for line in block.splitlines() if line.startswith("mpvg ")]
    assert len(commands) >= 4
    for command in commands:
        assert main(shlex.split(command)[1:]) == 0, f"{command}\n{capsys.readouterr().err}"
    assert (tmp_path / "RUN/checkpoints/last/model.safetensors").is_file()


@pytest.mark.parametrize("command", ["methods --networks", "inspect --table"])
def test_the_tables_of_networks_are_what_the_commands_print(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """tests/models/test_contract.py runs every cell of the first."""
    assert main(command.split()) == 0
    assert capsys.readouterr().out in (ROOT / "docs/networks.md").read_text()


def test_commands_of_the_docs_have_no_unknown_flag(capsys: pytest.CaptureFixture[str]) -> None:
    """They need files that are not here, so they are parsed, not run."""
    pages = [page.read_text().replace("\\\n", "") for page in ROOT.glob("docs/*.md")]
    commands = [found for page in pages for found in re.findall(r"\bmpvg train --recipe [^`\n]*", page)]
    assert len(commands) >= 12
    for command in commands:
        try:
            code = main([*shlex.split(command)[1:], "--print_config"])
        except SystemExit as end:
            code = int(end.code or 0)
        assert code == 0, f"{command}\n{capsys.readouterr().err}"
        assert f"recipe: {shlex.split(command)[3]}\n" in capsys.readouterr().out, command


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_somewhere(page: Path) -> None:
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", (ROOT / page).read_text(), flags=re.DOTALL)
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(#[^)\s]*)?\)", prose):
        if "://" in target:
            continue
        file = (ROOT / page).parent.joinpath(target) if target else ROOT / page
        assert file.exists(), f"{page} links {target}, which does not exist"
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file), f"{page} links {target}{anchor}, and no heading gives that anchor"


def anchors(file: Path) -> set[str]:
    """What GitHub makes of the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", file.read_text(), flags=re.MULTILINE)
    return {"#" + re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_index_links_every_page() -> None:
    index = (ROOT / "docs/index.md").read_text()
    for file in ROOT.glob("docs/**/*.md"):
        if file.name != "index.md":
            assert f"]({file.relative_to(ROOT / 'docs')})" in index, f"docs/index.md does not link {file.name}"


def test_every_equation_is_mapped_to_the_line_that_names_it() -> None:
    rows = re.findall(r"^\| \((\d+)\) \|.*$", (ROOT / "docs/method.md").read_text(), flags=re.MULTILINE)
    assert rows == [str(number) for number in range(1, 12)]
    for row in (ROOT / "docs/method.md").read_text().splitlines():
        match = re.match(r"\| \((\d+)\) \|", row)
        for shown, file, line in re.findall(r"\[[\w.]+:(\d+)\]\(\.\./(\S+?)#L(\d+)\)", row) if match else []:
            assert match is not None
            assert shown == line
            text = (ROOT / file).read_text().splitlines()[int(line) - 1]
            assert f"({match[1]})" in text, f"{file}:{line} does not name Eq. ({match[1]}): {text.strip()}"
    assert len(re.findall(r"#L\d+", (ROOT / "docs/method.md").read_text())) >= 11


# Figures and their records.

LABELS = {("gap", None): "GAP", ("gap", 1.0): "GAP, PE std 1", ("pvg", None): "PVG", ("mpvg", None): "MPVG"}


def arms(name: str) -> dict[tuple[str, str], list[str]]:
    """(label, epochs) -> accuracy, each seed, NLL, parameters and images per second, as the demo prints them."""
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run in map(json.loads, (ROOT / f"results/{name}.jsonl").read_text().splitlines()):
        runs.setdefault((LABELS[run["method"], run["pos_std"]], str(run["epochs"])), []).append(run)
    return {
        arm: [
            f"{mean(100 * run['accuracy'] for run in seeds):.2f}",
            " ".join(f"{100 * run['accuracy']:.2f}" for run in seeds),
            f"{mean(run['nll'] for run in seeds):.4f}",
            f"{seeds[0]['parameters']:,}",
            f"{mean(run['images_per_second'] for run in seeds):.0f}",
        ]
        for arm, seeds in runs.items()
    }


def test_accuracies_are_those_of_the_records() -> None:
    results = page("docs/results.md")
    for (label, epochs), cells in arms("demo-digits").items():
        assert " ".join([label, epochs, *cells]) in page("README.md")
        assert " | ".join([f"| {label}", epochs, *cells]) in results
    fashion = arms("demo-fashion-mnist")
    for (label, epochs), cells in fashion.items():
        assert " | ".join([f"| {label}", epochs, *cells]) in results
    three = arms("analysis-fashion-mnist")
    for (label, _), cells in three.items():
        assert " | ".join([f"| {label}", *cells[:3]]) in results


def spread(low: float, middle: float, high: float, digits: int = 3) -> str:
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def test_costs_are_those_of_the_records() -> None:
    cost = page("docs/cost.md")
    found = {
        (row["network"].split("_patch")[0], row["case"], row["ratio"]): spread(*(row["cpu"][k] for k in order))
        for name in ("", "-networks-inference-1", "-networks-batches", "-networks-training")
        for row in record(f"overhead{name}")["results"]
        for order in [("low", "median", "high")]
        if "cpu" in row
    }
    for label, ratio in {
        "folded MPVG / GAP": "folded mpvg / gap",
        "MPVG / GAP": "mpvg / gap",
        "default / timm's DeiT-Ti": "default / timm",
        "GAP / default": "gap / default",
        "A/A control": "gap again / gap",
    }.items():
        cases = ("inference-1", "inference-32", "training-16")
        cells = [found.get(("deit_tiny", case, ratio), "-") for case in cases]
        assert f"| {label} | {' | '.join(cells)} |" in cost
    for label, case, ratio, missing in (
        ("folded MPVG / GAP, batch 1", "inference-1", "folded mpvg / gap", ""),
        ("folded MPVG / GAP, batch 32", "inference-32", "folded mpvg / gap", "not measured"),
        ("MPVG / GAP, batch 1, not folded", "inference-1", "mpvg / gap", ""),
        ("MPVG / GAP, training step, batch 16", "training-16", "mpvg / gap", "discarded: its controls were off"),
        ("default / timm's, batch 1", "inference-1", "default / timm", "-"),
    ):
        networks = ("swin_tiny", "ceit_tiny", "t2t_vit_7", "vit_lite_7")
        cells = [found.get((network, case, ratio), missing) for network in networks]
        assert f"| {label} | {' | '.join(cells)} |" in cost
    for name in ("training_rate", "training_rate-deit_tiny"):
        measured = record(name)
        assert f"{spread(*measured['loop / bare, wall'])} | {spread(*measured['control, wall'])}" in cost


def test_memory_is_that_of_the_record() -> None:
    scale = page("docs/scale.md")
    for row in record("memory")["rows"]:
        fits = f"all {row['fits']:,}" if row["fits"] == row["batch"] else f"{row['fits']:,}"
        cells = [
            f"`{row['recipe']}`",
            row["precision"],
            f"{sum(row['fixed'].values()) / 1e9:.2f}",
            f"{row['per_image'] / 1e6:.1f}",
            fits,
            f"{row['batch']:,}",
            str(row["accumulate"]),
            f"{row['total'] / 1e9:.1f}",
        ]
        assert f"| {' | '.join(cells)} |" in scale


def test_the_rates_of_the_input_pipelines_are_those_of_the_record() -> None:
    text, measured = page("docs/input.md"), record("input")
    for label, key in {
        "`fast`, all on the core": "fast",
        "`fast`, the worker's part": "worker",
        "`fast` without simplejpeg, all on the core": "fast (PIL)",
        "`fast` without simplejpeg, the worker's part": "worker (PIL)",
        "control: timm once more": "timm again",
    }.items():
        low, middle, high = measured["CPU"][f"{key} / timm"]
        rate = measured["images_per_second"][key]
        assert f"| {label} | {rate:.0f} | {middle:.2f} [{low:.2f}, {high:.2f}] |" in text
    assert f"| timm (`auto`) | {measured['images_per_second']['timm']:.0f} | 1 |" in text
    for who, label in ("timm", "timm"), ("fast", "`fast`"):
        parts = ("read and decode", "crop, resize, flip", "augment, normalise")  # as in the record
        cells = [f"{measured['ms_per_image'][f'{who}: {part}']:.2f}" for part in parts]
        assert f"| {label} | {' | '.join(cells)} |" in text


def test_correlations_are_those_of_the_record() -> None:
    """Student's intervals over three seeds."""
    rows = list(csv.DictReader((ROOT / "results/analysis-fashion-mnist.csv").read_text().splitlines()))
    text = page("docs/analysis.md")

    def places(*of: str) -> dict[str, list[float]]:
        found: dict[str, list[float]] = {}
        for row in rows:
            if (row["group"], row["network"]) == of:
                found.setdefault(row["place"], []).append(float(row["r"]))
        return found

    def slopes(*of: str) -> list[float]:
        r = places(*of)
        return [sum((layer - 3) * r[str(layer)][seed] for layer in range(1, 6)) / 10 for seed in range(3)]

    for label, of in {
        "PVG": ("pvg", "trained"),
        "MPVG": ("mpvg", "trained"),
        "PVG, untrained": ("pvg", "untrained"),
    }.items():
        cells = [*(student(values, 2) for values in places(*of).values()), student(slopes(*of), 3)]
        assert f"| {label} | {' | '.join(cells)} |" in text
    assert f"untrained MPVG has {student(places('mpvg', 'untrained')['Last LN'], 2)}" in text
    for group in ("pvg", "mpvg"):
        pairs = zip(slopes(group, "trained"), slopes(group, "untrained"), strict=True)
        assert f"{student([after - before for after, before in pairs], 3)} for {group.upper()}" in text


def student(values: list[float], digits: int) -> str:
    half = 4.302652729911275 * stdev(values) / len(values) ** 0.5
    low, middle, high = (f"{mean(values) + shift:+.{digits}f}" for shift in (-half, 0, half))
    return f"{middle} ({low} to {high})"


def test_the_tables_of_trained_networks_are_those_of_the_records() -> None:
    """As the commands print them, from the numbers that they wrote."""
    text, found = page("docs/trained.md"), record("trained-readout")
    scored = [
        readout.Scored(one["name"], Estimate(**one["accuracy"]), Estimate(**one["nll"]), one["folds"])
        for one in found["scored"]
    ]
    compared = []
    for one in found["compared"]:
        difference, interval, *rest = one["found"]
        pair = PairedDifference(difference, Interval(*interval), rest[0], rest[1], rest[2])
        compared.append(readout.Compared(**one | {"found": pair}))
    measured = readout.ReadoutComparison(found["images"], scored, compared, found["left_out"], found["sentence"])
    table = readout.rows(measured)
    rows = [resolutions.AtSize(**one | estimates(one)) for one in record("trained-resolutions")["rows"]]
    assert len(table) == 7
    assert len(rows) == 7
    for lines in table, [resolutions.HEAD, *map(resolutions.cells, rows)]:
        assert " ".join(" ".join(map(" ".join, lines)).split()) in text
    for sentence in readout.conclude(scored, compared), resolutions.conclude(rows):
        assert sentence in text
    assert all(f"not measured: {name}: {reason}" in text for name, reason in found["left_out"].items())


def estimates(row: Mapping[str, Any]) -> dict[str, Estimate | None]:
    """The numbers of a row that have an interval."""
    return {name: row[name] and Estimate(**row[name]) for name in ("accuracy", "nll", "against")}


def test_the_tables_of_speed_are_made_of_the_records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    tables = importlib.import_module("inference_tables")
    for file, parts in tables.tables().items():
        assert tables.rewritten(file.read_text(), parts) == file.read_text(), f"{file}: run {tables.__file__}"


def test_the_records_of_time_follow_from_their_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which blocks were discarded, and the median and the interval of each ratio over the others."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    timing, found = importlib.import_module("timing"), record("overhead")
    kept: dict[tuple[str, str], list[Any]] = {}
    for one in found["blocks"]:
        samples = {name: [timing.Times(**taken) for taken in rounds] for name, rounds in one["samples"].items()}
        block = timing.judge(timing.Block({}, one["fp32_gflops"], samples), "", "gap", off=0.01, wide=0.02)
        assert block.discarded_because == one["discarded_because"]
        kept.setdefault((one["network"], one["case"]), []).extend([] if block.discarded_because else [block])
    assert found["results"]
    for row in found["results"]:
        pairs = [block.paired(*row["ratio"].split(" / ")) for block in kept[row["network"], row["case"]]]
        low, median, high = timing.ratio([value for values in pairs for value in values])
        assert (low, median, high) == tuple(pytest.approx(row["cpu"][key]) for key in ("low", "median", "high"))


def test_the_rates_of_simulated_studies_are_those_of_the_record() -> None:
    found, text = record("study_statistics"), page("docs/statistics.md")
    assert f"commit {found['commit']}" in text
    assert found["repetitions"] == 1000
    names = ("coverage", "size", "family", "equivalent at the margin")
    assert all(set(rates) == set(names) for rates in found["rates"].values())
    rows = [
        f"| {seeds} | " + " | ".join(f"{100 * rates[name]:.1f} %" for name in names) + " |"
        for seeds, rates in found["rates"].items()
    ]
    assert len(rows) == 4
    assert " ".join(rows) in text
