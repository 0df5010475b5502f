"""The entry point: finds the verb, runs it, and turns errors into one line. A verb's module loads when it is used."""

import contextlib
import io
import os
import select
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module

from mpvg.cli.arguments import complain
from mpvg.validation import printable, unknown_name


@dataclass(frozen=True)
class Verb:
    """A verb of the command."""

    module: str
    """Module of `mpvg.cli` with a function named like the verb, with _ for -: arguments -> exit code."""
    help: str


VERBS = {
    "train": Verb("train", "train a network, or continue an interrupted run"),
    "evaluate": Verb("evaluate", "score a run's checkpoint on its validation set; --out shows its mistakes"),
    "predict": Verb("predict", "name what is in images: files, folders, globs"),
    "export": Verb("export", "a run's network as ONNX, torch.export, OpenVINO or a hub folder"),
    "inspect": Verb("networks", "parameters, FLOPs and which layer receives which position embedding"),
    "check-network": Verb("networks", "what a network of your own must do, checked"),
    "methods": Verb("networks", "the methods, as a table"),
    "models": Verb("catalog", "the networks, with size and cost"),
    "recipes": Verb("catalog", "the recipes, with data, network, epochs and what each is for"),
    "runs": Verb("runs", "list run folders, with their state"),
    "plot": Verb("runs", "draw the curves of several runs"),
    "analyze": Verb("analyze", "what position embeddings do inside runs: numbers, figures and report.html"),
    "explore": Verb("explore", "a page on which one changes what the layers receive, and sees the probabilities"),
    "readout": Verb("readout", "class token, mean or another read-out of a frozen network, on your data"),
    "resolutions": Verb("resolutions", "a run's accuracy at other image sizes, with three ways to resample the PE"),
    "compare": Verb("compare", "complete runs against one another: means, intervals, tests"),
    "study": Verb("study", "arms x networks x seeds, with registered questions; ends with tables and verdicts"),
    "replay": Verb("study", "run one line of a study's ledger again, and compare"),
    "demo": Verb("study", "train and compare a few methods; ends with a table and report.html"),
    "version": Verb("catalog", "the version"),
}


def usage() -> str:
    """The help text of the command."""
    verbs = "\n".join(f"  {name:14s} {verb.help}" for name, verb in VERBS.items())
    return (
        "usage: mpvg VERB [options]     mpvg VERB --help says more\n\n"
        f"{verbs}\n\n"
        "A first run:  mpvg train --data digits --method mpvg --epochs 2 --seed 0 --out RUN\n"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; an error of the user is one message and exit code 2, MPVG_TRACEBACK=1 shows where it came from."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    _prepare_streams()
    name = arguments[0].replace("--version", "version") if arguments else "--help"
    if name not in (*VERBS, "-h", "--help"):
        return _fail(unknown_name("verb", name, VERBS, near=1))
    try:
        code = 0
        if name in VERBS:
            run = getattr(import_module(f"mpvg.cli.{VERBS[name].module}"), name.replace("-", "_"))
            code = run(arguments[1:])
        else:
            print(usage(), end="")
        print(end="", flush=True)  # here, since what fails at the exit of Python is a traceback
        return code
    except KeyboardInterrupt as stop:  # training's own, `Interrupted`, says which step is saved
        again = "; continue with `mpvg train --resume RUN`" if name == "train" else ""
        print("\n" + printable(str(stop) or f"interrupted{again}"), file=sys.stderr)
        return getattr(stop, "exit_code", 130)
    except (Exception, SystemExit) as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads_output():
            return 141  # as of a program that SIGPIPE ends
        text = _one_line(error)
        if text is None or os.environ.get("MPVG_TRACEBACK"):
            raise
        return _fail(text)


def _nobody_reads_output() -> bool:
    """Whether stdout's reader, such as `head`, has seen enough; what is left to be written is then dropped."""
    state = select.poll()
    state.register(1, select.POLLERR)
    if not state.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return True


def _one_line(error: BaseException) -> str | None:
    """An error of the user, or of a network of the user's own, as a message; None: another error."""
    own = sys.modules.get("mpvg.models.own")  # loaded, with torch, wherever somebody has named a network
    if own is not None and (text := own.network_error(error)):
        return str(text)
    if isinstance(error, OSError) and error.strerror and not error.filename:
        return error.strerror
    if isinstance(error, ModuleNotFoundError):
        return f"{error}; optional packages come with: pip install 'mpvg[all]'"
    return str(error) if isinstance(error, (ValueError, OSError)) else None


def _prepare_streams() -> None:
    """Gives a process whose streams were closed others, and lets a terminal that is not UTF-8 show names escaped."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(OSError):  # its file was exchanged for a pipe, which has no position to keep
                stream.reconfigure(errors="backslashreplace")


def _fail(message: str) -> int:
    complain(f"error: {message}")
    return 2
