"""The folder of a study: what is planned, what is done, and who does what.

DIR/study.yaml     the study, its scale, and how many seeds
DIR/ledger.jsonl   one line for each finished run, see `ledger`
DIR/runs/<setting>/<arm>/seed<N>/
DIR/claims/        a locked file for each run that a worker is doing now
"""

import contextlib
import fcntl
import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from mpvg.config import RunConfig
from mpvg.data import DataInfo, open_listing
from mpvg.files import atomic_text, cannot_write, check_place, is_temporary, read_regular
from mpvg.models.meta import without_values
from mpvg.models.own import NotImportedError
from mpvg.runs.lock import closed_in_children
from mpvg.study.ledger import LEDGER, Key, Row, read_ledger
from mpvg.study.measures import check_measures, check_metrics
from mpvg.study.plan import MAX_BYTES, Cell, Study, make_cells, study_from, to_dict
from mpvg.tasks import create_task
from mpvg.validation import check, parse_yaml

STUDY = "study.yaml"
CLAIMS = "claims"


@dataclass(frozen=True)
class StudyFolder:
    """A study that is being run, or was."""

    path: Path
    study: Study
    scale: str
    seeds: int | None = None
    """Repetitions of each arm; None: as many as each setting says."""
    data: str | None = None
    """Data in place of each setting's own."""
    model: str | None = None
    """A network of the user's own in place of each setting's."""

    @property
    def ledger(self) -> Path:
        """The file of the finished runs."""
        return self.path / LEDGER

    @functools.cached_property
    def refused(self) -> dict[tuple[str, str], str]:
        """(setting, arm) -> why its network cannot run the arm.

        Raises:
            ValueError: a margin is for no metric.
        """
        found: dict[tuple[str, str], str] = {}
        for cell in self._planned(seeds=1):
            check_metrics(self.study.margins, cell.config.task)
            try:
                with without_values():
                    model = _build(cell.config)
                    check_measures(self.study.margins, model, cell.config)
                    if cell.pretrain is not None:
                        _build(cell.pretrain)
            except NotImportedError:
                raise
            except ValueError as error:
                found[cell.setting, cell.arm] = str(error)
        return found

    def cells(self) -> list[Cell]:
        """The runs of the study, without those that a network cannot do."""
        return [cell for cell in self._planned(self.seeds) if (cell.setting, cell.arm) not in self.refused]

    def model_names(self) -> list[str]:
        """The networks that the study names."""
        configs = [config for cell in self._planned(seeds=1) for config in (cell.config, cell.pretrain)]
        return sorted({config.model for config in configs if config is not None})

    def _planned(self, seeds: int | None) -> list[Cell]:
        """The runs of the plan, also those that a network cannot do."""
        return make_cells(self.study, self.scale, self.path, seeds=seeds, data=self.data, model=self.model)

    def check_data(self) -> None:
        """Opens the validation set of each data set, before anything is made.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it cannot be read.
        """
        cells = self._planned(seeds=1)
        configs = [cell.config for cell in cells] + [cell.pretrain for cell in cells if cell.pretrain is not None]
        for config in {(config.data, config.task, repr(config.loader)): config for config in configs}.values():
            open_listing(config, ("val",))

    def rows(self) -> list[Row]:
        """The finished runs.

        Raises:
            ValueError: the ledger is damaged, or a row is of another study or of another config than the plan's.
        """
        rows = read_ledger(self.ledger)
        planned = {cell.key: cell.config.digest() for cell in self._planned(self.seeds)}
        for number, row in enumerate(rows, 1):
            other = (row.study, row.scale) != (self.study.name, self.scale)
            if other or planned.get(row.key, row.digest) != row.digest:
                raise ValueError(
                    f"{self.ledger}, line {number}: arm {row.arm} in setting {row.setting} was run as {row.digest} of "
                    f"{row.study} at {row.scale}, but this plan of {self.study.name} at {self.scale} has "
                    f"{planned.get(row.key, 'no such run')}; give another --out, or the study that it was run with"
                )
        return rows

    def missing(self) -> list[Cell]:
        """The runs that are not finished."""
        done = {row.key for row in self.rows()}
        return [cell for cell in self.cells() if cell.key not in done]

    @contextlib.contextmanager
    def claim(self, key: Key) -> Iterator[bool]:
        """Tries to take a run for this process alone; it is free again when the process ends, however it does.

        Yields:
            Whether it is this process's.
        """
        file = self.path / CLAIMS / "{}.{}.seed{}".format(*key)
        try:
            file.parent.mkdir(exist_ok=True)
            number = os.open(file, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise cannot_write(file, error) from error
        try:
            try:
                fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            with closed_in_children(number):  # a loader worker would keep the run of a process that was killed
                yield True
            file.unlink(missing_ok=True)  # whoever waits for the old file finds the run in the ledger
        finally:
            os.close(number)


def _build(config: RunConfig) -> nn.Module:
    plain: dict[str, Any] = {"in_chans": 3, "mean": (0.5,) * 3, "std": (0.5,) * 3, "train_size": 1, "val_size": 1}
    size = config.network.img_size or 224  # a multiple of every patch and window
    names = tuple(map(str, range(10)))
    info = DataInfo(name=config.data, class_names=names, img_size=size, **plain)
    return create_task(config, info).build_model(init=False)


def make_folder(
    path: Path,
    study: Study,
    scale: str,
    *,
    seeds: int | None = None,
    data: str | None = None,
    model: str | None = None,
) -> StudyFolder:
    """Makes the folder of a study, or opens the one that is there to go on with it.

    Raises:
        OSError: it cannot be written.
        ValueError: it holds another study, or another scale, other data or another network of it.
    """
    study.settings(scale)
    check_place(path)
    folder = StudyFolder(path, study, scale, seeds, data, model)
    if (path / STUDY).exists():
        found = open_folder(path)
        for name in ("study", "scale", "data", "model"):
            if getattr(found, name) != getattr(folder, name):
                was, now = ((f.study.name if name == "study" else getattr(f, name)) for f in (found, folder))
                what = f"another {name} ({was}, now {now})" if was != now else "the study with other arms or settings"
                raise ValueError(f"{path} holds {what}; give another --out, or the study that it was made with")
        if seeds is None:
            return found
    elif path.exists() and not all(is_temporary(entry.name) for entry in path.iterdir()):
        raise ValueError(f"{path} is not empty and holds no study; give another --out")
    if not folder.cells():
        raise ValueError(f"no network can run an arm of {study.name}: {next(iter(folder.refused.values()))}")
    path.mkdir(parents=True, exist_ok=True)
    run = {"scale": scale, "seeds": seeds, "data": data} | ({} if model is None else {"model": model})
    values = {**to_dict(study), "run": run}
    atomic_text(path / STUDY, yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120))
    return folder


def open_folder(path: Path) -> StudyFolder:
    """Opens the folder of a study.

    Raises:
        FileNotFoundError: it holds none.
        ValueError: study.yaml is damaged.
    """
    file = path / STUDY
    try:
        content = read_regular(file, MAX_BYTES)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} holds no study: {STUDY} is missing; give a folder of `mpvg study`") from error
    try:
        values: Any = parse_yaml(content)
        run = values.pop("run") if isinstance(values, dict) and isinstance(values.get("run"), dict) else {}
        study = study_from(values)
        scale, seeds, data = str(run.get("scale")), run.get("seeds"), run.get("data")
        check("run.scale", scale, scale in study.scales, ", ".join(study.scales))
        check("run.seeds", seeds, seeds is None or (type(seeds) is int and 1 <= seeds <= 10_000), "a whole number >= 1")
        model = run.get("model")
        for name, value in (("data", data), ("model", model)):
            check(f"run.{name}", value, value is None or isinstance(value, str), "a text")
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    return StudyFolder(path, study, scale, seeds, data, model)
