"""Builds wheel and source distribution into dist/, checks both, and tries the wheel as a user would (`make dist`).

The bare environment has no extra, so the README's first command must end there in one line that names the extra.
"""

import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
DIST = ROOT / "dist"
FIRST = ["train", "--data", "digits", "--method", "mpvg", "--epochs", "2", "--seed", "0", "--out", "RUN"]
"""The README's first command."""
PIP = ["-m", "pip", "--disable-pip-version-check"]


def run(*command: object, cwd: Path = ROOT) -> None:
    """Runs a command and prints it; stops where it fails."""
    words = list(map(str, command))
    print("==", *words, flush=True)
    subprocess.run(words, cwd=cwd, check=True)


def build() -> tuple[Path, Path]:
    """Builds the sdist, and the wheel from it, and returns the wheel and the sdist."""
    shutil.rmtree(DIST, ignore_errors=True)
    run(sys.executable, "-m", "build", "--outdir", DIST, ROOT)
    (wheel,), (sdist,) = DIST.glob("*.whl"), DIST.glob("*.tar.gz")
    run(sys.executable, "-m", "twine", "check", "--strict", wheel, sdist)
    return wheel, sdist


def check_contents(wheel: Path, sdist: Path) -> None:
    """The wheel holds the package, all of it and no more; the sdist every file that is in git."""
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
        info = {name.partition(".dist-info/")[2] for name in archive.namelist()} - {""}
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    tracked = set(listing.rstrip("\0").split("\0"))
    expected = {name.removeprefix("src/") for name in tracked if name.startswith("src/mpvg/")}
    require(packed == expected, f"wheel and src/mpvg differ: {sorted(packed ^ expected)}")
    require("licenses/LICENSE" in info and "entry_points.txt" in info, f"the wheel's metadata lack a file: {info}")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    # By what they are: a link to a folder is packed as the folder, and the folder then left out.
    lacking = {(ROOT / name).resolve() for name in tracked} - {(ROOT / name).resolve() for name in names}
    require(not lacking, f"the sdist lacks {sorted(map(str, lacking))}")


def require(holds: bool, message: str) -> None:
    """Stops with a message unless something holds."""
    if not holds:
        sys.exit(message)


def make_environment(folder: Path, *requirements: str) -> Path:
    """Makes an empty virtual environment, installs what is asked for and returns its Python."""
    run(sys.executable, "-m", "venv", folder)
    python = folder / "bin/python"
    run(python, *PIP, "install", "-qq", "-c", ROOT / "constraints.txt", *requirements)
    return python


def try_bare(wheel: Path, folder: Path) -> None:
    """Without extras: the help, a network in Python, and a first command that names the extra that it needs."""
    python = make_environment(folder / "bare", str(wheel))
    run(python, "-m", "mpvg", "--help", cwd=folder)
    code = "import mpvg, torch; mpvg.fold(mpvg.create_model('vit_mini_patch4_28'))"
    run(python, "-c", code, cwd=folder)
    result = subprocess.run([python, "-m", "mpvg", *FIRST], cwd=folder, capture_output=True, text=True, check=False)
    print(result.stderr, end="")
    require(result.returncode == 2 and "pip install 'mpvg[" in result.stderr, "the first command names no extra")
    require(len(result.stderr.splitlines()) == 1, "the error is not one line")


def main() -> None:
    """Builds, checks and tries."""
    wheel, sdist = build()
    check_contents(wheel, sdist)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try_bare(wheel, folder)
        for extra in project["optional-dependencies"]:
            run(folder / "bare/bin/python", *PIP, "install", "-qq", "--dry-run", f"{wheel}[{extra}]")
        shutil.rmtree(folder / "bare")  # gigabytes
        python = make_environment(folder / "all", f"{wheel}[all]")
        run(python, "-m", "mpvg", *FIRST, cwd=folder)
    print(f"== checked: {wheel.name}, {sdist.name}")


if __name__ == "__main__":
    main()
