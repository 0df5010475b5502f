"""What the README and the docs say is what happens."""

import re
import shlex
from pathlib import Path

import pytest

from mpvg.cli import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_python_examples_run(number: int) -> None:
    exec(compile(EXAMPLES[number], f"README example {number + 1}", "exec"), {})


def test_the_second_example_is_a_network_that_is_not_timms() -> None:
    assert "PositionDelivery" in EXAMPLES[1]
    assert "timm" not in EXAMPLES[1]
    assert "create_model" not in EXAMPLES[1]


def test_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```\n(mpvg .*?)```", README, flags=re.DOTALL)
    commands = [line for block in blocks for line in block.splitlines() if line.startswith("mpvg ")]
    assert len(commands) >= 4
    for command in commands:
        assert main(shlex.split(command)[1:]) == 0, f"{command}\n{capsys.readouterr().err}"
    assert (tmp_path / "RUN/checkpoints/last/model.safetensors").is_file()


def test_the_table_of_networks_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    """tests/models/test_contract.py runs every cell of it."""
    assert main(["methods", "--networks"]) == 0
    assert capsys.readouterr().out in README


def test_commands_of_the_docs_have_no_unknown_flag(capsys: pytest.CaptureFixture[str]) -> None:
    """They need files that are not here, so they are parsed, not run."""
    pages = [page.read_text().replace("\\\n", "") for page in ROOT.glob("docs/*.md")]
    commands = [found for page in pages for found in re.findall(r"\bmpvg train --recipe [^`\n]*", page)]
    assert len(commands) >= 12
    for command in commands:
        with pytest.raises(SystemExit, match="^0$"):
            main([*shlex.split(command)[1:], "--print_config"])
        assert f"recipe: {shlex.split(command)[3]}\n" in capsys.readouterr().out, command


PAGES = sorted(path.relative_to(ROOT) for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_somewhere(page: Path) -> None:
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", (ROOT / page).read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)", prose):
        if "://" not in target:
            assert (ROOT / page).parent.joinpath(target).exists(), f"{page} links {target}, which does not exist"


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
