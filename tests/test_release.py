"""What is handed out: the wheel's contents, and the lower bounds that `make oldest` installs."""

import runpy
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src/mpvg"


def test_the_wheel_holds_the_package_and_nothing_else(tmp_path: Path) -> None:
    """All of its data files too: a new kind of file needs a line in pyproject.toml."""
    source = tmp_path / "source"
    shutil.copytree(PACKAGE, source / "src/mpvg", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "-q", "--no-deps"]
    subprocess.run([*pip, "--no-build-isolation", "--no-index", "-w", str(tmp_path), str(source)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    files = {
        str(path.relative_to(PACKAGE.parent))
        for path in PACKAGE.rglob("*")
        if path.is_file() and path.parent.name != "__pycache__"
    }
    assert {name for name in names if ".dist-info/" not in name} == files
    assert {"mpvg/py.typed", "mpvg/page.css"} <= files
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_every_requirement_has_a_lower_bound_that_can_be_installed_alone() -> None:
    script = runpy.run_path(str(ROOT / ".ci/oldest.py"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    users = sorted(extras.keys() - {"all", "dev", "docs", "release"})
    wanted = map(Requirement, [*project["dependencies"], *(line for name in users for line in extras[name])])
    for requirement, pin in zip(wanted, map(Requirement, script["pins"](project)), strict=True):
        assert pin.name == requirement.name
        (only,) = pin.specifier
        assert only.operator == "=="
        assert requirement.specifier.contains(only.version), str(requirement)


@pytest.mark.parametrize("line", ["torch", "torch<3", "torch==2.11"])
def test_a_requirement_without_a_lower_bound_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match="has no lower bound"):
        runpy.run_path(str(ROOT / ".ci/oldest.py"))["oldest"](line)
