"""Workers of a study as an array of SLURM jobs, through submitit."""

import signal
from pathlib import Path
from typing import Any

from mpvg.models.own import Networks, networks, use_networks
from mpvg.study.folder import StudyFolder
from mpvg.study.runner import work
from mpvg.validation import shown

LOCAL = "local"
"""In place of SLURM's options: submitit's own processes on this machine, to try a study out."""


TIME_IS_NEARLY_UP = signal.SIGUSR2
"""The signal by which submitit is told so, 90 seconds ahead unless `signal_delay_s` says otherwise."""
MAX_REQUEUES = 1000
"""How often a job may run out of time; submitit's own limit of 3 is short for a study."""


class Worker:
    """What a job does; a job that runs out of time saves its run and is put back into the queue, where it continues.

    Args:
        known: the networks of the user's own that the process which submits it has imported.
    """

    def __init__(self, known: Networks | None = None) -> None:
        self.known = dict(known or {})

    def __call__(self, path: str) -> None:
        """Takes runs of the study in a folder until none is missing."""
        bypass, requeue = signal.getsignal(signal.SIGTERM), signal.getsignal(TIME_IS_NEARLY_UP)
        warned = False

        def stop(number: int, frame: Any) -> None:
            nonlocal warned
            warned = True
            signal.raise_signal(signal.SIGTERM)  # which training takes for: finish the step and save

        def end(number: int, frame: Any) -> None:  # between two runs, where there is nothing to save
            raise KeyboardInterrupt

        signal.signal(TIME_IS_NEARLY_UP, stop)
        signal.signal(signal.SIGTERM, end)
        try:
            use_networks(self.known)
            work(Path(path))
        except KeyboardInterrupt:
            if warned and callable(requeue):
                signal.signal(signal.SIGTERM, bypass)  # SLURM sends it to a job that is queued again
                requeue(TIME_IS_NEARLY_UP, None)
            raise

    def checkpoint(self, path: str) -> Any:
        """What submitit queues again."""
        import submitit

        return submitit.helpers.DelayedSubmission(self, path)


def parse_options(text: str) -> dict[str, Any]:
    """SLURM's options from "partition=gpu,time=120"; `local` has none.

    Raises:
        ValueError: it is not of this form.
    """
    options: dict[str, Any] = {}
    for part in () if text == LOCAL else text.split(","):
        name, equals, value = part.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"--slurm has {shown(part)}; allowed: NAME=VALUE,... as sbatch names them, or {LOCAL}")
        options[name] = int(value) if value.isdecimal() else value
        if name == "time" and not isinstance(options[name], int):
            raise ValueError(f"--slurm has {shown(part)}; allowed: a whole number of minutes")
    return options


def submit(folder: StudyFolder, options: str, workers: int) -> list[Any]:
    """Submits an array of workers and returns their jobs; logs are in DIR/slurm.

    Args:
        folder: of the study, on a file system that every node sees.
        options: see `parse_options`.
        workers: jobs that may run at once.

    Raises:
        ModuleNotFoundError: submitit is not installed.
        ValueError: this machine has no SLURM, or an option is unknown, or `time` is missing.
    """
    import submitit

    given = parse_options(options)
    logs = folder.path / "slurm"
    local = options == LOCAL
    if not local and submitit.SlurmExecutor.affinity() <= 0:
        raise ValueError(
            "this machine has no SLURM (srun was not found); submit from a login node, or leave --slurm out"
        )
    if not local and "time" not in given:
        raise ValueError("--slurm lacks time=MINUTES of each job; a job that needs longer is queued again")
    kind: Any = submitit.LocalExecutor if local else submitit.SlurmExecutor
    executor = kind(logs, max_num_timeout=MAX_REQUEUES)
    try:
        executor.update_parameters(
            **given, **({"array_parallelism": workers} if not local else {"timeout_min": 60 * 24})
        )
    except (TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]  # then come all names that there are, one a line
        raise ValueError(
            f"--slurm {shown(options)} is refused by submitit ({reason}); give sbatch's names with _ for -"
        ) from error
    jobs: list[Any] = executor.map_array(Worker(networks(folder.model_names())), [str(folder.path.resolve())] * workers)
    return jobs
