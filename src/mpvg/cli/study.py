"""`mpvg study`, `replay`, `compare` and `demo`: several runs compared."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpvg.cli.arguments import Parser, positive, print_table, say
from mpvg.cli.own import add_model, use_models
from mpvg.config.names import is_reference, same_network

if TYPE_CHECKING:
    from mpvg.study.folder import StudyFolder
    from mpvg.study.plan import Study


def demo(arguments: list[str]) -> int:
    """Trains and compares a few methods."""
    parser = Parser(prog="mpvg demo", description="Trains and compares a few methods on real images.")
    parser.add_argument("--data", default="digits", choices=("digits", "fashion-mnist"))
    parser.add_argument("--out", default="demo", help="folder of the runs and of report.html (default: demo)")
    given = parser.parse_args(arguments)
    from mpvg.study import demo

    demo.demo(given.data, Path(given.out))
    return 0


def study(arguments: list[str]) -> int:
    """Runs a study, or continues it."""
    parser = Parser(
        prog="mpvg study",
        description="Runs what a study lacks: arms x settings x seeds. Ends with tables, tests and a picture in --out. "
        "The same command continues an interrupted study.",
    )
    parser.add_argument(
        "study",
        nargs="?",
        help="a ready study, a YAML file, or a study's folder, which goes on; without it: a list",
    )
    parser.add_argument("--out", help="folder of the study (default: studies/<study>-<scale>)")
    parser.add_argument(
        "--scale",
        help="tiny: digits, or scenes and grids of them, minutes to some hours on two cores; small: hours; paper: "
        "GPUs; --dry_run says how long (default: the first it has)",
    )
    parser.add_argument("--seeds", type=positive, help="repetitions of each arm (default: the study's)")
    parser.add_argument("--data", help="data in place of every setting's own")
    parser.add_argument(
        "--workers", type=positive, help="processes, or jobs with --slurm (default: one for each core or GPU)"
    )
    parser.add_argument(
        "--slurm", metavar="OPTIONS", help="submit an array of workers: partition=gpu,time=120,...; or local"
    )
    parser.add_argument("--pilot", action="store_true", help="eight seeds, then only their spread and the seeds needed")
    parser.add_argument(
        "--dry_run", action="store_true", help="print the runs, the hours here and what they can decide"
    )
    parser.add_argument("--print", action="store_true", help="print the study as YAML, to change it")
    add_model(parser, "a network of your own that the study names; if it names none, in place of every setting's")
    given = parser.parse_args(arguments)
    from mpvg.study import plan

    if given.study is None:
        return _list_studies()
    chosen = _read(given)
    if given.print:
        return _print(plan.to_dict(chosen))
    scale = given.scale or next(iter(chosen.scales))
    from mpvg.study import folder as folders
    from mpvg.study.slurm import LOCAL

    out = Path(given.out or f"studies/{chosen.name}-{scale}")
    model = _use_models(given.model, folders.StudyFolder(out, chosen, scale, data=given.data))
    planned = folders.StudyFolder(out, chosen, scale, given.seeds, given.data, model)
    if given.dry_run:
        return _dry_run(planned)
    from mpvg.study.contrasts import PILOT_SEEDS

    seeds = min(PILOT_SEEDS, given.seeds or PILOT_SEEDS) if given.pilot else given.seeds
    if given.slurm in (None, LOCAL) and not (out / folders.STUDY).exists():  # other hosts have their own data
        planned.check_data()
    made = folders.make_folder(out, chosen, scale, seeds=seeds, data=given.data, model=model)
    for (setting, arm), reason in made.refused.items():
        say(f"arm {arm} is left out of {setting}: {reason}")
    if not _run(made, given.slurm, given.workers, blind=given.pilot):
        return 0
    return _pilot(made) if given.pilot else _finish(made)


def _read(given: argparse.Namespace) -> "Study":
    """The study that is named; of a folder, what it was begun with takes the place of what is not given."""
    from mpvg.study.plan import read_study, ready_studies

    if given.study in ready_studies() or not Path(given.study).is_dir():
        return read_study(given.study)
    from mpvg.study.folder import open_folder

    found = open_folder(Path(given.study))
    if given.out is not None and Path(given.out) != found.path:
        raise ValueError(f"--out is {given.out}, but the study in {found.path} goes on there; leave --out out")
    given.out, given.scale, given.data = given.out or found.path, given.scale or found.scale, given.data or found.data
    return found.study


def replay(arguments: list[str]) -> int:
    """Runs one row of a ledger again."""
    parser = Parser(prog="mpvg replay", description="Trains the run of one line of a ledger anew and compares.")
    parser.add_argument("ledger", help="ledger.jsonl of a study")
    parser.add_argument("--row", type=int, required=True, help="number of the line, from 1")
    parser.add_argument("--out", help="folder of the new run (default: a temporary one)")
    add_model(parser)
    given = parser.parse_args(arguments)
    import tempfile

    from mpvg.study.replay import choose_row, replay

    row, others = choose_row(Path(given.ledger), given.row)
    use_models(given.model, {f"row {given.row}": row.run_config().model})
    say(
        f"row {given.row}: {row.setting}, arm {row.arm}, seed {row.seed}; {row.epochs} epochs"
        + (f", {row.seconds:.0f} s then" if row.seconds else "")
    )
    with tempfile.TemporaryDirectory() as folder:
        found = replay(row, others, Path(given.out or f"{folder}/run"), Path(given.ledger).parent)
    say(*found.lines)
    return 0 if found.agrees else 1


def _print(study: dict[str, Any]) -> int:
    import yaml

    sys.stdout.write(yaml.safe_dump(study, sort_keys=False, allow_unicode=True, width=120))
    return 0


def _list_studies() -> int:
    from mpvg.study.plan import make_cells, read_study, ready_studies

    rows = [("study", "runs (tiny)", "scales", "question")]
    for name in ready_studies():
        found = read_study(name)
        runs = len(make_cells(found, "tiny", Path())) if "tiny" in found.scales else 0
        rows.append((name, str(runs or "-"), ", ".join(found.scales), found.question))
    print_table(rows, right=("runs (tiny)",))
    say("", "mpvg study NAME --out DIR runs one; --print shows it as YAML, to make your own")
    return 0


def _use_models(typed: Sequence[str], plan: "StudyFolder") -> str | None:
    """Imports the networks that are typed; returns the one that takes the place of every setting's, if there is one.

    Raises:
        ValueError: the study names another network of the user's own than is typed, or one that is not.
    """
    from mpvg.study.folder import STUDY, open_folder

    before = open_folder(plan.path).model if (plan.path / STUDY).exists() else None
    own = sorted({name for name in (*plan.model_names(), before or "") if is_reference(name)})
    for name in own:
        if not any(same_network(name, other) for other in typed):
            raise ValueError(
                f"the study {plan.study.name} has the network {name}, which is code that is only imported if you name "
                f"it yourself; add --model {shlex.quote(name)}" + (f" in place of {', '.join(typed)}" if typed else "")
            )
    if own or not typed:
        use_models(typed, {f"the study {plan.study.name}, {number}": name for number, name in enumerate(own, 1)})
        return before
    if len(typed) > 1:
        raise ValueError(f"--model is given {len(typed)} times, but the study names no network of your own; give one")
    use_models(typed, {"": typed[0]})
    return typed[0]


def _dry_run(folder: "StudyFolder") -> int:
    from mpvg.study.preview import preview

    say(*preview(folder))
    return 0


def _run(folder: "StudyFolder", slurm: str | None, workers: int | None, *, blind: bool) -> bool:
    """Does what is missing, or submits it; returns whether it has ended."""
    if slurm is None:
        from mpvg.study.runner import run_study

        run_study(folder, workers, blind=blind)
        return True
    from mpvg.study.slurm import LOCAL, submit

    jobs = submit(folder, slurm, workers or 1)
    logs = folder.path / "slurm"
    say(f"submitted {len(jobs)} jobs: {', '.join(str(job.job_id) for job in jobs)}; logs are in {logs}")
    if slurm != LOCAL:
        say("when they have ended, give the same command without --slurm: it does what is missing and ends as usual")
        return False
    for job in jobs:
        job.result()
    return True


def _pilot(folder: "StudyFolder") -> int:
    from mpvg.study.preview import describe_spread

    say(*describe_spread(folder), "next: the same command with --seeds N instead of --pilot; the pilot's runs count")
    return 0


def _finish(folder: "StudyFolder") -> int:
    from mpvg.study.results import collect
    from mpvg.study.tables import headline, write_results

    missing = len(folder.missing())
    results = collect(folder.study, folder.scale, folder.rows())
    written = write_results(results, folder.path)
    say(*headline(results))
    if missing:
        say(f"{missing} runs are missing: another command does them, or give the same command again")
    say("written: " + ", ".join(str(path) for path in written))
    return 0
