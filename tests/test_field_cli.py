"""The command line with files that attack, odd names and what newcomers type: each row of the field list."""

import ast
import csv
import io
import json
import os
import re
import shlex
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

import mpvg
from mpvg import models, runs, training
from mpvg.analysis.networks import sizes
from mpvg.cli.main import main
from mpvg.config import OptimConfig
from mpvg.data import ImageBatch
from mpvg.files import csv_text
from mpvg.models.vision_transformer import DeliveredBlock
from mpvg.recipes import RECIPES, recipe, scale_schedule
from mpvg.runs import load
from mpvg.training.estimate import checkpoint_bytes, example_batch, kept_for_backward, optimizer_bytes
from mpvg.training.loop import Trainer

Refused = Callable[..., str]


def printed_config(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert main(["train", *map(str, arguments), "--print_config"]) == 0, capsys.readouterr().err
    values: dict[str, Any] = yaml.safe_load(capsys.readouterr().out)
    return values


# ---- F2: nothing that a flag or a file names is imported

PARTS = ("network", "augment", "optim", "loader")


@pytest.fixture
def evil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], bool]]:
    """A module in the current folder that leaves a file when it is imported; returns whether it was."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("evilmod.py").write_text("open('imported', 'w').close()\nclass X: pass\n")
    yield lambda: Path("imported").exists() or "evilmod" in sys.modules
    sys.modules.pop("evilmod", None)


HOSTILE = {"class_path": "evilmod.X"}
INSTANCES = [
    *({part: HOSTILE} for part in PARTS),
    *({part: {"class_path": "evilmod.X", "init_args": {}}} for part in PARTS),
    *({part: {"init_args": HOSTILE}} for part in PARTS),
    {"network": {"init": HOSTILE}},
    {"config": HOSTILE},
    {"config": {"network": HOSTILE}},
    {"method": HOSTILE},
    {"method": {"pool": HOSTILE}},
    {"data": HOSTILE},
    {"model": HOSTILE},
    {"tracker": HOSTILE},
    {"task": HOSTILE},
    HOSTILE,
]


@pytest.mark.parametrize("values", INSTANCES, ids=json.dumps)
def test_no_file_names_what_is_imported(values: dict[str, Any], evil: Callable[[], bool], refused: Refused) -> None:
    Path("config.yaml").write_text(json.dumps(values))
    refused("train", "--config", "config.yaml", "--out", "run", "--device", "cpu")
    assert not evil()
    assert not Path("run").exists()


@pytest.mark.parametrize("part", [*PARTS, "config.network", "optim.init_args", "method", "task_options"])
def test_no_flag_names_what_is_imported(part: str, evil: Callable[[], bool], refused: Refused) -> None:
    Path("part.yaml").write_text("class_path: evilmod.X\n")
    hostile = json.dumps(HOSTILE)
    for flags in (
        [f"--{part}.class_path", "evilmod.X"],
        [f"--{part}.class_path=evilmod.X"],
        [f"--{part}.init_args.a", "1"],
        [f"--{part}", hostile],
        [f"--{part}={hostile}"],
        [f"--{part}", "part.yaml"],
        [f"--{part}", "evilmod.X"],
        [f"--{part}+", hostile],
        [f"--{part}.help", "evilmod.X"],
    ):
        refused("train", "--device", "cpu", "--out", "run", *flags)
        assert not evil(), flags
        assert not Path("run").exists()


@pytest.mark.parametrize("part", PARTS)
def test_a_whole_part_is_refused_with_the_way(part: str, refused: Refused) -> None:
    said = refused("train", f"--{part}", "{}")
    assert said.startswith(f"--{part} as a whole is not taken; give its fields, such as --{part}.")
    assert said.endswith(", or a file with --config")


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.system ['touch imported']", "!!python/name:evilmod.X ''"])
@pytest.mark.parametrize("key", ["network", "method", "seed"])
def test_tags_in_yaml_are_refused(tag: str, key: str, evil: Callable[[], bool], refused: Refused) -> None:
    Path("config.yaml").write_text(f"{key}: {tag}\n")
    assert "is not readable YAML" in refused("train", "--config", "config.yaml")
    assert not evil()


# ---- F17: a config from a pipe, of bounded size


@pytest.fixture
def pipe() -> Iterator[Callable[[bytes], str]]:
    """Writes bytes into a pipe, as <(cat FILE) does, and returns its path."""
    made: list[tuple[int, threading.Thread]] = []

    def make(content: bytes) -> str:
        reading, writing = os.pipe()

        def write() -> None:
            with os.fdopen(writing, "wb") as file:
                try:
                    file.write(content)
                except BrokenPipeError:  # the reader has seen enough
                    return

        thread = threading.Thread(target=write)
        thread.start()
        made.append((reading, thread))
        return f"/dev/fd/{reading}"

    yield make
    for reading, thread in made:
        os.close(reading)
        thread.join()


def test_a_config_may_come_from_a_pipe(pipe: Callable[[bytes], str], capsys: pytest.CaptureFixture[str]) -> None:
    content = b"recipe: cifar10\nseed: 7\noptim: {weight_decay: 0.3}\n"
    values = printed_config(capsys, "--config", pipe(content), "--lr", "0.5")
    assert (values["recipe"], values["data"], values["seed"], values["lr"]) == ("cifar10", "cifar10", 7, 0.5)
    assert values["optim"]["weight_decay"] == 0.3
    with pytest.raises(SystemExit):
        main(["train", "--help", "--config", pipe(content)])
    assert "(type: int, default: 7)" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"# " + b"x" * 2**20, "is not readable YAML (it has more than 1,048,576 bytes, which are allowed at most)"),
        (b"a: &a [1]\nb: *a\n", "is not readable YAML (it has an alias (*)"),
        (b"lr: 0.1\nepochs: 2\nlr: 0.2\n", "is not readable YAML (it has the key lr twice)"),
        (b"seed: 1" + b"0" * 400, "is not readable YAML"),
        (b"a: " + b"[" * 500 + b"]" * 500, "is not readable YAML (it is nested"),
        (b"\xff\xfe", "is not readable YAML"),
        (b"seed: '\0'", "is not readable YAML"),
        *(
            (f"format: {text}".encode(), f": format is {value}; allowed: 1 to 2; see `mpvg train --print_config`")
            for text, value in (("true", "True"), ("2.0", "2.0"), ("'2'", "'2'"), ("0", "0"), ("null", "None"))
        ),
    ],
    ids=lambda value: repr(value[:20]) if isinstance(value, bytes) else "",
)
def test_a_bad_config_is_refused(
    content: bytes, reason: str, pipe: Callable[[bytes], str], tmp_path: Path, refused: Refused
) -> None:
    (tmp_path / "config.yaml").write_bytes(content)
    for path in (str(tmp_path / "config.yaml"), pipe(content)):
        separator = "" if reason.startswith(":") else " "
        assert refused("train", "--config", path).startswith(f"--config {path}{separator}{reason}")
    assert "more than 1,048,576 bytes" in refused("train", "--config", "/dev/zero")


# ---- U1: warm-up and cool-down follow the epochs


@pytest.mark.parametrize("epochs", [1, 7, 1000])
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_takes_any_number_of_epochs(
    name: str, epochs: int, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    base = recipe(name)
    warmup = base.optim.warmup_epochs * epochs / base.epochs
    cooldown = int(base.optim.cooldown_epochs * epochs / base.epochs)
    (tmp_path / "config.yaml").write_text(f"epochs: {epochs}\n")
    for arguments in (["--epochs", epochs], ["--config", tmp_path / "config.yaml"]):
        values = printed_config(capsys, "--recipe", name, *arguments)
        assert values["epochs"] == epochs
        assert values["optim"]["warmup_epochs"] == pytest.approx(warmup)
        assert values["optim"]["cooldown_epochs"] == cooldown
    assert values | {"epochs": base.epochs, "optim": base.to_dict()["optim"]} == base.to_dict()


def test_what_is_given_is_not_scaled(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    for flag, field, value in (("warmup_epochs", "warmup_epochs", 3.0), ("cooldown_epochs", "cooldown_epochs", 4)):
        file.write_text(yaml.safe_dump({"epochs": 62, "optim": {flag: value}}))
        for arguments in (["--epochs", 62, f"--optim.{flag}", value], ["--config", file]):
            values = printed_config(capsys, "--recipe", "t2t_vit_7", *arguments)["optim"]
            assert values == recipe("t2t_vit_7").to_dict()["optim"] | {
                "warmup_epochs": 2.0,
                "cooldown_epochs": 2,
                field: value,
            }
    values = printed_config(capsys, "--config", file, "--epochs", 310, "--recipe", "t2t_vit_7")
    assert (values["optim"]["warmup_epochs"], values["optim"]["cooldown_epochs"]) == (10, 4)
    assert scale_schedule(recipe("t2t_vit_7"), 310) == recipe("t2t_vit_7")


def test_a_scaled_warm_up_is_said_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = "train --data digits --epochs 1 --batch_size 1400 --threads 1 --device cpu --out".split()
    assert main([*command, str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out.splitlines()[0] == (
        "optim.warmup_epochs is 0.04, in proportion to the epochs: the recipe digits has 1 of 25"
    )
    assert main([*command, str(tmp_path / "given"), "--optim.warmup_epochs", "0.5"]) == 0
    assert "in proportion" not in capsys.readouterr().out


# ---- F16 and M3: odd names, and terminals that are not UTF-8

ODD = ("$\\frac{$", "\x1b[31mred", "a\nb", "=cmd|' calc'!A0", "猫", "tab\there", "\u202edrawkcab")


@pytest.fixture(scope="module")
def odd_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run in a folder with an odd name, whose classes have odd names."""
    root = tmp_path_factory.mktemp("odd")
    for split in ("train", "val"):
        for number, name in enumerate(ODD):
            (root / "data" / split / name).mkdir(parents=True)
            for copy in range(4):
                Image.new("RGB", (8, 8), (30 * number, 0, 40 * copy)).save(root / "data" / split / name / f"{copy}.png")
    out = root / "=run \x1b[32m\n猫"
    network = {"img_size": 8, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    base = replace(
        recipe(None, "digits"),
        data=str(root / "data"),
        epochs=1,
        batch_size=28,
        device="cpu",
        threads=1,
        optim=OptimConfig(),
    )
    base = replace(base, network=replace(base.network, **network), loader=replace(base.loader, workers=0))
    training.train(replace(base, out=str(out)), quiet=True)
    return out


def escaped(text: str) -> bool:
    """Whether lines have no character that a terminal would act on."""
    return all(line.isprintable() for line in text.splitlines()) and not set(text) & set("\x1b\u202e\t\r\x0b\x0c\x85")


def test_odd_names_are_printed_escaped(odd_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = odd_run.parent / "data/val" / ODD[1] / "0.png"
    out = tmp_path / "\x1b[33m"
    capsys.readouterr()
    for arguments in (
        ["evaluate", odd_run],
        ["predict", odd_run, image],
        ["runs", odd_run.parent],
        ["plot", odd_run, "--out", tmp_path / "\x1b[33m.pdf"],
        ["analyze", odd_run, "--images", 7, "--out", out],
        ["train", "--resume", odd_run],
    ):
        assert main([str(argument) for argument in arguments]) == 0
        printed = capsys.readouterr()
        assert escaped(printed.out), arguments
        assert escaped(printed.err), arguments
        assert "\\x1b" in printed.out, arguments
        if arguments[0] == "predict":
            assert printed.out.count("\n") == 2 + 5
    for wrong in (
        ["evaluate", "\x1b[31m"],
        ["evaluate", "run", "\x1b[31m"],
        ["\x1b[31m"],
        ["train", "--\x1b[31m"],
        ["plot", "\x1b\n"],
    ):
        assert main(wrong) == 2
        said = capsys.readouterr().err
        assert escaped(said)
        assert said.count("\n") == 1
    with (out / "layers.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["run"] for row in rows} == {str(odd_run)}
    assert not [cell for row in rows for name, cell in row.items() if name in ("run", "group") and cell[0] in "=+@"]


def test_formulas_are_text_in_csv() -> None:
    given = ["=1+1", "+1", "-1", "@a", " =1", "\t=1", "\r=1", "a=1", "", 'a"b', "a\nb"]
    table = csv_text(("text", "number"), [{"text": text, "number": -1.5} for text in given])
    read = list(csv.DictReader(io.StringIO(table, newline="")))
    assert [row["text"] for row in read] == [f"'{text}" for text in given[:7]] + given[7:]
    assert {row["number"] for row in read} == {"-1.5"}
    assert csv_text(("target", "=SUM(A1)"), []) == "target,'=SUM(A1)\r\n"


def test_a_terminal_that_is_not_utf_8_shows_backslashes(odd_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = odd_run.parent / "data/val/猫/0.png"
    for arguments in (["predict", odd_run, image], ["runs", odd_run], ["evaluate", odd_run], ["methods"]):
        content = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(content, encoding="ascii"))
        assert main([str(argument) for argument in arguments]) == 0
        sys.stdout.flush()
        assert content.getvalue().isascii()
        assert arguments == ["methods"] or b"\\u732b" in content.getvalue()


def test_text_is_read_and_written_as_utf_8() -> None:
    """Also where the locale says otherwise: every reading and writing of text names its encoding."""
    missing = []
    for file in (Path(__file__).parent.parent / "src").rglob("*.py"):
        for call in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and any(argument.arg == "encoding" for argument in call.keywords):
                continue
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute | ast.Name):
                name = ast.unparse(call.func).rpartition(".")[2]
                given = {argument.value for argument in call.args[:2] if isinstance(argument, ast.Constant)}
                opens = isinstance(call.func, ast.Name) and not given & {"rb", "wb", "ab"}
                opens = opens or bool(given & {"r", "w", "a", "rt", "wt", "at"})
                positional = len(call.args) > {"read_text": 0, "write_text": 1}.get(name, 9)
                if not positional and (name in ("read_text", "write_text") or (name == "open" and opens)):
                    missing.append(f"{file}:{call.lineno}")
    assert missing == []


# ---- U3, U4, U5: what is said


@pytest.mark.parametrize("verb", ["evaluate", "predict", "analyze"])
def test_memory_that_runs_out_is_one_line(
    verb: str, two_epochs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused
) -> None:
    def lacking(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    image = tmp_path / "five.png"
    Image.new("L", (8, 8)).save(image)
    monkeypatch.setattr(DeliveredBlock, "forward", lacking)
    arguments = {"predict": [str(image)], "analyze": ["--out", str(tmp_path / "report")]}
    said = refused(verb, two_epochs, *arguments.get(verb, []))
    assert "CUDA out of memory. Tried to allocate 2.00 GiB; memory is used up: give " in said
    assert {"evaluate": "a smaller --batch_size than 256", "analyze": "fewer --images"}.get(verb, "") in said


def test_a_file_of_weights_is_scored_without_a_run_folder(
    two_epochs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], refused: Refused
) -> None:
    file = runs.load(two_epochs).weights_file("last")
    assert main(["evaluate", str(file), "--recipe", "digits", "--method", "mpvg"]) == 0
    accuracy = runs.load(two_epochs).metrics()[-1]["accuracy"]
    assert f"{file}: accuracy {100 * accuracy:.2f} %" in capsys.readouterr().out
    assert "no checkpoint at" in refused("evaluate", tmp_path / "none.pth", "--recipe", "digits")
    assert "not divisible" in refused("evaluate", file, "--recipe", "folder", "--data", "digits", "--method", "mpvg")
    assert "digitz" in refused("evaluate", file, "--recipe", "digitz")


@pytest.mark.parametrize("size", ["0", "-1", "1.5", "x", "99999999999", "\u0661"])
def test_a_batch_size_that_is_none_is_refused(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "RUN", f"--batch_size={size}"]) == 2
    assert "give a whole number >= 1" in capsys.readouterr().err


def test_the_batch_size_of_evaluation_changes_no_score(two_epochs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = []
    for flags in ([], ["--batch_size", "7"]):
        assert main(["evaluate", str(two_epochs), *flags]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]


def test_lists_say_what_there_is_to_choose_from(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    rows = [re.split(r" {2,}", line.strip()) for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["recipe", "data", "model", "epochs", "batch", "what for"]
    for (name, make), row in zip(RECIPES.items(), rows[1:], strict=False):
        base = make()
        assert row == [name, base.data, base.model, str(base.epochs), str(base.batch_size), row[5]]
        assert len(row[5]) > 10


def test_models_are_listed_with_their_size(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    rows = [re.split(r" {2,}", line) for line in capsys.readouterr().out.split("\n\n")[0].splitlines()]
    assert rows[0] == ["model", "image", "layers", "parameters", "GFLOPs", "recipes"]
    found = {row[0]: row[1:] for row in rows[1:]}
    assert found["deit_tiny_patch16_224"][:3] == ["3 x 224 x 224", "12", "5,721,640"]
    assert found["deit_tiny_patch16_224"][4] == "folder, finetune, deit_tiny"


def test_the_sizes_of_models_are_what_is_counted() -> None:
    """If this fails: python -m mpvg.analysis.networks."""
    listed = json.loads((Path(models.__file__).with_name("sizes.json")).read_text())
    assert sizes() == listed


@pytest.mark.parametrize("arguments", [["version"], ["--version"]])
def test_the_version_is_printed(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    assert capsys.readouterr().out == f"mpvg {mpvg.__version__}\n"


@pytest.mark.parametrize(
    ("name", "near"), [("trian", "train"), ("evalute", "evaluate"), ("model", "models"), ("dig", None), ("go", None)]
)
def test_near_verbs_are_named_only_where_they_are_near(name: str, near: str | None, refused: Refused) -> None:
    said = refused(name)
    assert (f"; did you mean {near}?" in said) if near else ("did you mean" not in said)


@pytest.fixture(scope="module")
def two_epochs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose second epoch is made the worse one."""
    out = tmp_path_factory.mktemp("weights") / "a run"
    base = replace(recipe("digits"), epochs=2, batch_size=256, device="cpu", threads=1, ema_decay=0.5)
    training.train(replace(base, optim=OptimConfig(), out=str(out)), quiet=True)
    return out


def test_every_output_says_which_weights(two_epochs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = runs.load(two_epochs).metrics()
    best = max(lines, key=lambda line: line["accuracy"])
    image = tmp_path / "five.png"
    Image.new("L", (8, 8)).save(image)
    said = f"after epoch {best['epoch']} of 2 (selected on its validation set)"
    for flags, expected in (
        ([], f"{two_epochs}: weights: best, {said}"),
        (["--ema"], f"{two_epochs}: averaged weights: best, {said}"),
        (["--checkpoint", "last"], f"{two_epochs}: weights: last, after epoch 2 of 2"),
    ):
        assert main(["predict", str(two_epochs), str(image), *flags]) == 0
        assert capsys.readouterr().out.splitlines()[0] == expected
    for flags, prefix in (([], ""), (["--ema"], "ema_")):
        assert main(["evaluate", str(two_epochs), *flags]) == 0
        first, which, second = capsys.readouterr().out.splitlines()
        assert first.endswith(f"nll {lines[1][f'{prefix}nll']:.4f} on 360 images")
        assert which == f"{'averaged ' if prefix else ''}weights: last, after epoch 2 of 2"
        assert second.startswith("beside it, the best epoch, which was selected on this set: accuracy ")
        assert second.endswith(f"nll {best[f'{prefix}nll']:.4f}, epoch {best['epoch']}")
    assert main(["evaluate", str(two_epochs), "--checkpoint", "best"]) == 0
    assert capsys.readouterr().out.endswith(f"\nweights: best, {said}\n")


def test_what_to_do_next_can_be_typed(two_epochs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--resume", str(two_epochs)]) == 0
    done, short, title, *commands = capsys.readouterr().out.splitlines()
    assert done.startswith("done: accuracy ")
    assert short.startswith("This is a short run: 2 of the 25 epochs of the recipe digits. ")
    assert title == "next:"
    assert [shlex.split(line)[:3] for line in commands] == [
        ["mpvg", verb, str(two_epochs)] for verb in ("evaluate", "predict", "analyze", "plot")
    ]


# ---- U2: the first line, and a dry run

SMALL = "train --data digits --epochs 1 --batch_size 256 --threads 1 --device cpu --optim.warmup_epochs 0".split()


def test_the_first_line_says_what_is_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert main([*SMALL, "--out", str(out)]) == 0
    parameters = sum(value.numel() for value in runs.load(out).model().parameters())
    assert capsys.readouterr().out.splitlines()[0] == (
        f"training vit_mini_patch2_8 with mpvg on digits in {out}: 1,437 images, 10 classes, "
        f"{parameters:,} parameters, 1 x 5 steps on cpu, recipe digits"
    )
    weights = out / "checkpoints/last/model.safetensors"
    assert main([*SMALL, "--out", str(tmp_path / "new"), "--network.init", str(weights), "--dry_run"]) == 0
    tensors = len(runs.load(out).model().state_dict())
    assert f", weights from {weights} ({tensors} taken)\n" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [["--dry_run"], ["--measure"], ["--dry_run", "--measure", "--auto_resume"]])
def test_a_dry_run_says_what_it_takes_and_leaves_nothing(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main([*SMALL, "--out", str(out), "--accumulate", "4", "--epochs", "40", *flags]) == 0
    start, share, memory, disk, seconds = capsys.readouterr().out.splitlines()[-5:]
    assert start.endswith("40 x 5 steps on cpu, recipe digits")
    assert share == "256 images a step, 64 at once"
    assert re.fullmatch(r"memory: about [\d.]+ MB a process: [\d.]+ MB, and [\d.]+ MB for each image .*", memory)
    assert re.fullmatch(r"disk: [\d.]+ MB at most, [\d.]+ MB a checkpoint", disk)
    timed = re.fullmatch(r"time: about [\d.e-]+ hours at (\d+) images/s, without evaluation", seconds)
    assert (timed is not None and int(timed[1]) > 0) == ("--measure" in flags)
    assert not out.exists()
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_is_of_a_new_run(two_epochs: Path, refused: Refused) -> None:
    assert "are for a new run, not for --resume" in refused("train", "--resume", two_epochs, "--dry_run")
    assert "already holds a run" in refused(*SMALL, "--out", two_epochs, "--dry_run", "--auto_resume")


@pytest.mark.parametrize("flags", [[], ["--ema_decay", "0.9"], ["--optim.name", "momentum"]])
def test_the_estimates_are_what_a_run_has(flags: list[str], tmp_path: Path) -> None:
    """The checkpoint's size as on the disk, the optimizer's state as after a step, the activations as counted."""
    base = replace(recipe("digits"), epochs=1, batch_size=256, device="cpu", threads=1, optim=OptimConfig())
    values = {name.removeprefix("--"): value for name, value in zip(flags[::2], flags[1::2], strict=True)}
    if "optim.name" in values:
        base = replace(base, optim=replace(base.optim, name=values["optim.name"]))
    if "ema_decay" in values:
        base = replace(base, ema_decay=float(values["ema_decay"]))
    trainer = Trainer.create(replace(base, out=str(tmp_path / "run")), quiet=True)
    estimated, checkpoint = optimizer_bytes(trainer), checkpoint_bytes(trainer)
    kept: list[int] = []
    batch = example_batch(trainer).split(8)[0]
    images, targets = (part.clone() for part in batch)
    own = {value.untyped_storage().data_ptr() for value in (*trainer.state.network.parameters(), images, targets)}
    own |= {value.untyped_storage().data_ptr() for value in trainer.state.network.buffers()}
    storages: dict[int, Any] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    trainer.model.train()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = trainer.task.losses(trainer.model, ImageBatch(images, targets))["loss"]
    kept.append(sum(storage.nbytes() for storage in storages.values()))
    assert kept_for_backward(trainer, batch) == pytest.approx(kept[0], rel=0.01)
    loss.backward()
    trainer.optimizer.step()
    state = [value for values in trainer.optimizer.state.values() for value in values.values()]
    measured = sum(value.nbytes for value in state if isinstance(value, torch.Tensor))
    assert estimated == pytest.approx(measured, rel=0.01)
    training.train(replace(base, out=str(tmp_path / "run")), quiet=True)
    folder = (tmp_path / "run/checkpoints/last").resolve()
    assert checkpoint == pytest.approx(sum(file.stat().st_size for file in folder.iterdir()), rel=0.1)


def test_no_output_is_written_into_a_checkpoint(two_epochs: Path, tmp_path: Path, refused: Refused) -> None:
    """It would count as damage of the run."""
    run = shutil.copytree(two_epochs, tmp_path / "run", symlinks=True)
    inside = run / "checkpoints/last/new"
    image = tmp_path / "x.png"
    Image.new("RGB", (8, 8)).save(image)
    for arguments in (
        ("evaluate", run, "--out", inside),
        ("predict", run, image, "--out", inside),
        ("predict", run, image, "--json", inside),
        ("export", run, "--format", "hub-folder", "--out", inside),
        ("plot", run, "--out", inside.with_suffix(".png")),
        ("analyze", run, "--out", inside),
        ("compare", run, "--out", inside),
        ("compare", run, "--out", inside.parent),
        ("readout", run, "--json", inside),
        ("resolutions", run, "--json", inside),
        ("resolutions", run, "--sizes", "8", "--out", inside),
        ("train", "--data", "digits", "--out", inside),
        ("study", "e5", "--out", inside),
    ):
        assert "is within the checkpoint" in refused(*map(str, arguments)), arguments
    assert load(run).model() is not None
    inside.write_text("mine")
    assert "is not one of the files in checksums.json: remove it)" in refused("evaluate", str(run))


def test_numbers_of_before_are_not_written_over(two_epochs: Path, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "old.json").write_text("{}")
    for verb in ("readout", "resolutions"):
        said = refused(verb, str(two_epochs), "--json", str(tmp_path / "old.json"))
        assert "old.json' exists; give another name, or remove it" in said
    assert (tmp_path / "old.json").read_text() == "{}"
