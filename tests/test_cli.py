"""The command `mpvg`, as a user types it."""

import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from mpvg import runs
from mpvg.cli.main import VERBS, main
from mpvg.data import ImageBatch
from mpvg.delivery import METHODS, DeliverySpec
from mpvg.recipes import recipe
from mpvg.tasks.classification import ClassificationTask

# Half a second a run; `--out` and what is tested come behind.
TRAIN = "train --data digits --epochs 1 --batch_size 256 --threads 1 --device cpu --optim.warmup_epochs 0".split()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has learned enough to know its training images."""
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("cli") / "run"
    options = ["--epochs", "8", "--batch_size", "32", "--ema_decay", "0.9", "--method", "gap", "--out", str(path)]
    assert main([*TRAIN, *options]) == 0
    return path


def raise_at_step(number: int, error: BaseException) -> Callable[..., Any]:
    """What to put in place of a task's `prepare`, which is called once per step."""
    original, steps = ClassificationTask.prepare, itertools.count(1)

    def prepare(self: ClassificationTask, batch: ImageBatch) -> ImageBatch:
        if next(steps) == number:
            raise error
        return original(self, batch)

    return prepare


# ---- help


def test_the_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], ["-h"], []):
        assert main(arguments) == 0
        printed = capsys.readouterr().out
        assert re.findall(r"^  ([\w-]+)  ", printed, re.MULTILINE) == list(VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_a_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([verb, "--help"])
    assert ended.value.code == 0
    assert f"usage: mpvg {verb}" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["nonsense"], ["train", "--epochs", "x"]])
def test_help_and_mistakes_load_no_torch(arguments: list[str]) -> None:
    """Half a second of processor time at most, of which 0.1 to 0.2 are used."""
    program = (
        "import resource, sys\nfrom mpvg.cli.main import main\n"
        f"try:\n    main({arguments})\nexcept SystemExit:\n    pass\n"
        "used = resource.getrusage(resource.RUSAGE_SELF)\n"
        "loaded = {'torch', 'timm', 'numpy', 'accelerate', 'PIL'} & set(sys.modules)\n"
        "print('loaded:', sorted(loaded), 'in time:', used.ru_utime + used.ru_stime < 0.5)"
    )
    ended = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert ended.stdout.splitlines()[-1] == "loaded: [] in time: True"


def test_the_help_of_train_explains_every_option_and_shows_the_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--data", "cifar10", "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    values = recipe(None, "cifar10").to_dict()
    for part in ("network", "augment", "optim", "loader"):
        values |= {f"{part}.{name}": value for name, value in values.pop(part).items()}
    for name in values:
        assert re.search(rf"--{re.escape(name)} \S+ (?=[A-Z]|timm's)", printed), name
    assert "--batch_size BATCH_SIZE Images per step, over all processes. (type: int, default: 128)" in printed


# ---- the verbs


def test_train_leaves_a_run_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert main([*TRAIN, "--seed", "5", "--method", "pvg", "--out", str(out)]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    summary = runs.load(out).summary()
    assert summary is not None
    assert (summary["seed"], summary["method"], summary["recipe"]) == (5, "pvg", "digits")
    first, left_out, epoch, last, *_ = printed.out.splitlines()
    assert first.startswith(f"training vit_mini_patch2_8 with pvg on digits in {out}: 1,437 images, 10 classes, ")
    assert left_out.startswith("157 of 1437 images are left out of each epoch")
    assert epoch.startswith("epoch 1/1  loss ")
    accuracy = f"{100 * summary['accuracy']:.2f} %"
    assert last.startswith(f"done: accuracy {accuracy} (best {accuracy}), nll {summary['nll']:.4f}, ")
    assert last.endswith(f"weights in {out}/checkpoints/last/model.safetensors")


def test_a_run_without_a_name_gets_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*TRAIN, "--batch_size", "1400", "--seed", "3"]) == 0
    assert main([*TRAIN, "--batch_size", "1400", "--method", '{"last_index": 0}']) == 0
    found = sorted(file.name for file in (tmp_path / "runs").iterdir())
    assert found == ["digits-vit_mini_patch2_8-custom-seed0", "digits-vit_mini_patch2_8-mpvg-seed3"]


def test_evaluate_prints_what_the_metrics_say(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = runs.load(trained).metrics()[-1]
    for flags, prefix in (([], ""), (["--ema"], "ema_")):
        assert main(["evaluate", str(trained), *flags]) == 0
        accuracy, top5, nll = (line[f"{prefix}{name}"] for name in ("accuracy", "top5", "nll"))
        expected = (
            f"{trained}: accuracy {100 * accuracy:.2f} %, top-5 {100 * top5:.2f} %, nll {nll:.4f} on 360 images\n"
        )
        assert capsys.readouterr().out.startswith(expected)
    assert line["nll"] != line["ema_nll"]


def test_evaluate_can_take_the_best(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    best = max(runs.load(trained).metrics(), key=lambda line: line["accuracy"])
    assert main(["evaluate", str(trained), "--checkpoint", "best"]) == 0
    assert f"nll {best['nll']:.4f} on 360 images" in capsys.readouterr().out


def test_predict_names_what_is_on_training_images(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    paths = [tmp_path / f"{number}.png" for number in range(20)]
    for path, image in zip(paths, digits.images, strict=False):
        Image.fromarray((image * 255 / 16).round().astype("uint8")).save(path)
    capsys.readouterr()
    assert main(["predict", str(trained), *map(str, paths)]) == 0
    _, *lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 20 * 6
    right = 0
    for number, target in enumerate(digits.target[:20]):
        name, *found = lines[6 * number : 6 * number + 6]
        assert name == str(paths[number])
        pairs = [re.fullmatch(r" +([\d.]+) %  (\d)", line) for line in found]
        values = [float(pair[1]) for pair in pairs if pair]
        assert len(values) == 5
        assert values == sorted(values, reverse=True)
        assert sum(values) <= 100.05
        assert pairs[0] is not None
        right += int(pairs[0][2]) == target
    line = runs.load(trained).metrics()[-1]
    assert line["accuracy"] > 0.5
    assert right >= 10  # by chance it would be two


def test_inspect_counts_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for method, parameters, extra in (("default", "5,717,416", "0"), ("mpvg", "5,721,640", "4,608")):
        assert main(["inspect", "deit_tiny_patch16_224", "--method", method]) == 0
        printed = capsys.readouterr().out
        assert f"  parameters  {parameters} ({extra} of them LN')\n" in printed
        assert "3 x 224 x 224, 1000 classes" in printed
    for suffix, start in (("svg", b"<?xml"), ("png", b"\x89PNG"), ("pdf", b"%PDF")):
        file = tmp_path / f"figure.{suffix}"
        assert main(["inspect", "deit_tiny_patch16_224", "--figure", str(file)]) == 0
        assert file.read_bytes().startswith(start)
        assert f"drawn in {file}" in capsys.readouterr().out
    text = (tmp_path / "figure.svg").read_text()
    assert all(
        words in text for words in ("layer 11", "Last LN", "mean over tokens", "+ pos_1 = LN&#x27;_1(pos_0)")
    ) or ("+ pos_1 = LN'_1(pos_0)" in text)


def test_inspect_takes_sizes_and_an_own_method(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--num_classes", "10", "--img_size", "16", "--in_chans", "1"]
    network = "vit_narrow_patch4_28"  # of 12 layers
    own = '{"pool": "token", "first_layer": 0, "hierarchical": false, "last_index": 3}'
    assert main(["inspect", network, "--method", own, *sizes]) == 0
    printed = capsys.readouterr().out
    assert "1 x 16 x 16, 10 classes" in printed
    assert "read-out    class token" in printed
    assert "  layer 11    pos_11 = LN'_11(pos_0)\n  Last LN     LN'_last(pos_3)\n" in printed


def test_inspect_prints_the_papers_counts_beside_ours(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "--table"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("1000  mpvg") == 6
    assert "28 of 32 as the paper prints them" in printed
    assert [f"differs [{n}]" in printed and f"\n[{n}] " in printed for n in range(1, 6)] == [True] * 4 + [False]
    for arguments in (["inspect"], ["inspect", "t2t_vit_7", "--table"]):
        assert main(arguments) == 2
        assert "give the name of a network, or --table and no name; see `mpvg inspect" in capsys.readouterr().err


def test_inspect_takes_a_converted_network(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "timm/vit_base_patch16_siglip_224"]) == 0
    assert "read-out    attention pooling" in capsys.readouterr().out


def test_methods_lists_all_with_their_fields(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip(" ─")]
    assert rows[0] == ["method", "pool", "input_pe", "first_layer", "hierarchical", "last_index"]
    fields = rows[0][1:]
    assert rows[1:] == [[name, *(str(getattr(spec, field)) for field in fields)] for name, spec in METHODS.items()]
    shown = [dict(zip(fields, row[1:], strict=True)) for row in rows[1:]]
    assert all(set(spec.to_dict()) <= set(fields) for spec in METHODS.values()), (
        "a method has a field that is not shown"
    )
    assert len({str(row) for row in shown}) == 14
    assert len(rows) == 1 + 14


# ---- where values come from


def test_flags_go_before_the_file_and_the_file_before_the_recipe(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("seed: 7\nlr: 0.004\noptim: {weight_decay: 0.3, betas: [0.8, 0.9]}\nmethod: {pool: token}\n")
    out = tmp_path / "run"
    flags = ["--config", str(file), "--lr", "0.005", "--optim.weight_decay", "0.4", "--batch_size", "1400"]
    assert main([*TRAIN, *flags, "--out", str(out)]) == 0
    config = runs.load(out).config
    base = recipe(None, "digits")
    assert config.lr == 0.005  # flag
    assert config.optim.weight_decay == 0.4
    assert config.seed == 7  # file
    assert config.optim.betas == (0.8, 0.9)
    assert config.method == {"pool": "token"}
    assert config.model == base.model  # recipe
    assert config.optim == replace(base.optim, weight_decay=0.4, betas=(0.8, 0.9), warmup_epochs=0)
    assert config.augment == base.augment


def printed_config(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["train", *arguments, "--print_config"]) == 0
    values: dict[str, Any] = yaml.safe_load(capsys.readouterr().out)
    return values


def test_the_recipe_is_that_of_the_data_unless_one_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("data: fashion-mnist\nlr: 0.5\n")
    for arguments, expected, data in (
        ([], "digits", "digits"),
        (["--data", "cifar10"], "cifar10", "cifar10"),
        (["--data", "a/folder"], "folder", "a/folder"),
        (["--data", "a/folder", "--recipe", "cifar100"], "cifar100", "a/folder"),
        (["--config", str(file)], "fashion-mnist", "fashion-mnist"),
        (["--config", str(file), "--data", "cifar10"], "cifar10", "cifar10"),
    ):
        values = printed_config(capsys, *arguments)
        wanted = recipe(expected, data).to_dict() | ({"lr": 0.5} if "--config" in arguments else {})
        assert {name: values[name] for name in wanted} == wanted, arguments


def test_a_printed_config_and_a_run_s_config_can_be_given_again(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = printed_config(capsys, "--config", str(trained / "config.yaml"), "--seed", "1")
    wanted = runs.load(trained).config.to_dict() | {"seed": 1}
    assert {name: values[name] for name in wanted} == wanted


def test_an_own_method_survives_the_folder_and_a_reload(tmp_path: Path) -> None:
    own = {"pool": "token", "first_layer": 0, "hierarchical": False, "last_index": 3, "input_pe": False}
    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump({"method": own}))
    by_flag, by_file = tmp_path / "flag", tmp_path / "file"
    assert main([*TRAIN, "--method", json.dumps(own), "--out", str(by_flag)]) == 0
    assert main([*TRAIN, "--config", str(file), "--out", str(by_file)]) == 0
    images = torch.randn(4, 1, 8, 8)
    logits = []
    for out in (by_flag, by_file):
        run = runs.load(out)
        assert run.config.method == own
        model: Any = run.model()
        assert model.delivery.spec == DeliverySpec(**own)
        logits.append(model(images))
    assert torch.equal(*logits)


def test_an_interrupted_command_is_continued(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--epochs", "2", "--out", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        patch.setattr(ClassificationTask, "prepare", raise_at_step(8, KeyboardInterrupt()))
        assert main([*TRAIN, *options]) == 130
    assert capsys.readouterr().err == "\ninterrupted; continue with `mpvg train --resume RUN`\n"
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr().out
    assert "epoch 1/2" not in printed
    assert printed.count("\nepoch 2/2  loss ") == 1
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0  # a complete run is only reported again
    assert capsys.readouterr().out == printed[printed.index("done:") :]


# ---- refusals: the value, what is allowed, what to do


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--method mpgv", r"unknown method 'mpgv'; did you mean mpvg or .* Known: default, gap, .*, mpvg_no_input_pe"),
        ("--model vit_mini_patch2_9", r"unknown model 'vit_mini_patch2_9'; did you mean vit_mini_patch2_8 .* Known: c"),
        ("--data digit", r"data 'digit' is neither a data set nor a folder; did you mean digits\? allowed: digits, "),
        ("--data no/folder", r"data folder 'no/folder' does not exist; give one with train/ and val/"),
        ("--recipe digts", r"unknown recipe 'digts'; did you mean digits\? Known: digits, fashion-mnist, cifar10"),
        ("--epoch 3", r"unrecognized arguments: --epoch 3; did you mean epochs\?"),
        ("--optim.weigth_decay 3", r"unrecognized .*--optim\.weigth_decay 3; did you mean optim\.weight_decay\?"),
        ("--xyzzy 3", r"unrecognized arguments: --xyzzy 3; see `mpvg train --help`"),
        ("surplus", r"unrecognized arguments: surplus; see `mpvg train --help`"),
        ("--epochs many", r"--epochs is 'many'; allowed: int; see `mpvg train --help`"),
        ("--epochs 2.5", r"--epochs is '2\.5'; allowed: int; see"),
        ("--epochs 1_0", r"--epochs is '1_0'; allowed: int; see"),
        ("--threads x", r"--threads is 'x'; allowed: int \| null; see `mpvg train --help`"),
        ("--channels_last 1", r"--channels_last is '1'; allowed: bool; see"),
        ("--lr x", r"--lr is 'x'; allowed: float; see"),
        ("--lr nan", r"lr is nan; allowed: float"),
        ("--device gpu", r"device is 'gpu'; allowed: 'auto', 'cpu', 'cuda'"),
        ("--optim.betas [0.9]", r"optim\.betas is \[0\.9\]; allowed: \[float, float\]"),
        ("--optim.betas [0.9", r"--optim\.betas '\[0\.9' is not valid JSON of the type \[float, float\] "),
        ("--optim.betas 0.9", r"--optim\.betas is '0\.9'; allowed: \[float, float\]; see"),
        ("--network.mean 0.5", r"--network\.mean is '0\.5'; allowed: \[float, \.\.\.\] \| null; see"),
        ("--task_options x", r"--task_options is 'x'; allowed: \{str: any value\}; see"),
        ("--method {x", r"--method '\{x' is not valid JSON of the type \{str: any value\} \(.*\); see"),
        ("--epochs 0", r"epochs is 0; allowed: a whole number >= 1"),
        ("--lr -1", r"lr is -1\.0; allowed: a number > 0"),
        ("--network.drop_path 1", r"network\.drop_path is 1\.0; allowed: a number in \[0, 1\)"),
        ("--optim.warmup_epochs 30", r"optim\.warmup_epochs and .* are 30\.0 together, more than epochs 1"),
        ("--optim.name adamww", r"optim\.name is 'adamww'; allowed: timm's names, such as .*adamw"),
        (
            "--model vit_mini_patch4_28 --network.img_size 30",
            r"image size 30 is not divisible by the patch size 4; the nearest sizes that are: 28, 32",
        ),
        ("--method mpvg_last8", r"last_index 8 asks for pos_8, but ViT has \d layers.*; use a smaller last_index"),
        ("--method {\"pool\":\"max\"}", r"pool is 'max'; allowed: 'token', 'avg'"),
        ("--method {\"last\":0}", r"unknown field 'last' of a DeliverySpec; allowed: pool, input_pe, first_layer"),
        ("--augment.mixup 0.5 --batch_size 63", r"batch_size 63 is odd, but mixup .* give an even batch_size"),
        ("--batch_size 2000", r"batch_size 2000 is larger than the training set, 1437 images, .* at most 1437"),
        ("--augment.auto_augment rand-x", r"augment\.auto_augment is 'rand-x'; allowed for this data: 'rand-m9"),
        ("--data cifar10", r"data 'cifar10' \(.*\) was not found in any of .*; to get it: .*--loader\.root data"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_refused(
    arguments: str, message: str, refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # no data set lies there
    assert re.match(message, refused(*TRAIN, "--out", tmp_path / "run", *arguments.split()))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch: 3", r"--config \S+: unknown config key 'epoch'; did you mean epochs\? Known: data, model"),
        (
            "optim: {weight_decai: 3}",
            r"--config \S+: unknown config key 'optim\.weight_decai'; did you mean optim\.weight_decay\? Known: optim",
        ),
        ("epochs: many", r"--config \S+: epochs is 'many'; allowed: int; see `mpvg train --print_config`"),
        ("optim: 3", r"--config \S+: optim must hold the keys name, weight_decay, .*, got 3"),
        ("batch_size: 0", r"--config \S+: batch_size is 0; allowed: a whole number >= 1"),
        ("format: 3", r"--config \S+ has format 3, and this version of mpvg reads 1 to 2; update mpvg"),
        ("recipe: [digits]", r"--config \S+: recipe is \['digits'\]; allowed: a name, as text"),
        ("recipe: digts", r"unknown recipe 'digts'; did you mean digits"),
        ("- a list", r"--config \S+ holds no keys; see `mpvg train --print_config`"),
        ("a: [1", r"--config \S+ is not readable YAML \(.*line 1.*\); see `mpvg train --print_config`"),
        (None, r"--config \S+ is not readable YAML \(.*No such file.*\); see `mpvg train --print_config`"),
    ],
)
def test_a_wrong_file_is_refused(text: str | None, message: str, refused: Callable[..., str], tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    if text is not None:
        file.write_text(text)
    own = ["train", "--device", "cpu", "--out", tmp_path / "run", "--config", file]
    assert re.match(message, refused(*own))
    assert not (tmp_path / "run").exists()


def test_an_unknown_verb_is_refused_with_the_nearest(refused: Callable[..., str]) -> None:
    assert refused("trian") == f"unknown verb 'trian'; did you mean train? Known: {', '.join(VERBS)}"
    for far in ("xyzzy", "rain dance", "-x"):
        assert refused(far) == f"unknown verb {far!r}. Known: {', '.join(VERBS)}"


def test_a_folder_that_holds_a_run_is_not_written_to(trained: Path, refused: Callable[..., str]) -> None:
    files = {file: file.stat().st_mtime_ns for file in trained.rglob("*")}
    said = refused(*TRAIN, "--out", trained)
    assert (
        said
        == f"{trained} already holds a run; continue it with `mpvg train --resume {trained}`, or give another --out"
    )
    assert {file: file.stat().st_mtime_ns for file in trained.rglob("*")} == files


def test_a_run_is_only_continued_as_it_is(trained: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    said = refused("train", "--resume", trained, "--model", "deit_tiny_patch16_224", "--threads", 2)
    assert said == (
        f"--resume continues {trained} as it is: model is 'vit_mini_patch2_8' there, 'deit_tiny_patch16_224' given, "
        "threads is 1 there, 2 given; leave these out, or train a new run with --out"
    )
    assert "loader is " in refused("train", "--resume", trained, "--loader.root", "elsewhere")
    assert "holds no run: config.yaml is missing; give a folder that `mpvg train` made" in refused(
        "train", "--resume", tmp_path
    )


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    """The run, as if it had been interrupted."""
    shutil.copytree(trained, tmp_path / "copy", symlinks=True)
    (tmp_path / "copy/summary.json").unlink()
    return tmp_path / "copy"


def test_a_config_that_was_edited_is_refused(copy: Path, refused: Callable[..., str]) -> None:
    file = copy / "config.yaml"
    file.write_text(re.sub(r"^lr: .*", "lr: 0.7", file.read_text(), count=1, flags=re.MULTILINE))
    assert "config.yaml was changed since the run was saved" in refused("train", "--resume", copy)
    file.write_text("a: [1")
    assert "config.yaml is not readable YAML" in refused("train", "--resume", copy)
    file.write_text("epochs: many")
    assert "config.yaml: " in refused("evaluate", copy)


def test_damaged_checkpoints_are_refused(copy: Path, refused: Callable[..., str]) -> None:
    """The newest by `evaluate` and `predict`, which take no other unasked; all of them by `--resume`."""
    model = copy / "checkpoints/last/model.safetensors"
    os.truncate(model, 1000)
    for arguments in (["evaluate", copy], ["predict", copy, "x.png", "--checkpoint", "last"]):
        said = refused(*arguments)
        assert "model.safetensors" in said
        assert "is damaged" in said
    for older in copy.glob("checkpoints/step-*/model.safetensors"):
        os.truncate(older, 1000)
    said = refused("train", "--resume", copy)
    assert "model.safetensors" in said
    assert "damaged" in said


def test_other_classes_are_refused(trained: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    for split in ("train", "val"):
        for name in "ab":
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for number in range(32):
                Image.new("RGB", (8, 8)).save(tmp_path / "images" / split / name / f"{number}.png")
    said = refused("evaluate", trained, "--data", tmp_path / "images")
    assert said == (
        f"{tmp_path / 'images'} has 2 classes (a, b), but {trained} was trained on 10 (0, 1, 2, 3, 4, ...); "
        "give the folder it was trained on, or one with the same class folders"
    )
    for split in ("train", "val"):
        for name, digit in zip("ab", "01", strict=True):
            (tmp_path / "images" / split / name).rename(tmp_path / "images" / split / digit)
        for digit in "23456789":
            shutil.copytree(tmp_path / "images" / split / "0", tmp_path / "images" / split / digit)
    said = refused("evaluate", trained, "--data", tmp_path / "images")
    assert "are prepared as 3 x 224 x 224, mean" in said


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"no image", "UnidentifiedImageError"),
        (None, "No such file"),
        (b"\x89PNG\r\n\x1a\n" + bytes(50), ""),
        ("cut", ""),
    ],
)
def test_an_image_that_cannot_be_read_is_refused(
    trained: Path, tmp_path: Path, refused: Callable[..., str], content: bytes | str | None, reason: str
) -> None:
    file = tmp_path / "image.png"
    if content == "cut":
        Image.effect_noise((64, 64), 50).save(file)
        os.truncate(file, 500)
    elif isinstance(content, bytes):
        file.write_bytes(content)
    said = refused("predict", trained, file)
    assert said.startswith(f"image {file} cannot be read (")
    assert reason in said
    assert said.endswith("; give an image file, such as a PNG")


def test_hardware_that_is_missing_is_named(
    tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = refused(*TRAIN, "--out", tmp_path / "run", "--device", "cuda")
    assert said == "device is 'cuda', but torch sees no GPU; give --device cpu"
    read_text = Path.read_text
    monkeypatch.setattr(
        Path,
        "read_text",
        lambda self, *a, **k: "flags: fpu" if str(self) == "/proc/cpuinfo" else read_text(self, *a, **k),
    )
    said = refused(*TRAIN, "--out", tmp_path / "run", "--precision", "bf16")
    assert said.startswith("precision is 'bf16', but this CPU has neither avx512_bf16 nor amx_bf16")
    assert said.endswith("; give --precision fp32")
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_no_number_names_the_step(tmp_path: Path, refused: Callable[..., str]) -> None:
    said = refused(*TRAIN, "--out", tmp_path / "run", "--lr", "1e20", "--optim.warmup_epochs", "0")
    assert re.match(
        r"the loss is nan at step 2 \(epoch 1, batch 2\); no checkpoint had been saved yet; .*lower lr", said
    )


def test_inspect_refuses_what_it_cannot_do(tmp_path: Path, refused: Callable[..., str]) -> None:
    assert "unknown model 'deit_tinny'; did you mean deit_tiny" in refused("inspect", "deit_tinny")
    assert "is not valid JSON" in refused("inspect", "deit_tiny_patch16_224", "--method", "{pool")
    assert "Format 'xyz' is not supported" in refused("inspect", "vit_mini_patch2_8", "--figure", tmp_path / "x.xyz")
    assert "image size 30 is not divisible" in refused("inspect", "deit_tiny_patch16_224", "--img_size", 30)


@pytest.mark.parametrize("verb", ["predict", "evaluate", "analyze", "export", "plot", "replay", "compare", "explore"])
def test_a_command_that_is_not_complete_names_what_is_missing(verb: str, refused: Callable[..., str]) -> None:
    said = refused(verb)
    assert said.startswith("the following arguments are required: ")
    assert said.endswith(f"; see `mpvg {verb} --help`")


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("evaluate RUN --checkpoint first", "argument --checkpoint: invalid choice: 'first' (choose from "),
        ("evaluate RUN --nonsense", "unrecognized arguments: --nonsense; see `mpvg evaluate --help`"),
        ("train --resume", "argument --resume: expected one argument; see `mpvg train --help`"),
        ("study table1 --seeds 0", "argument --seeds: '0' is not allowed; give a whole number >= 1; see `mpvg study"),
    ],
)
def test_a_mistake_in_the_arguments_is_one_line(command: str, said: str, refused: Callable[..., str]) -> None:
    assert refused(*command.split()).startswith(said)


def test_a_missing_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    said = refused(*TRAIN, "--out", str(tmp_path / "run"))
    assert said.startswith("data 'digits' needs scikit-learn (")
    assert "pip install" in said


def test_a_traceback_can_be_had() -> None:
    """In processes of their own: what is really printed, and really the exit code."""
    environment = os.environ | {"MPVG_TRACEBACK": "1"}
    mpvg = [sys.executable, "-m", "mpvg"]
    ended = subprocess.run(
        [*mpvg, "train", "--epochs", "0"], check=False, capture_output=True, text=True, env=environment
    )
    assert ended.returncode == 1
    assert "Traceback" in ended.stderr
    ended = subprocess.run([*mpvg, "train", "--epochs", "0"], check=False, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == "mpvg: error: epochs is 0; allowed: a whole number >= 1\n"


@pytest.mark.parametrize("arguments", [["--help"], ["methods"], ["train", "--help"], ["inspect", "vit_mini_patch2_8"]])
def test_a_reader_that_has_seen_enough_is_no_error(arguments: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "mpvg", *arguments]
    ended = subprocess.run(command, check=False, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert ended.stderr == ""


# ---- a command that is started again


def test_the_same_command_with_auto_resume_begins_goes_on_and_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], refused: Callable[..., str]
) -> None:
    """As torchrun starts it again after a crash: with no run yet, with an interrupted one, with a complete one."""
    command = [*TRAIN, "--out", str(tmp_path / "run"), "--save_steps", "2", "--auto_resume"]
    with monkeypatch.context() as patch:
        patch.setattr(ClassificationTask, "prepare", raise_at_step(4, OSError("the machine is gone")))
        assert refused(*command) == "the machine is gone"
    assert main(command) == 0
    assert "from step 2" in capsys.readouterr().out
    line = (tmp_path / "run/metrics.jsonl").read_text()
    assert main(command) == 0
    assert "done: accuracy" in capsys.readouterr().out
    assert (tmp_path / "run/metrics.jsonl").read_text() == line
    assert "seed is 0 there, 5 given" in refused(*command, "--seed", "5")
    assert "already holds a run" in refused(*command[:-1])


@pytest.mark.parametrize(("verb", "code"), [("methods", 0), ("--help", 0), ("nosuch", 2)])
def test_closed_streams_change_no_exit_code(verb: str, code: int) -> None:
    for closed in (">&-", "2>&-", ">&- 2>&-"):
        command = f"{shlex.quote(sys.executable)} -m mpvg {verb} {closed}"
        done = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
        assert done.returncode == code
        assert "Traceback" not in done.stderr
