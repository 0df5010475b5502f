"""The rules that the whole project keeps; each checker is itself tested on a case that breaks its rule."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "mpvg"
SOURCES = sorted(PACKAGE.rglob("*.py"))

MAX_FILE_LINES = 350
MAX_FUNCTION_LINES = 60

# Import names of what only the extras install.
OPTIONAL = ["matplotlib", "plotly", "sklearn", "scipy", "faster_coco_eval", "pycocotools", "transformers"]
OPTIONAL += ["datasets", "simplejpeg", "gradio", "trackio", "wandb", "mlflow"]
OPTIONAL += ["statsmodels", "submitit", "onnx", "onnxscript", "onnxruntime", "openvino", "torchao"]
# What a module may import at its top although only an extra installs it; no other module may import such a module
# at its own top.
OWN_PACKAGES = {name: ["matplotlib"] for name in ("mpvg.figures", "mpvg.inference.charts", "mpvg.study.bars")}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = [module_name(path) for path in SOURCES]


def run_python(code: str) -> str:
    """Runs code in a new interpreter and returns all it printed; warnings are errors there too."""
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


def import_without(blocked: list[str], modules: list[str]) -> str:
    """Imports modules where the blocked packages look as if they were not installed.

    Before a module of `OWN_PACKAGES`, its packages are there again.
    """
    # None in sys.modules, not a finder that raises: libraries ask find_spec() whether a package is there.
    return run_python(
        f"import importlib, sys\nsys.modules.update(dict.fromkeys({blocked!r}))\nown = {OWN_PACKAGES!r}\n"
        f"for name in {modules!r}:\n"
        "    for package in own.get(name, []):\n        sys.modules.get(package) or sys.modules.pop(package, None)\n"
        "    importlib.import_module(name)"
    )


def test_modules_import_without_optional_packages_but_their_own_and_print_nothing() -> None:
    assert OWN_PACKAGES.keys() <= set(MODULES)
    others = [name for name in MODULES if name not in OWN_PACKAGES]
    assert import_without(OPTIONAL, [*others, *OWN_PACKAGES]) == ""


def test_blocking_a_package_blocks_it() -> None:
    with pytest.raises(AssertionError, match="import of matplotlib halted"):
        import_without(["matplotlib"], ["matplotlib"])


@pytest.mark.parametrize("name", ["mpvg", "mpvg.config", "mpvg.cli.main"])
def test_import_loads_no_heavy_package(name: str) -> None:
    code = f"import sys, {name}\nprint(sorted({{'torch', 'torchvision', 'timm', 'numpy', 'PIL'}} & set(sys.modules)))"
    assert run_python(code) == "[]\n"


def test_public_names_resolve() -> None:
    import mpvg

    assert mpvg.__all__
    for name in [*mpvg.__all__, "__version__"]:
        assert getattr(mpvg, name) is not None
        assert name in dir(mpvg)
    with pytest.raises(AttributeError, match=r"no attribute 'creat_model'; public names: .*create_model"):
        _ = mpvg.creat_model


def imported_packages(tree: ast.AST) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0] if node.level == 0 else "." * node.level)
    return names


def test_delivery_imports_torch_and_the_standard_library_only() -> None:
    files = sorted((PACKAGE / "delivery").glob("*.py"))
    assert len(files) > 1
    for file in files:
        assert imported_packages(ast.parse(file.read_text())) - sys.stdlib_module_names <= {"torch", "mpvg"}


def test_imported_packages_are_all_seen() -> None:
    tree = ast.parse("import numpy.linalg as la, json\ndef f():\n    from timm.layers import Mlp\n    from . import x")
    assert imported_packages(tree) == {"numpy", "json", "timm", "."}


def compared_strings(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every string constant that a comparison or a match tests against, with its line."""
    for node in ast.walk(tree):
        operands: list[ast.expr] = []
        if isinstance(node, ast.Compare):
            operands = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            operands = [node.value]
        while operands:
            operand = operands.pop()
            if isinstance(operand, ast.Tuple | ast.List | ast.Set):
                operands += operand.elts
            elif isinstance(operand, ast.Dict):
                operands += [key for key in operand.keys if key is not None]
            elif isinstance(operand, ast.Call) and isinstance(operand.func, ast.Name):
                operands += operand.args
            elif isinstance(operand, ast.Constant) and isinstance(operand.value, str):
                yield operand.value, operand.lineno


@pytest.mark.parametrize("path", SOURCES, ids=MODULES)
def test_no_method_name_is_compared_outside_delivery(path: Path) -> None:
    from mpvg.delivery import METHODS

    if PACKAGE / "delivery" not in path.parents:
        found = [(value, line) for value, line in compared_strings(ast.parse(path.read_text())) if value in METHODS]
        assert not found, f"a method is data; {module_name(path)} compares the names {found}"


@pytest.mark.parametrize(
    "code",
    [
        "if method == 'mpvg': pass",
        "x = 'mpvg' != method",
        "x = method in ('gap', 'mpvg')",
        "x = method in frozenset({'mpvg'})",
        "x = method in {'mpvg': 1}",
        "match method:\n    case 'pvg' | 'mpvg': pass",
        "match config:\n    case {'method': 'mpvg'}: pass",
    ],
)
def test_a_compared_method_name_is_found(code: str) -> None:
    assert "mpvg" in [value for value, _ in compared_strings(ast.parse(code))]


def test_a_method_name_that_is_not_compared_is_not_found() -> None:
    code = "def f(method='mpvg'): return table['mpvg'] > 3 and METHODS['mpvg'] == spec"
    assert not list(compared_strings(ast.parse(code)))


def too_long(source: str) -> Iterator[str]:
    """What in a file is longer than allowed."""
    if (lines := len(source.splitlines())) > MAX_FILE_LINES:
        yield f"the file: {lines} lines"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            if (lines := node.end_lineno - node.lineno + 1) > MAX_FUNCTION_LINES:
                yield f"{node.name}(): {lines} lines"


@pytest.mark.parametrize("path", SOURCES, ids=MODULES)
def test_source_is_short(path: Path) -> None:
    assert not list(too_long(path.read_text()))


def test_long_source_is_found() -> None:
    body = "    pass\n" * MAX_FUNCTION_LINES
    assert list(too_long(f"def f():\n{body}")) == [f"f(): {MAX_FUNCTION_LINES + 1} lines"]
    assert list(too_long("x = 1\n" * (MAX_FILE_LINES + 1))) == [f"the file: {MAX_FILE_LINES + 1} lines"]


def pins(text: str) -> dict[str, str]:
    """The versions that constraints name; refuses every line that is not an exact pin."""
    versions: dict[str, str] = {}
    for line in text.splitlines():
        if line.startswith("#"):
            continue
        pin = re.fullmatch(r"([A-Za-z0-9._-]+)==([0-9][0-9A-Za-z.]*)", line)
        assert pin, f"not an exact version without an address: {line!r}"
        name = canonicalize_name(pin[1])
        assert name not in versions, f"pinned twice: {name}"
        versions[name] = pin[2]
    return versions


def installed_requirements() -> list[Requirement]:
    """What `pip install .[dev]` asks for: the core, and the extras that dev reaches."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    requirements = []
    while wanted:
        requirement = Requirement(wanted.pop())
        if requirement.name == project["name"]:
            for extra in requirement.extras:
                wanted += project["optional-dependencies"][extra]
        else:
            requirements.append(requirement)
    return requirements


def test_constraints_pin_every_installed_requirement_within_its_bounds() -> None:
    versions = pins((ROOT / "constraints.txt").read_text())
    requirements = installed_requirements()
    assert {"torch", "scikit-learn", "pytest"} <= {requirement.name for requirement in requirements}
    for requirement in requirements:
        name = canonicalize_name(requirement.name)
        assert name in versions, f"{name} has no pin in constraints.txt"
        assert requirement.specifier.contains(versions[name]), f"{requirement} excludes the pin {versions[name]}"


def test_extras_install_only_what_some_module_imports() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    users = extras.keys() - {"all", "dev", "docs", "release"}
    assert extras["all"] == [f"mpvg[{','.join(sorted(users))}]"]
    code = "\n".join(path.read_text() for path in SOURCES)
    for name in users:
        for requirement in map(Requirement, extras[name]):
            module = {"scikit-learn": "sklearn"}.get(requirement.name, requirement.name.replace("-", "_"))
            assert re.search(rf"^\s*(?:import|from) {module}\b", code, flags=re.MULTILINE), f"{name}: {module}"


@pytest.mark.parametrize(
    "line", ["torch>=2.11", "torch==2.15.0+cu130", "torch @ file:/torch.whl", "-e .", "torch", "torch==2.*"]
)
def test_a_line_that_is_no_exact_pin_is_refused(line: str) -> None:
    with pytest.raises(AssertionError, match="not an exact version"):
        pins(line)


# No pattern matches its own spelling, so this file passes too.
ADDRESSES = [
    r"https?://[^\s\"']*(?:pypi|pythonhosted|/simple\b)",
    r"--(?:(?:extra-)?index-url|find-links|trusted-host)\b",
    r"file:/{2}",
    r"(?<![\w.~-])/(?:home|root|Users|opt|work)/\w",
]


def addresses(text: str) -> list[str]:
    """Registry addresses, and paths of the machine that a file was written on."""
    here = rf"{re.escape(str(ROOT))}(?![\w-])" if len(ROOT.parts) > 2 else r"(?!)"
    return [match[0] for pattern in [*ADDRESSES, here] for match in re.finditer(pattern, text)]


def project_files() -> list[Path]:
    """Files that are in git, or would be after `git add`; of an unpacked archive, all but the hidden ones."""
    if not (ROOT / ".git").exists():
        files = (path for path in ROOT.rglob("*") if path.is_file())
        return [path for path in files if not any(p.startswith(".") for p in path.relative_to(ROOT).parts)]
    # safe.directory: the checkout may belong to another user, as in a container.
    command = ["git", "-c", "safe.directory=*", "ls-files", "-co", "--exclude-standard", "-z"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    listing = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True, env=environment).stdout
    return [ROOT / name for name in listing.split("\0") if name and (ROOT / name).is_file()]


def test_no_file_names_a_registry_or_a_path_of_this_machine() -> None:
    files = project_files()
    assert ROOT / "pyproject.toml" in files
    found = {}
    for path in files:
        content = path.read_bytes()
        if b"\0" not in content and (hits := addresses(content.decode("utf-8", errors="replace"))):
            found[str(path.relative_to(ROOT))] = hits
    assert not found


@pytest.mark.parametrize(
    "parts",
    [
        ("https:/", "/py", "pi.org/project/mpvg"),
        ("http:/", "/mirror.example:8080/root/sim", "ple/"),
        ("pip install --index", "-url x"),
        ("pip install --extra-index", "-url x"),
        ("--find", "-links x"),
        ("fi", "le:/", "/x"),
        ("data in /ho", "me/me/data"),
        ("'/ro", "ot/data'"),
        (str(ROOT), "/runs"),
    ],
)
def test_an_address_is_found(parts: tuple[str, ...]) -> None:
    assert addresses("".join(parts))


@pytest.mark.parametrize("text", ["https://arxiv.org/abs/2502.02919", "runs/opt/a", "~/opt/x", "/usr/share/dict"])
def test_a_harmless_text_is_not_an_address(text: str) -> None:
    assert not addresses(text)
