"""`mpvg predict`: what a run's network says about images."""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from mpvg.cli.arguments import complain, positive, run_parser, say
from mpvg.cli.own import add_model, use_models_of_runs
from mpvg.files import check_output

if TYPE_CHECKING:
    from mpvg.inference.backends import Backend
    from mpvg.inference.predictor import Outcome
    from mpvg.inference.records import Record
    from mpvg.inference.sources import ImageFile

FORMATS = {"json": "one list", "jsonl": "one line for each image", "csv": "one line for each class or object"}


def predict(arguments: list[str]) -> int:
    """Prints what a checkpoint says about images; 1: some of them cannot be read."""
    given = _parse(arguments)
    from mpvg.inference.backends import open_backend
    from mpvg.inference.predictor import Predictor
    from mpvg.inference.records import open_records
    from mpvg.inference.sources import check_names, find_images
    from mpvg.runs.memory import evaluation_cure, memory_errors

    records = open_records({kind: getattr(given, kind) for kind in FORMATS})
    images = find_images(given.images)
    if given.out is not None:
        check_output(Path(given.out))
        check_names(images)
    use_models_of_runs(given.model, [given.run])
    backend = open_backend(given.run, given.checkpoint, ema=given.ema)
    predictor = Predictor(backend, batch_size=given.batch_size, top=given.top)
    _say_weights(given, backend)
    outcomes = predictor.stream((image.path for image in images), keep=given.out is not None)
    cure = evaluation_cure(f"a smaller --batch_size than {predictor.batch_size}, or smaller images")
    with memory_errors(cure):
        unread = _consume(outcomes, images, records, Path(given.out) if given.out is not None else None)
    names = [getattr(given, kind) for kind in FORMATS if getattr(given, kind) not in (None, "-")]
    if names:
        _tell(given, f"{len(images) - unread:,} images in {', '.join(names)}")
    if given.out is not None:
        _tell(given, f"drawn in {given.out}")
    return 1 if unread else 0


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = run_parser("predict", "Prints what is in each image: its most probable classes, or the objects.", "best")
    parser.add_argument("images", nargs="+", metavar="PATH", help="image files, folders at any depth, or quoted globs")
    parser.add_argument("--top", type=positive, metavar="K", help="classes that are named of each image (default: 5)")
    parser.add_argument("--batch_size", type=positive, help="images at once (default: 32; 1 for objects, label maps)")
    for name, what in FORMATS.items():
        parser.add_argument(f"--{name}", metavar="FILE", help=f"a new file for programs, {what}; -: standard output")
    parser.add_argument("--out", metavar="DIR", help="new folder for images with what was found, JSON or label maps")
    add_model(parser)
    return parser.parse_args(arguments)


def _tell(given: argparse.Namespace, line: str) -> None:
    """Prints a line; to stderr where standard output is for programs."""
    (complain if any(getattr(given, kind) == "-" for kind in FORMATS) else say)(line)


def _say_weights(given: argparse.Namespace, backend: "Backend") -> None:
    from mpvg.cli.evaluate import weights_text
    from mpvg.inference.backends import ExportBackend, RunBackend

    if isinstance(backend, RunBackend):
        _tell(given, f"{given.run}: {weights_text(backend.run, given.checkpoint, ema=given.ema)}")
    elif isinstance(backend, ExportBackend) and (origin := backend.origin()):
        _tell(given, f"{given.run}: {origin}")


def _consume(
    outcomes: "Iterator[Outcome]", images: "list[ImageFile]", records: "list[Record]", folder: Path | None
) -> int:
    """Writes and prints what is said, image by image; returns how many cannot be read.

    Raises:
        ValueError: no image can be read, or an argument does not fit the run.
        KeyboardInterrupt: naming how much is done; files are closed.
    """
    done, unread = 0, 0
    try:
        with ExitStack() as stack:
            for record in records:
                stack.enter_context(closing(record))
            advance = stack.enter_context(_progress(len(images), shown=bool(records) or not sys.stdout.isatty()))
            for outcome in outcomes:
                image = images[outcome.number]
                if outcome.error is not None:
                    unread += 1
                    if len(images) > 1:
                        complain(f"warning: {outcome.error}")
                _pass_on(outcome, image, records, folder)
                if outcome.error is not None and len(images) == 1:
                    raise outcome.error
                done += 1
                advance()
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted after {done:,} of {len(images):,} images; these are complete") from None
    if unread == len(images):
        raise ValueError(f"none of the {unread:,} images can be read; give image files, such as PNGs")
    if unread:
        complain(f"warning: {unread:,} of {len(images):,} images cannot be read; they are named above")
    return unread


def _pass_on(outcome: "Outcome", image: "ImageFile", records: "list[Record]", folder: Path | None) -> None:
    """Gives an outcome to whoever wants it; without files for programs, that is the terminal."""
    found = outcome.prediction if outcome.prediction is not None else outcome.error
    assert found is not None
    if folder is not None and outcome.prediction is not None:
        _draw(outcome, image, folder)
    for record in records:
        record.add(image.path, found)
    if not records and outcome.prediction is not None:
        say(image.path, *(f"  {line}" for line in outcome.prediction.lines()))


def _draw(outcome: "Outcome", image: "ImageFile", folder: Path) -> None:
    """Writes what was found in an image, drawn and as a file for programs, under the image's name."""
    from mpvg.files import atomic_write
    from mpvg.tasks import Placed

    found = outcome.prediction
    if not isinstance(found, Placed):
        raise ValueError(f"--out {folder}: this run says nothing about places in an image; leave it out")
    assert outcome.picture is not None
    content, base = BytesIO(), folder / image.name
    found.draw(outcome.picture).save(content, "PNG")
    ending, values = found.file(image.path)
    base.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(base.with_name(f"{base.name}.drawn.png"), content.getvalue())
    atomic_write(base.with_name(f"{base.name}{ending}"), values)


@contextmanager
def _progress(total: int, *, shown: bool) -> Iterator[Callable[[], None]]:
    """A bar on a terminal, where no other lines go there."""
    if not shown or not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(file=sys.stderr)) as bar:
        task = bar.add_task("images", total=total)
        yield lambda: bar.advance(task)
