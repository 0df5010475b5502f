"""Trains a small network on scans of digits, evaluates it, and asks it what is in new images.

python first_run.py RUN
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch

import mpvg
from mpvg import data, recipes, training


def main(out: Path, epochs: int = 25) -> list[str]:
    """Returns the most probable class of the first ten test images."""
    # A recipe is a complete config; scale_schedule keeps the shares of warm-up and cool-down.
    config = recipes.scale_schedule(recipes.recipe("digits"), epochs)
    config = replace(config, method="mpvg", seed=0, device="cpu", threads=1, out=str(out))
    print("\n".join(training.plan(config)))  # what it would train, before anything is written
    summary = training.train(config)
    print(f"accuracy after {summary['epochs']} epochs: {100 * summary['accuracy']:.2f} %")

    # The folder holds all that is needed to go on, in another program and on another day.
    run = mpvg.load(out)
    for which in ("last", "best"):
        found = run.task().evaluate(run.model(which), run.validation(torch.device("cpu")))
        print(f"{which} checkpoint: NLL {found.metrics['nll']:.4f} on {found.images} images")

    # A predictor takes files, PIL images and arrays, and prepares them as the validation images were.
    test = data.open_listing(config, ["val"]).val
    samples = [test.read(index) for index in range(10)]
    predictions = mpvg.Predictor(out, top=1).predict([sample.image for sample in samples])
    names = [prediction.classes[0][0] for prediction in predictions]
    print("seen:", *names)
    print("true:", *(run.info.class_names[sample.target] for sample in samples))
    return names


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
