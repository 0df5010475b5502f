"""The model card of a hub folder: what is known of a run's weights, and no more."""

from typing import Any

from mpvg.runs import Run
from mpvg.runs.checkpoints import Which
from mpvg.statistics import proportion_interval
from mpvg.tasks import task_class
from mpvg.tasks.task import EMA
from mpvg.validation import printable, shorten

_LISTED = 20  # classes; more are in config.json

_HOW_TO_LOAD = (
    "## How to load",
    "",
    "```python",
    "import timm, mpvg.models  # the import registers the networks with timm",
    "",
    'model = timm.create_model("local-dir:PATH", pretrained=True).eval()',
    "fast = mpvg.fold(model)  # for inference: the position embeddings become constants",
    "```",
    "",
    "With transformers:",
    "",
    "```python",
    "import mpvg.models",
    "from transformers import TimmWrapperForImageClassification",
    "",
    'model = TimmWrapperForImageClassification.from_pretrained("PATH")',
    "```",
    "",
    "`preprocess.json` says how an image is prepared.",
    "",
)


def model_card(run: Run, parameters: int, *, which: Which, ema: bool) -> str:
    """The text of README.md.

    Args:
        run: where the weights come from.
        parameters: how many the network has.
        which: the checkpoint that they are of.
        ema: whether they are the averaged ones.
    """
    config, info = run.config, run.info
    method = config.method if isinstance(config.method, str) else "a method of its own, in config.json"
    size = f"{info.in_chans} x {info.img_size} x {info.img_size}"
    names = [f"`{_plain(name)}`" for name in info.class_names[:_LISTED]]
    rest = f" and {info.num_classes - _LISTED} more, in config.json" if info.num_classes > _LISTED else ""
    weights = f"the {'averaged ' if ema else ''}weights of the {'best' if which == 'best' else 'last'} checkpoint"
    return "\n".join(
        [
            "---",
            "library_name: timm",
            "pipeline_tag: image-classification",
            "tags:",
            "- image-classification",
            "- timm",
            "- mpvg",
            "---",
            "",
            f"# {config.model}, method {method}",
            "",
            f"An image classifier with {parameters:,} parameters and layer-wise position embeddings, trained with",
            f"[mpvg](https://arxiv.org/abs/2502.02919): {weights}.",
            "",
            *_HOW_TO_LOAD,
            "## Data",
            "",
            f"`{_plain(info.name)}`: {info.train_size:,} training and {info.val_size:,} validation images, as {size}.",
            f"Classes: {', '.join(names)}{rest}.",
            "",
            "## Training",
            "",
            f"Recipe `{_plain(config.recipe)}`, {config.epochs} epochs, {config.batch_size} images a step, "
            f"{config.optim.name} with a peak learning rate of {config.lr:g}, seed {config.seed}.",
            "",
            "## Metrics",
            "",
            *_metrics(run, which, ema=ema),
            "",
            "## Limits",
            "",
            "One seed on one data set. Images of another kind than the training images were not tested.",
            "",
            "## Licence",
            "",
            "The code is Apache-2.0. Nothing was said of the weights: add a line `license:` above, and mind the terms",
            "of the data.",
            "",
        ]
    )


def _metrics(run: Run, which: Which, *, ema: bool) -> list[str]:
    """A table of the metrics of the epoch that the weights are of."""
    task = task_class(run.config.task)
    if (line := run.recorded(which)) is None:
        return ["None: the weights were saved within an epoch."]
    prefix = EMA if ema else ""
    rows = []
    for key, metric in task.metrics.items():
        value = line.get(f"{prefix}{key}")
        if value is None:
            continue
        interval = "unknown"
        if metric.percent and run.info.val_size > 0 and 0 <= value <= 1:
            low, high = proportion_interval(value, run.info.val_size)
            interval = f"{metric.format(low)} to {metric.format(high)}"
        rows.append(f"| {metric.title} | {metric.format(value)} | {interval} |")
    best = which == "best"
    selected = ", an epoch that was selected on this set, so the numbers are a little too good" if best else ""
    return [
        f"On the {run.info.val_size:,} validation images after epoch {line['epoch']} of {run.config.epochs}{selected}.",
        "The intervals are 95 % over images, not over seeds.",
        "",
        "| metric | value | interval |",
        "|---|---|---|",
        *rows,
    ]


def _plain(text: Any) -> str:
    """A name of others inside backquotes."""
    return shorten(printable(str(text))).replace("`", "'")
