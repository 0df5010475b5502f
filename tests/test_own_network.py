"""The example of an own network goes through every verb; it is imported only where it is typed."""

import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import submitit
import yaml
from PIL import Image

import mpvg
from mpvg import runs, training
from mpvg.cli.main import main
from mpvg.config.names import network_label, same_network
from mpvg.data import ImageBatch
from mpvg.models import create_model, importing, own
from mpvg.study.folder import open_folder
from mpvg.study.slurm import Worker, submit
from mpvg.tasks.classification import ClassificationTask
from short_runs import weight_files

EXAMPLE = Path(__file__).parent.parent / "examples/own_network.py"
MODEL = f"{EXAMPLE}:small_vit"
TRAIN = "train --data digits --epochs 2 --batch_size 512 --threads 1 --device cpu --optim.warmup_epochs 0".split()
PLAN: dict[str, Any] = {
    "study": "mine",
    "question": "Does it run?",
    "reference": "gap",
    "margins": {"nll": 0.02},
    "arms": {"gap": {"set": {"method": "gap"}}, "mpvg": {"set": {"method": "mpvg"}}},
    "contrasts": {"gain": {"weights": {"mpvg": 1, "gap": -1}}},
    "scales": {"tiny": {"digits": {"recipe": "digits", "set": {"epochs": 1, "batch_size": 700}, "seeds": 1}}},
}


def forget() -> None:
    own._FACTORIES.clear()
    own._IMPORTED.clear()


@pytest.fixture(autouse=True)
def nothing_is_imported() -> Iterator[None]:
    """Every test begins as a new process: nobody has named a network."""
    forget()
    yield
    forget()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("own") / "run"
    assert main([*TRAIN, "--model", MODEL, "--out", str(path)]) == 0
    forget()
    return path


def plan_file(folder: Path, model: str | None) -> Path:
    values = json.loads(json.dumps(PLAN))
    if model:
        values["scales"]["tiny"]["digits"]["set"]["model"] = model
    (folder / "mine.yaml").write_text(yaml.safe_dump(values))
    return folder / "mine.yaml"


# Every verb.


def test_the_example_is_short_and_has_nothing_of_timm() -> None:
    text = EXAMPLE.read_text()
    assert len(text.splitlines()) < 80
    assert not re.search(r"import timm|from timm|create_model", text)
    code = text[text.index("import torch") :]
    assert f"```python\n{code}```" in (EXAMPLE.parents[1] / "docs/own.md").read_text()


def test_an_interrupted_run_is_resumed_to_the_same_bits(run: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    original, steps = ClassificationTask.prepare, iter(range(100))

    def prepare(self: ClassificationTask, batch: ImageBatch) -> ImageBatch:
        if next(steps) == 3:
            raise KeyboardInterrupt
        return original(self, batch)

    killed = tmp_path / "killed"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ClassificationTask, "prepare", prepare)
        assert main([*TRAIN, "--model", MODEL, "--save_steps", "1", "--out", str(killed)]) == 130
    forget()
    assert f"add --model {MODEL}" in refused("train", "--resume", killed)
    assert main(["train", "--resume", str(killed), "--model", os.path.relpath(EXAMPLE) + ":small_vit"]) == 0
    assert weight_files(killed) == weight_files(run)


def test_the_next_commands_name_the_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TRAIN, "--epochs", "1", "--model", MODEL, "--out", str(tmp_path / "run")]) == 0
    (line,) = re.findall(r"  mpvg (evaluate .*?)   ", capsys.readouterr().out)
    assert main(line.split()) == 0


def test_evaluate_needs_the_flag(run: Path, refused: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    said = refused("evaluate", run)
    assert said.startswith(f"the network {MODEL} is code")
    assert f"add --model {MODEL}" in said
    assert main(["evaluate", str(run), "--model", MODEL]) == 0
    assert f"accuracy {100 * runs.load(run).metrics()[-1]['accuracy']:.2f} %" in capsys.readouterr().out


def test_predict(run: Path, tmp_path: Path, refused: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("L", (8, 8)).save(tmp_path / "black.png")
    assert f"add --model {MODEL}" in refused("predict", run, tmp_path / "black.png")
    assert main(["predict", str(run), str(tmp_path / "black.png"), "--model", MODEL]) == 0
    assert capsys.readouterr().out.count(" %  ") == 5


def test_inspect(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", MODEL, "--method", "pvg", "--num_classes", "10", "--in_chans", "1"]) == 0
    said = capsys.readouterr().out
    model = create_model(MODEL, "pvg", num_classes=10)
    assert f"parameters  {sum(p.numel() for p in model.parameters()):,} (288 of them LN')" in said
    assert "layer 3     pos_3 = LN'_3(pos_2)" in said
    # Of the patches, and of each layer: q, k, v, the output, two products of attention, and the MLP.
    tokens, dim = 16, 48
    layer = 2 * tokens * dim * (4 * dim + 8 * dim) + 4 * tokens * tokens * dim
    assert f"{(2 * tokens * 4 * dim + 4 * layer + 2 * dim * 10) / 1e9:.4f} (" in said


def test_analyze(run: Path, tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the figures, whose drawing takes the most time and knows no network."""
    monkeypatch.setattr("mpvg.analysis.drawing.draw", lambda *_: {})
    options = ["--images", "40", "--beyond", "8", "--out", str(tmp_path / "report")]
    assert f"add --model {MODEL}" in refused("analyze", run, *options)
    assert main(["analyze", str(run), *options, "--model", MODEL]) == 0
    (found,) = json.loads((tmp_path / "report/results.json").read_text())["runs"]
    places = found["trained"]["places"]
    assert [(place["name"], place["delivered"]) for place in places] == [
        *(("0", False), ("1", True), ("2", True), ("3", True), ("Last LN", True))
    ]
    assert [place["name"] for place in found["beyond"]["importance"]] == ["1", "2", "3", "Last LN"]
    assert any(place["removed"]["nll"] != 0 for place in found["beyond"]["importance"])
    assert all(accuracy is not None for accuracy in found["beyond"]["resolutions"].values())


def test_readout(run: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    options = ["--samples", "60", "--folds", "3", "--json", str(tmp_path / "found.json")]
    assert f"add --model {MODEL}" in refused("readout", run, *options)
    assert main(["readout", str(run), *options, "--model", MODEL]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["images"] == 60
    assert found["scored"]
    assert all(0 <= row["accuracy"]["value"] <= 1 for row in found["scored"])


def test_resolutions_at_its_own_size_agree_with_evaluate(
    run: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    options = ["--sizes", "8", "16", "8x12", "--json", str(tmp_path / "found.json")]
    assert f"add --model {MODEL}" in refused("resolutions", run, *options)
    assert main(["resolutions", str(run), *options, "--model", MODEL]) == 0
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    names = ["bicubic", "antialias", "offset"]
    assert [(row["size"], row["resampler"]) for row in rows] == [
        *[("8", "antialias"), *(("16", name) for name in names), *(("8x12", name) for name in names)]
    ]
    assert rows[0]["accuracy"]["value"] == runs.load(run).metrics()[-1]["accuracy"]


@pytest.mark.parametrize("kind", ["onnx", "torch-export"])
def test_export_of_graphs(run: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(run), "--format", kind, "--out", str(tmp_path / kind), "--model", MODEL]) == 0
    assert "largest difference to PyTorch" in capsys.readouterr().out
    forget()
    Image.new("L", (8, 8)).save(tmp_path / "black.png")
    assert main(["predict", str(tmp_path / kind), str(tmp_path / "black.png")]) == 0  # a graph is no code


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--format", "hub-folder"], "is code that nobody else has; give --format onnx, torch-export, openvino"),
        (["--format", "onnx", "--dynamic_size"], "--dynamic_size is for networks of this package"),
        (["--format", "onnx"], "add --model "),
    ],
)
def test_exports_that_are_refused(
    run: Path, tmp_path: Path, refused: Callable[..., str], flags: list[str], reason: str
) -> None:
    named = [] if "add" in reason else ["--model", MODEL]
    assert reason in refused("export", run, *flags, "--out", tmp_path / "out", *named)
    assert not (tmp_path / "out").exists()


def test_plot_and_runs_need_no_network(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plot", str(run), "--out", str(tmp_path / "curve.png")]) == 0
    assert main(["runs", str(run.parent)]) == 0
    assert "small_vit" in capsys.readouterr().out
    assert not own._FACTORIES


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two arms and one seed, done by a worker process, of a plan that names the network."""
    folder = tmp_path_factory.mktemp("study")
    plan = plan_file(folder, MODEL)
    assert main(["study", str(plan), "--out", str(folder / "out"), "--workers", "1", "--model", MODEL]) == 0
    forget()
    return folder / "out"


def test_a_study_runs_it_in_workers(study: Path, refused: Callable[..., str]) -> None:
    rows = [json.loads(line) for line in (study / "ledger.jsonl").read_text().splitlines()]
    assert [(row["arm"], row["status"], row["config"]["model"]) for row in rows] == [
        *(("gap", "done", MODEL), ("mpvg", "done", MODEL))
    ]
    assert not open_folder(study).model
    assert f"the study mine has the network {MODEL}" in refused("study", study.parent / "mine.yaml", "--out", study)
    plain = ["study", str(study.parent / "mine.yaml"), "--out", str(study.parent / "new")]
    assert f"add --model {MODEL}" in refused(*plain)
    assert f"add --model {MODEL} in place of other.py:f" in refused(*plain, "--model", "other.py:f")
    assert not (study.parent / "new").exists()


def test_a_job_gets_it_from_the_command_that_submits_it(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Worker] = []

    def map_array(self: Any, worker: Worker, paths: list[str]) -> list[Any]:
        given.append(worker)
        return []

    monkeypatch.setattr(submitit.LocalExecutor, "map_array", map_array)
    own.import_network(MODEL)
    submit(open_folder(study), "local", 1)
    forget()
    with pytest.raises(own.NotImportedError, match="add --model"):
        Worker()(str(study))
    given[0](str(study))
    assert own.networks([MODEL, "deit_tiny_patch16_224"]) == {MODEL: MODEL}


def test_a_study_of_others_takes_it_in_place_of_theirs(tmp_path: Path, refused: Callable[..., str]) -> None:
    """What takes part is kept with the study, and is typed again to go on."""
    out, plan = tmp_path / "out", plan_file(tmp_path, None)
    assert main(["study", str(plan), "--out", str(out), "--dry_run", "--model", MODEL]) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mpvg.study.runner.run_study", lambda *_, **__: None)
        assert main(["study", str(plan), "--out", str(out), "--model", MODEL]) == 0
    assert {cell.config.model for cell in open_folder(out).cells()} == {MODEL}
    forget()
    assert f"add --model {MODEL}" in refused("study", plan, "--out", out)


def test_compare_needs_no_network_and_replay_does(
    study: Path, refused: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", str(study / "runs")]) in (0, 2)
    assert "code" not in capsys.readouterr().err
    ledger = str(study / "ledger.jsonl")
    assert f"add --model {MODEL}" in refused("replay", ledger, "--row", "2")
    assert main(["replay", ledger, "--row", "2", "--model", MODEL]) == 0
    assert "the weights are the same to the bit" in capsys.readouterr().out


def test_in_python_a_factory_is_an_argument(run: Path, tmp_path: Path) -> None:
    factory = importing.import_factory(MODEL)
    with pytest.raises(own.NotImportedError, match=r"mpvg\.register_network"):
        runs.load(run).model()
    model = mpvg.load(run, model=factory).model()
    assert type(model).__name__ == "SmallViT"
    mpvg.register_network("mine", factory)
    config = runs.load(run).config
    summary = training.train(mpvg_config(config, model="mine", epochs=1, out=str(tmp_path / "mine")), quiet=True)
    assert summary["model"] == "mine"
    for name in ("", "deit_tiny_patch16_224", "timm/vit_tiny_patch16_224"):
        with pytest.raises(ValueError, match="allowed: a name that mpvg and timm do not use"):
            mpvg.register_network(name, factory)


def mpvg_config(config: Any, **changes: Any) -> Any:
    return type(config).from_dict(config.to_dict() | changes)


def test_weights_of_one_method_start_another_and_the_pe_has_the_std_that_is_asked_for(run: Path) -> None:
    own.import_network(MODEL)
    file = run / "checkpoints/last/model.safetensors"
    sizes = {"num_classes": 10, "img_size": 8, "in_chans": 1}
    model: Any = create_model(MODEL, "pvg", checkpoint_path=file, **sizes)
    assert set(model.load_report.dropped) == {"delivery.last_norm.weight", "delivery.last_norm.bias"}
    larger: Any = create_model(MODEL, "mpvg", checkpoint_path=file, **sizes | {"img_size": 16, "num_classes": 3})
    assert set(larger.load_report.resampled) == {"pos_embed"}
    assert set(larger.load_report.new) == {"head.weight", "head.bias"}
    control: Any = create_model(MODEL, "gap", pos_std=1.0, **sizes)
    assert control.pos_embed.std().item() == pytest.approx(1)


def test_a_factory_may_compute_with_values_where_networks_are_built_without(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], refused: Callable[..., str]
) -> None:
    """As rates of stochastic depth are: `inspect` and the plan of a study build networks on the meta device."""
    (tmp_path / "rates.py").write_text(
        "import torch, own_example\n\n\ndef build(method='mpvg', drop_path_rate=0.0, **kwargs):\n"
        "    rates = [rate.item() for rate in torch.linspace(0, drop_path_rate, 4)]\n"
        "    return own_example.small_vit(method, depth=len(rates), **kwargs)\n"
    )
    sys.modules["own_example"] = sys.modules[importing.import_factory(MODEL).__module__]
    name = f"{tmp_path}/rates.py:build"
    assert main(["inspect", name, "--num_classes", "10"]) == 0
    ours = capsys.readouterr().out.splitlines()[1:]
    assert main(["inspect", MODEL, "--num_classes", "10"]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == ours
    train = [*TRAIN, "--epochs", "1", "--network.drop_path", "0.1", "--dry_run", "--out", str(tmp_path / "run")]
    assert main([*train, "--model", name]) == 0
    assert refused(*train, "--model", MODEL).endswith("let the factory take it, or give --network.drop_path 0")
    del sys.modules["own_example"]


# Names: nothing that stands in a file is imported.


@pytest.fixture
def traps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Modules whose import leaves a mark, in the current folder."""
    for name in ("one", "other"):
        (tmp_path / f"{name}.py").write_text(
            f"from pathlib import Path\nPath({str(tmp_path / 'mark')!r}).touch()\n" + EXAMPLE.read_text()
        )
    monkeypatch.chdir(tmp_path)
    return tmp_path / "mark"


def test_a_name_in_a_file_is_never_imported(
    run: Path, study: Path, traps: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    for name in ("one:small_vit", "one.py:small_vit", f"{tmp_path}/one.py:small_vit"):
        copied, plan = tmp_path / "run", plan_file(tmp_path, name)
        shutil.rmtree(copied, ignore_errors=True)
        shutil.copytree(run, copied, symlinks=True)
        config = yaml.safe_load((copied / "config.yaml").read_text()) | {"model": name}
        (copied / "config.yaml").write_text(yaml.safe_dump(config))
        (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": name}))
        (tmp_path / "ledger.jsonl").write_text((study / "ledger.jsonl").read_text())
        (tmp_path / "study").mkdir(exist_ok=True)
        values = yaml.safe_load(plan.read_text()) | {"run": {"scale": "tiny", "seeds": 1, "data": None}}
        (tmp_path / "study/study.yaml").write_text(yaml.safe_dump(values))
        commands = [
            ["evaluate", copied],
            ["predict", copied, copied],
            ["export", copied, "--format", "torch-export", "--out", tmp_path / "pt"],
            ["analyze", copied, "--out", tmp_path / "report"],
            ["train", "--config", tmp_path / "config.yaml", "--out", tmp_path / "new"],
            ["train", "--config", tmp_path / "config.yaml", "--print_config"],
            ["study", plan, "--out", tmp_path / "studied"],
            ["study", plan, "--dry_run"],
            ["replay", tmp_path / "ledger.jsonl", "--row", "1"],
        ]
        for command in commands:
            said = refused(*command)
            assert "--model " in said or "no image" in said, said
        with pytest.raises(own.NotImportedError):
            open_folder(tmp_path / "study").cells()
        with pytest.raises(own.NotImportedError):
            runs.load(copied).model()
    assert main(["runs", str(tmp_path)]) == 0
    assert not traps.exists()
    assert main(["train", "--config", "config.yaml", "--model", name, *TRAIN[1:], "--dry_run", "--out", "new"]) == 0
    assert traps.exists()


def test_another_network_than_the_runs_is_refused_naming_both(
    run: Path, traps: Path, refused: Callable[..., str]
) -> None:
    for verb in ("evaluate", "predict", "analyze", "export"):
        rest = {"predict": ["x.png"], "export": ["--format", "onnx", "--out", "out"]}.get(verb, [])
        said = refused(verb, run, *rest, "--model", "other.py:small_vit") if verb != "predict" else None
        if said is not None:
            assert said == f"--model is other.py:small_vit, but {run} has {MODEL}; give that name, or leave --model out"
    said = refused("train", "--resume", run, "--model", "other.py:small_vit")
    assert f"model is {MODEL!r} there, 'other.py:small_vit' given" in said
    assert not traps.exists()


def test_the_current_folder_is_last_on_the_path_and_for_this_import_only(traps: Path) -> None:
    before = list(sys.path)
    (traps.parent / "looks.py").write_text("import sys\nlast = sys.path[-1]\ndef build(**kwargs): return last\n")
    factory = importing.import_factory("looks:build")
    assert sys.path == before
    assert factory() == str(traps.parent)
    del sys.modules["looks"]


def test_a_module_of_a_package_is_imported_by_name(traps: Path) -> None:
    package = traps.parent / "some_package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "nets.py").write_text(EXAMPLE.read_text())
    assert main([*TRAIN, "--epochs", "1", "--model", "some_package.nets:small_vit", "--dry_run"]) == 0
    assert main(["check-network", "some_package.nets:small_vit"]) == 0
    for name in ("some_package", "some_package.nets"):
        del sys.modules[name]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("a.b:f", "a.b:f", True),
        ("a.b:f", "a.b:g", False),
        ("a.py:f", "a:f", False),
        ("./own.py:f", "own.py:f", True),
        ("x/../own.py:f", "own.py:f", True),
        ("own.py:f", "sub/own.py:f", False),  # both are there
        ("/elsewhere/project/nets/own.py:f", "nets/own.py:f", True),  # the run was made in another folder
        ("../nets/own.py:f", "/elsewhere/nets/own.py:f", True),
        ("nets/own.py:f", "other/own.py:f", False),
        ("nets/own.py:f", "deit_tiny_patch16_224", False),
        ("timm/hf-hub:a/b", "timm/hf-hub:a/b", True),
    ],
)
def test_names_of_the_same_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one: str, other: str, same: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("x", "sub"):
        (tmp_path / folder).mkdir()
    (tmp_path / "own.py").touch()
    (tmp_path / "sub/own.py").touch()
    assert same_network(one, other) is same_network(other, one) is same


def test_the_folder_of_a_run_is_named_by_the_factory() -> None:
    assert network_label("some/path/own.py:small_vit") == network_label("some.path:small_vit") == "small_vit"
    assert network_label("timm/hf-hub:a/b") == "timm/hf-hub:a/b"


# Bad input.

BAD = {
    "no_factory.py": "x = 1",
    "number.py": "build = 3",
    "raises.py": "def build(**kwargs):\n    raise RuntimeError('no\\nweights')",
    "takes.py": "def build(method, classes):\n    pass",
    "returns.py": "def build(**kwargs):\n    return [1]",
    "plain.py": "from torch import nn\ndef build(**kwargs):\n    return nn.Linear(2, 2)",
    "syntax.py": "def build(:\n",
    "leaves.py": "import sys\nsys.exit(0)",
    "needs.py": "import a_package_that_is_not_there",
    "fails.py": "1 / 0",
    "binary.py": "\0",
    "json.py": "def build(**kwargs):\n    pass",
    "text.txt": "def build(**kwargs):\n    pass",
}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_factory.py:build", "no_factory.py has no build; functions and classes there: none"),
        ("number.py:build", "holds a int named build"),
        ("raises.py:build", "raises RuntimeError: no weights; MPVG_TRACEBACK=1 shows where"),
        ("takes.py:build", "raises TypeError: build() got an unexpected keyword argument"),
        ("returns.py:build", "returns a list; allowed: a factory that returns an nn.Module"),
        ("syntax.py:build", "cannot be imported: SyntaxError, line 1: "),
        ("leaves.py:build", "cannot be imported: SystemExit: 0"),
        ("needs.py:build", "cannot be imported: ModuleNotFoundError: No module named 'a_package_that_is_not_there'"),
        ("needs:build", "cannot be imported: ModuleNotFoundError: No module named 'a_package_that_is_not_there'"),
        ("fails.py:build", "cannot be imported: ZeroDivisionError: division by zero"),
        ("binary.py:build", "cannot be imported: SyntaxError"),
        ("missing.py:build", "missing.py does not exist; give a path from "),
        ("missing:build", "there is no module missing, neither installed nor in "),
        ("text.txt:build", "there is no module text, neither installed nor in "),
        ("fails.missing:build", "cannot be imported: ZeroDivisionError"),
        ("no_factory.missing:build", "there is no module no_factory.missing"),
        ("json:build", "the module json is Python's, and one of yours with this name would not be found"),
        ("mpvg.models:create_model", "the module mpvg is mpvg's"),
        ("folder.py:build", "folder.py is a folder, not a regular file"),
        ("pipe.py:build", "pipe.py is a pipe (FIFO), not a regular file"),
        *((name, "is not the name of a network of your own; allowed: package.module:factory or path/file.py:factory")
          for name in (":", ":build", "fails.py:", "..:build", "..fails:build", "a..b:build",
                       "fails.py:a.b", "fails.py:class", "folder/fails:build", "fails.py:build:build", ".py:build",
                       "fails .py :build", "a\nb:build")),
    ],
)  # fmt: skip
def test_bad_names_and_factories_are_one_line(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for file, text in BAD.items():
        (tmp_path / file).write_text(text)
    (tmp_path / "folder.py").mkdir()
    os.mkfifo(tmp_path / "pipe.py")
    before = list(sys.path)
    assert message in refused(*TRAIN, "--model", name, "--out", "run")
    assert message in refused("check-network", name)
    assert sys.path == before
    assert not (tmp_path / "run").exists()


def test_a_module_that_is_no_network_is_refused_and_fails_the_checks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plain.py").write_text(BAD["plain.py"])
    said = refused(*TRAIN, "--model", "plain.py:build", "--out", "run")
    lacking = "Linear has no blocks, deliver, delivery, get_classifier, global_pool, img_size, in_chans, "
    assert f"plain.py:build: {lacking}" in said
    assert "most of which mpvg.DeliveryMixin gives it; see docs/own.md" in said
    assert main(["check-network", "plain.py:build"]) == 1
    assert capsys.readouterr().out.startswith(f"members       FAILED  {lacking}")


def test_a_study_in_which_no_arm_can_run_is_refused(tmp_path: Path, refused: Callable[..., str]) -> None:
    (tmp_path / "raises.py").write_text(BAD["raises.py"])
    plan = ["study", plan_file(tmp_path, None), "--out", tmp_path / "out"]
    said = refused(*plan, "--model", f"{tmp_path}/raises.py:build")
    assert said.startswith("no network can run an arm of mine: ")
    assert "raises RuntimeError: no weights" in said
    assert not (tmp_path / "out").exists()


FAULTS = {
    "raises": "self.absent",
    "refuses": "raise ValueError('not today')",
    "leaves": "raise SystemExit(3)",
    "tokens": "return self.whole(images)[:, 0]",
    "logits": "return self.whole(images)[..., None]",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_network_whose_forward_pass_fails_is_named_by_every_verb(
    run: Path, tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """And nothing is left behind that would be in the way of the same command."""
    small_vit: Any = sys.modules[importing.import_factory(MODEL).__module__].SmallViT
    code: dict[str, Any] = {}
    exec(f"def forward_features(self, images):\n    {FAULTS[fault]}", code)
    monkeypatch.setattr(small_vit, "whole", small_vit.forward_features, raising=False)
    monkeypatch.setattr(small_vit, "forward_features", code["forward_features"])
    Image.new("L", (8, 8)).save(tmp_path / "black.png")
    out = ["--out", tmp_path / "out"]
    verbs = [["explore", run], ["evaluate", run], ["predict", run, tmp_path / "black.png"], ["readout", run]]
    verbs += [["resolutions", run, "--sizes", "16"], ["analyze", run, "--images", "8", *out]]
    verbs += [["export", run, "--format", "torch-export", *out], [*TRAIN, *out], [*TRAIN, *out]]
    for verb in verbs:
        said = refused(*verb, "--model", MODEL)
        assert f"{MODEL} raises " in said or f"{MODEL}: " in said, said
        assert f"`mpvg check-network {MODEL}`" in said, said
    assert not (tmp_path / "out/config.yaml").exists()
    monkeypatch.setenv("MPVG_TRACEBACK", "1")
    with pytest.raises((Exception, SystemExit)):
        main(["evaluate", str(run), "--model", MODEL])


def test_logits_of_other_classes_than_the_datas_are_refused(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    small_vit: Any = sys.modules[importing.import_factory(MODEL).__module__].SmallViT
    monkeypatch.setattr(small_vit, "forward", lambda self, images: self.forward_features(images)[:, 0])
    said = refused(*TRAIN, "--model", MODEL, "--out", tmp_path / "out")
    assert ": 512 images give (512, 48); allowed: logits (512, 10); see `mpvg check-network" in said


def test_a_network_that_no_probe_sees_is_named(tmp_path: Path, refused: Callable[..., str]) -> None:
    """Its layers normalize without their LN modules."""
    text = EXAMPLE.read_text().replace("self.norm1(x)", "nn.functional.layer_norm(x, x.shape[-1:], self.norm1.weight)")
    (tmp_path / "unseen.py").write_text(text)
    model = ["--model", f"{tmp_path}/unseen.py:small_vit"]
    assert main([*TRAIN, "--epochs", "1", *model, "--out", str(tmp_path / "run")]) == 0
    said = refused("analyze", tmp_path / "run", "--images", "8", *model, "--out", tmp_path / "report")
    assert "the probe was never called at layer 0: its LN is not a module that the forward pass calls" in said


TOKEN_ONLY = """
import torch
from torch import nn

from layers import Layer
from mpvg import DeliveryMixin, PositionDelivery
from mpvg.delivery import NetworkTraits, resolve


class TokenViT(DeliveryMixin):
    def __init__(self, method, num_classes, img_size=8, in_chans=1, dim=24, depth=2):
        super().__init__()
        self.img_size, self.patch_size, self.in_chans, self.num_prefix_tokens = img_size, 2, in_chans, 1
        spec = resolve(method, NetworkTraits(name="TokenViT", depth=depth, readouts=("token",)))
        rows = 1 + (img_size // 2) ** 2
        self.embed = nn.Conv2d(in_chans, dim, 2, stride=2)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, rows, dim))
        self.delivery = PositionDelivery(spec, depth, dim, class_rows=1, rows=rows)
        self.blocks = nn.ModuleList(Layer(dim, 2) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, num_classes)

    def forward_features(self, images):
        x = self.embed(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        if self.spec.input_pe:
            x = x + self.pos_embed
        delivered = self.deliver(self.pos_embed)
        for layer, pe in zip(self.blocks, delivered.per_layer, strict=True):
            x = layer(x, pe)
        return self.norm(x) if delivered.last is None else self.norm(x) + delivered.last


def build(method="lape", num_classes=10, img_size=8, in_chans=1, **kwargs):
    return TokenViT(method, num_classes, img_size, in_chans, **kwargs)


def fixed(num_classes=10, img_size=8, in_chans=1):
    return TokenViT("lape", num_classes, img_size, in_chans)
"""


@pytest.fixture
def token_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A network that needs its class token, in a file beside another that it imports."""
    folder = tmp_path / "nets"
    folder.mkdir()
    text = EXAMPLE.read_text()
    layer = text[text.index("class Layer") : text.index("class SmallViT")]
    (folder / "layers.py").write_text(f"from torch import nn\n\n\n{layer}")
    (folder / "token_only.py").write_text(TOKEN_ONLY)
    monkeypatch.chdir(tmp_path)
    yield folder / "token_only.py"
    sys.modules.pop("layers", None)


def test_a_network_that_only_has_a_class_token_is_checked(
    token_only: Path, capsys: pytest.CaptureFixture[str], refused: Callable[..., str]
) -> None:
    before = list(sys.path)
    assert main(["check-network", f"{token_only}:build"]) == 0
    out = capsys.readouterr().out
    assert "with default, lape, pvg_token: logits differ" in out
    assert "refused, with a reason: gap, lape_gap, pvg, mpvg" in out
    assert sys.path == before
    said = refused("check-network", f"{token_only}:fixed")
    assert "unexpected keyword argument 'method'; let the factory take it (docs/own.md)" in said


def test_a_renamed_file_and_a_missing_run_are_said(token_only: Path, refused: Callable[..., str]) -> None:
    assert refused("evaluate", "nothere", "--model", f"{token_only}:build").startswith("nothere holds no run")
    assert main([*TRAIN, "--method", "lape", "--model", f"{token_only}:build", "--out", "run"]) == 0
    forget()
    renamed = token_only.rename(token_only.with_name("renamed.py"))
    said = refused("evaluate", "run", "--model", f"{renamed}:build")
    assert said.endswith(
        "a file may be moved, not renamed: rename it back, or use mpvg.load(RUN, model=FACTORY) in Python"
    )


def test_a_neighbor_of_another_folder_is_not_taken(token_only: Path, refused: Callable[..., str]) -> None:
    other = token_only.parent / "other"
    other.mkdir()
    (other / "layers.py").write_text("Layer = None\n")
    (other / "token_only.py").write_text(TOKEN_ONLY)
    assert main(["check-network", f"{token_only}:build"]) == 0
    said = refused("check-network", f"{other / 'token_only.py'}:build")
    assert f"imports layers, which is {token_only.with_name('layers.py')} and not {other / 'layers.py'}" in said


def test_an_error_of_the_code_is_no_refusal_of_a_method(token_only: Path, refused: Callable[..., str]) -> None:
    token_only.write_text(
        TOKEN_ONLY.replace("        spec = resolve", '        {"lape": 1}[method]\n        spec = resolve')
    )
    assert "raises KeyError" in refused("check-network", f"{token_only}:build")


def test_the_network_with_stages_of_the_docs_is_trained_and_analyzed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (EXAMPLE.parents[1] / "docs/own.md").read_text()
    code = page[page.index("### Stages") :].partition("```python\n")[2].partition("```")[0]
    (tmp_path / "stages.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    model = ["--model", "stages.py:two_stages"]
    assert main([*TRAIN, "--method", "mpvg", *model, "--out", "run"]) == 0
    assert main(["analyze", "run", *model, "--images", "40", "--beyond", "20", "--out", "report"]) == 0
    assert main(["export", "run", *model, "--format", "onnx", "--out", "export"]) == 0
    assert "largest difference to PyTorch" in capsys.readouterr().out
