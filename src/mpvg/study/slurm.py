"""Workers of a study as an array of SLURM jobs, through submitit."""

from pathlib import Path
from typing import Any

from mpvg.study.folder import StudyFolder
from mpvg.study.runner import work
from mpvg.validation import shown

LOCAL = "local"
"""In place of SLURM's options: submitit's own processes on this machine, to try a study out."""


class Worker:
    """What a job does; a job that runs out of time is put back into the queue, and its run continues."""

    def __call__(self, path: str) -> None:
        """Takes runs of the study in a folder until none is missing."""
        work(Path(path))

    def checkpoint(self, path: str) -> Any:
        """What submitit queues again when the time is up: a run continues from its last checkpoint."""
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
            raise ValueError(f"--slurm has {shown(part)}; allowed: NAME=VALUE,... as submitit names them, or {LOCAL}")
        options[name] = int(value) if value.isdecimal() else value
    return options


def submit(folder: StudyFolder, options: str, workers: int) -> list[Any]:
    """Submits an array of workers and returns their jobs; logs are in DIR/slurm.

    Args:
        folder: of the study, on a file system that every node sees.
        options: see `parse_options`.
        workers: jobs that may run at once.

    Raises:
        ModuleNotFoundError: submitit is not installed.
        ValueError: this machine has no SLURM, or an option is unknown.
    """
    import submitit

    given = parse_options(options)
    logs = folder.path / "slurm"
    local = options == LOCAL
    if not local and submitit.SlurmExecutor.affinity() <= 0:
        raise ValueError(
            "this machine has no SLURM (srun was not found); submit from a login node, or leave --slurm out"
        )
    executor: Any = submitit.LocalExecutor(logs) if local else submitit.SlurmExecutor(logs)
    try:
        executor.update_parameters(
            **given, **({"array_parallelism": workers} if not local else {"timeout_min": 60 * 24})
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"--slurm {shown(options)} is refused by submitit ({error})") from error
    jobs: list[Any] = executor.map_array(Worker(), [str(folder.path.resolve())] * workers)
    return jobs
