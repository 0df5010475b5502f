"""Do timm's own tests of networks pass on ours?

    python benchmarks/timm_tests.py                                        # every network; an hour and 16 GB
    python benchmarks/timm_tests.py vit_mini_patch2_8 swin_mini_patch2_28  # a few seconds

It downloads timm's source distribution of exactly the installed version, which has the tests, and runs its
`tests/test_models.py` with our names in place of timm's. Nothing of it is kept. What does not apply is listed below
with the reason, and printed. Exit status: 0 if all that applies passes, 1 otherwise.
"""

import argparse
import subprocess
import sys
import tarfile
import tempfile
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import timm

from mpvg.models import model_names

EXCLUDED = (
    ("test_model_forward_torchscript", "*", "torch.jit.script is deprecated; use torch.export"),
    ("test_model_forward_fx_torchscript", "*t2t*", "torch.jit.script is deprecated; use torch.export"),
    ("test_model_features_space2depth_reduction", "*", "for the stem of EfficientNet-X and -H"),
    ("test_model_default_cfgs", "*vit*", "for maps of features; test_model_default_cfgs_non_std is for tokens"),
    ("test_model_default_cfgs", "*[dc]eit*", "for maps of features; test_model_default_cfgs_non_std is for tokens"),
    ("test_model_default_cfgs_non_std", "*swin*", "for tokens; test_model_default_cfgs is for maps of features"),
    ("test_model_forward_features", "*swin_mini*", "asks for three stages or more; this network has two"),
    ("test_model_forward_intermediates", "*swin_mini*", "asks for three stages or more; this network has two"),
)
"""Names of tests, patterns of networks to which they do not apply, and the reason."""


class Results:
    """A plugin of pytest that notes what passed and what failed, and leaves out what does not apply."""

    def __init__(self) -> None:
        self.passed: list[str] = []
        self.failed: dict[str, str] = {}
        self.excluded: list[str] = []

    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        """Keeps the tests of our networks."""
        kept = []
        for item in items:
            if "mpvg_" not in item.name:
                continue
            network = item.callspec.params["model_name"]
            reasons = [why for test, names, why in EXCLUDED if test == item.originalname and fnmatch(network, names)]
            if reasons:
                self.excluded.append(f"{item.name}: {reasons[0]}")
            else:
                kept.append(item)
        items[:] = kept

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Notes the outcome of a test."""
        if report.failed:
            self.failed[report.nodeid] = str(getattr(report.longrepr, "reprcrash", None) or report.longrepr)[:300]
        elif report.when == "call" and report.passed:
            self.passed.append(report.nodeid)


def main() -> int:
    """Runs the tests and prints what they say."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("networks", nargs="*", metavar="NAME", help="networks to test; without: all")
    names = [f"mpvg_{name}" for name in parser.parse_args().networks or model_names()]
    with tempfile.TemporaryDirectory() as folder:
        tests = download(Path(folder))
        results = Results()
        # timm chooses its networks by module and by filters that know nothing of ours.
        timm.list_models = lambda *args, **kwargs: [] if kwargs.get("pretrained") else names
        timm.list_pretrained = lambda *args, **kwargs: []
        pytest.main(["-q", "--no-header", "-p", "no:cacheprovider", str(tests / "test_models.py")], plugins=[results])
    print(f"timm {timm.__version__}: {len(results.passed)} passed, {len(results.failed)} failed")
    for line in results.excluded:
        print(f"  left out: {line}")
    for name, reason in results.failed.items():
        print(f"  failed: {name.rpartition('::')[2]}: {reason}")
    return int(bool(results.failed) or not results.passed)


def download(folder: Path) -> Path:
    """Downloads and unpacks timm's source distribution; returns its folder of tests."""
    what = ["--no-deps", "--no-binary", "timm", f"timm=={timm.__version__}", "-d", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", *what], check=True)
    with tarfile.open(next(folder.glob("timm-*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    return next(folder.glob("timm-*/tests"))


if __name__ == "__main__":
    sys.exit(main())
