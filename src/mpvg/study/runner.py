"""Runs a study: workers take the runs that the ledger lacks, one after another, until none is left.

Workers of one or several commands, on one or several machines with a common file system, share a study.
"""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from importlib import metadata
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from mpvg import runs, training
from mpvg.config import RunConfig
from mpvg.data.loader import count_cores
from mpvg.files import CHECKSUMS, read_regular
from mpvg.models.own import Networks, network_error, networks, use_networks
from mpvg.runs.checkpoints import checkpoint_folder
from mpvg.runs.environment import commit, hardware
from mpvg.runs.lock import RunLockedError
from mpvg.runs.reading import MAX_JSON_BYTES
from mpvg.study.folder import StudyFolder, open_folder
from mpvg.study.ledger import Row, append_row, check_finite, config_differences, read_ledger
from mpvg.study.measures import measure
from mpvg.study.plan import Cell
from mpvg.tasks import task_class
from mpvg.training.starting import with_init_file
from mpvg.validation import parse_json, printable

POLL_SECONDS = 0.5
PRELOADED = ["mpvg.study.runner", "mpvg.training", "mpvg.tasks.classification"]
"""What every worker imports, in some seconds."""


def work(path: Path) -> None:
    """Takes runs of a study until all that are missing are done, or being done by others.

    Raises:
        RunLockedError: another process writes a run; the others are done.
        As `mpvg.training.train`, without NonFiniteLoss: a run that diverges is a row of the ledger.
    """
    folder, locked = open_folder(path), None
    for cell in folder.missing():
        with folder.claim(cell.key) as mine:
            if mine and all(row.key != cell.key for row in read_ledger(folder.ledger)):
                try:
                    append_row(folder.ledger, run_cell(folder, cell))
                except RunLockedError as error:
                    locked = error
    if locked:
        raise locked


def run_cell(folder: StudyFolder, cell: Cell) -> Row:
    """Trains or continues one run and returns its row."""
    config, out = cell.config, Path(cell.config.out)
    values: dict[str, Any] = {"status": "done"}
    try:
        started = config
        if cell.pretrain is not None:
            _train_or_resume(cell.pretrain)
            # The row names the folder below the study's, so that a copy of the study has the same digests.
            started = replace(config, network=replace(config.network, init=cell.pretrain.out))
        summary = _train_or_resume(with_init_file(started))
        values |= _of_summary(summary, config.task)
        values["metrics"] |= measure(out, folder.study.margins)
        check_finite(out, values["metrics"], "leave it out of the study's margins")
        values["weights"] = weights_hash(out)
    except training.NonFiniteLoss as error:
        values = {"status": "diverged", "reason": str(error)}
    info = runs.load(out if (out / "config.yaml").is_file() else Path((cell.pretrain or config).out)).info
    return Row(
        study=folder.study.name,
        scale=folder.scale,
        setting=cell.setting,
        arm=cell.arm,
        seed=config.seed,
        digest=config.digest(),
        train_hash=info.train_hash,
        val_hash=info.val_hash,
        epochs=config.epochs,
        version=metadata.version("mpvg"),
        torch=torch.__version__,
        hardware=hardware(),
        threads=config.threads,
        commit=commit(),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        run=cell.folder,
        config=config_differences(config),
        **values,
    )


def _train_or_resume(config: RunConfig) -> dict[str, Any]:
    """Trains a run, or what is missing of it, and returns its summary."""
    out = Path(config.out)
    if not (out / "config.yaml").is_file():
        return training.train(config, quiet=True)
    if not runs.load(out).is_of(config.digest()):
        raise ValueError(f"{out} holds a run with another config than this plan's; remove it, or give another --out")
    return training.resume(out, quiet=True)


def weights_hash(run: Path) -> str:
    """SHA-256 of the weights of a run's last checkpoint."""
    checksums = parse_json(read_regular(checkpoint_folder(run, "last") / CHECKSUMS, MAX_JSON_BYTES))
    return str(checksums["model.safetensors"])


def _of_summary(summary: dict[str, Any], task: str) -> dict[str, Any]:
    kind = task_class(task)
    return {
        "metrics": {name: summary[name] for name in kind.summarized},
        "best": {kind.best: summary[f"best_{kind.best}"], "epoch": summary["best_epoch"]},
        "parameters": summary["parameters"],
        "seconds": summary["seconds"],
    }


def run_study(folder: StudyFolder, workers: int | None = None, *, blind: bool = False) -> None:
    """Does what is missing, with worker processes on this machine.

    Args:
        folder: of the study.
        workers: processes; None: one for each GPU where runs may use one, else one for each core.
        blind: do not show what comes out of the runs.

    Raises:
        KeyboardInterrupt: a signal; every run is saved.
        ValueError: a worker failed; the others have saved their runs.
    """
    missing = folder.missing()
    if not missing:
        return
    gpus = torch.cuda.device_count() if any(cell.config.device != "cpu" for cell in missing) else 0
    devices = visible_devices(gpus)
    count = min(workers or gpus or count_cores(), len(missing))
    context = _fresh_processes()
    errors = context.SimpleQueue()
    processes = [
        context.Process(
            target=_worker,
            args=(folder.path, errors, devices[number % gpus] if gpus else None, networks(folder.model_names())),
        )
        for number in range(count)
    ]
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"{len(missing)} of {len(folder.cells())} runs are missing; {count} at a time", markup=False)
    with _signals_to(processes) as received:
        for process in processes:
            process.start()
        _watch(folder, processes, console, lambda: bool(received) or not errors.empty(), blind)
        if not errors.empty():
            raise ValueError(errors.get())
        if received:
            raise Stopped(received[0], folder)
    killed = [process.exitcode for process in processes if process.exitcode]
    if killed and folder.missing():
        code = killed[0]
        what = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        raise ValueError(
            f"a worker {what}, perhaps for memory, and {len(folder.missing())} runs are missing; what was done is "
            "kept: give the same command again, with fewer --workers if memory was short"
        )


class Stopped(KeyboardInterrupt):
    """A signal stopped a study; the runs in progress are saved."""

    def __init__(self, number: int, folder: StudyFolder) -> None:
        super().__init__(f"stopped; every run is saved, give the same command again to continue {folder.path}")
        self.exit_code = 128 + number


def _fresh_processes() -> SpawnContext | ForkServerContext:
    """Processes that hold nothing of this one, since CUDA does not survive a fork.

    On Linux they are forked from one that has done nothing but the imports; elsewhere each imports everything again, as
    macOS's libraries do not all survive a fork.
    """
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def visible_devices(count: int) -> list[str]:
    """The first GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them: numbers or identifiers."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [name.strip() for name in given.split(",")][:count] if given else list(map(str, range(count)))


def _worker(path: Path, errors: Any, gpu: str | None, known: Networks) -> None:
    """A worker process; `known`: the networks of the user's own that the process which started it has imported."""
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        use_networks(known)
        work(path)
    except KeyboardInterrupt as stop:
        sys.exit(getattr(stop, "exit_code", 130))
    except Exception as error:
        text = network_error(error)
        if text is None and not isinstance(error, (OSError, ValueError, ModuleNotFoundError)):
            raise
        errors.put(text or str(error))
        sys.exit(2)


def _end_with_parent() -> None:
    """Ends a worker, whose run is saved first, when the process that started it is gone."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def _signals_to(processes: Sequence[BaseProcess]) -> Iterator[list[int]]:
    """Hands signals that end a process on to the workers, and waits for them at the end; yields what was received."""
    received: list[int] = []

    def pass_on(number: int, _: Any) -> None:
        received.append(number)

    previous = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield received
    finally:
        for process in processes:
            if process.is_alive():
                os.kill(process.pid or 0, signal.SIGTERM)
        for process in processes:
            if process.pid is not None:
                process.join()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _watch(
    folder: StudyFolder, processes: Sequence[BaseProcess], console: Console, stops: Callable[[], bool], blind: bool
) -> None:
    """Shows what is done until the workers end."""
    cells = folder.cells()
    seen = {row.key for row in read_ledger(folder.ledger)}
    with Progress(console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("runs", total=len(cells), completed=len(seen))
        running = True
        while running and not stops():
            running = any(process.is_alive() for process in processes)
            if running:
                time.sleep(POLL_SECONDS)
            for row in read_ledger(folder.ledger):
                if row.key not in seen:
                    seen.add(row.key)
                    result = "" if blind else f"  {describe(row)}"
                    text = f"{len(seen)}/{len(cells)} done  {row.setting}  {row.arm}  seed {row.seed}{result}"
                    progress.console.print(printable(text), markup=False)
            progress.update(bar, completed=len(seen))


def describe(row: Row) -> str:
    """What came out of a run, in a few words."""
    return "  ".join(f"{name} {value:.4f}" for name, value in row.metrics.items()) or row.status
