"""What is tried on the command line of `mpvg train`: flags, and the file that --config names."""

import contextlib
import io
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from fuzz_values import MAX_MESSAGE, SCALARS, VALUES, Target, bounded, edited, to_json, yaml_files
from mpvg.cli.flags import field_kinds
from mpvg.cli.main import main
from mpvg.config import FORMAT, RunConfig, flatten
from mpvg.delivery import METHODS
from mpvg.recipes import RECIPES
from mpvg.validation import parse_config

CONFIG = RunConfig(data="digits", model="vit_mini_patch2_8", epochs=3, batch_size=4, lr=0.1, recipe="none")
USUAL = {
    name: [
        *{
            to_json(flatten(made.to_dict())[name]).decode().strip('"')
            for made in (CONFIG, *(f() for f in RECIPES.values()))
        }
    ]
    for name in flatten(CONFIG.to_dict())
}
"""What each field has in some recipe."""
NAMES = [*field_kinds()]
TYPED = [
    *(
        "1",
        "0",
        "-1",
        "1e400",
        "1e-3",
        "1_0",
        "0x1",
        "nan",
        "true",
        "null",
        "none",
        "None",
        "[]",
        "{}",
        "[1, 2]",
        "auto",
    ),
    *('{"pool": "avg"}', '{"first_layer": 0, "pool": "token"}', '{"1": 0.5}', "[[" * 200, '{"a":' * 200, " 1 ", "٣"),
]
TEXTS = st.one_of(SCALARS.map(str), VALUES.map(lambda value: to_json(value).decode()), st.sampled_from(TYPED)).filter(
    lambda text: "\0" not in text
)  # which the system does not let into a command


def flag(name: str) -> st.SearchStrategy[list[str]]:
    """One flag with a value, in one word or two; often one that it may have."""
    usual = st.sampled_from(sorted(USUAL[name]) + ([*METHODS] if name == "method" else []))
    value = st.integers(0, 7).flatmap(lambda number: usual if number else TEXTS)
    return st.one_of(value.map(lambda text: [f"--{name}={text}"]), value.map(lambda text: [f"--{name}", text]))


def command_lines() -> st.SearchStrategy[list[str]]:
    """A few flags, most of which exist."""
    strange = st.sampled_from(
        [["--help"], ["-h"], ["--"], ["-"], ["--lr"], ["--optim", "{}"], ["--optim.", "1"], ["x"]]
    )
    unknown = st.tuples(st.text(max_size=8).map(lambda text: f"--{text}".replace("\0", "")), TEXTS).map(list)
    known = st.sampled_from(NAMES).flatmap(flag)
    flags = st.lists(st.integers(0, 15).flatmap(lambda n: known if n > 1 else unknown if n else strange), max_size=4)
    return flags.map(lambda parts: [word for part in parts for word in part if not _elsewhere(word)])


def _elsewhere(word: str) -> bool:
    """What reads another file, or trains."""
    return word.startswith(("--config", "--resume", "--auto_resume", "--measure"))


def files() -> st.SearchStrategy[bytes | None]:
    """A file that --config names, or none."""
    whole = {"format": FORMAT, **CONFIG.to_dict()}
    some = st.lists(st.sampled_from(sorted(whole)), max_size=3).map(lambda keys: {key: whole[key] for key in keys})
    valid = st.one_of(st.none(), some.map(to_json))
    return st.one_of(valid, valid, valid, some.flatmap(edited).map(to_json), yaml_files(whole))


def read(example: tuple[bytes | None, list[str]]) -> None:
    """Prints the config that a command gives; an error is one line, and a config that is printed prints itself."""
    content, words = example
    with tempfile.TemporaryDirectory(prefix="mpvg-fuzz-") as folder, bounded():
        file = Path(folder) / "config.yaml"
        if content is not None:
            file.write_bytes(content)
            words = ["--config", str(file), *words]
        printed = _run(["train", "--print_config", *words])
        if printed is None or {"-h", "--help"} & {*words}:
            return
        values = parse_config(printed.encode(), "what is printed", FORMAT, "", default=FORMAT)
        assert RunConfig.from_dict(values).to_dict() == values
        file.write_text(printed)
        assert _run(["train", "--print_config", "--config", str(file)]) == printed


def _run(words: Sequence[str]) -> str | None:
    """What a command prints; None if it refuses its arguments."""
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            code: Any = main(words)
        except SystemExit as end:  # argparse, with its help
            code = end.code or 0
    message = error.getvalue().strip()
    assert code in (0, 2), (code, message)
    assert (code == 0) == (not message), message
    assert len(message.splitlines()) <= 1, message
    assert len(message) < MAX_MESSAGE, message
    return out.getvalue() if code == 0 else None


def command_line() -> dict[str, Target]:
    """The flags and the file of `mpvg train`."""
    return {"mpvg train": Target(st.tuples(files(), command_lines()), read)}
