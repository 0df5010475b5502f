"""`mpvg evaluate` and `mpvg predict`: a run's weights on a validation set, and on images."""

from mpvg.cli.arguments import run_parser


def evaluate(arguments: list[str]) -> int:
    """Prints the metrics of a checkpoint."""
    parser = run_parser("evaluate", "Scores a run's checkpoint on every validation image once.")
    parser.add_argument("--data", help="another folder or data set with the same classes")
    given = parser.parse_args(arguments)
    import torch

    from mpvg import runs
    from mpvg.tasks import describe_metrics

    run = runs.load(given.run)
    device = torch.device("cuda" if torch.cuda.is_available() and run.config.device != "cpu" else "cpu")
    validation, task = run.validation(device, data=given.data), run.task()
    found = task.evaluate(run.model(given.checkpoint, ema=given.ema).to(device), validation)
    skipped = f", {validation.skipped} unreadable ones skipped" if validation.skipped else ""
    print(f"{given.run}: {', '.join(describe_metrics(task, found.metrics))} on {found.images} images{skipped}")
    return 0


def predict(arguments: list[str]) -> int:
    """Prints what a checkpoint says about images."""
    parser = run_parser("predict", "Prints the five most probable classes of each image.")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files")
    given = parser.parse_args(arguments)
    from mpvg import runs
    from mpvg.data import read_image

    run = runs.load(given.run)
    model, preprocess, task = run.model(given.checkpoint, ema=given.ema), run.preprocess(), run.task()
    for path in given.images:
        try:
            image = preprocess(read_image(path))
        except Exception as error:  # decoders of untrusted files raise all kinds of errors
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"image {path} cannot be read ({reason}); give an image file, such as a PNG") from error
        print(path)
        for line in task.predict(model, image[None])[0].lines():
            print(f"  {line}")
    return 0
