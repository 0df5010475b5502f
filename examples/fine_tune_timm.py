"""Fine-tunes a timm network with a delivered PE, from a file of its weights, on a folder of images.

python fine_tune_timm.py RUN [NAME WEIGHTS DATA]

DATA has train/ and val/ with one folder per class in each. Without NAME, a small ViT with random weights and drawn
images show that everything works, without a download.
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import mpvg
from mpvg import recipes, training


def make_inputs(folder: Path) -> tuple[str, Path, Path]:
    """Writes weights of a small timm network, and images of two classes: reddish or bluish noise."""
    name = "test_vit"  # timm's own, for tests
    network = timm.create_model(name)
    save_file(network.state_dict(), folder / "weights.safetensors")
    random = np.random.default_rng(0)
    for split, count in (("train", 32), ("val", 8)):
        for channel, label in ((0, "red"), (2, "blue")):
            (folder / "data" / split / label).mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 100, (160, 160, 3), dtype=np.uint8)
                pixels[..., channel] += 100
                Image.fromarray(pixels).save(folder / "data" / split / label / f"{number}.png")
    return name, folder / "weights.safetensors", folder / "data"


def main(out: Path, name: str, weights: Path, data: Path, epochs: int = 4) -> float:
    """Returns the accuracy on the validation images."""
    # start="preserve": the outputs are those of the original at first, and every LN' learns from the first step.
    original = timm.create_model(name, checkpoint_path=str(weights)).eval()
    converted = mpvg.convert(original, "mpvg", start="preserve")
    size = original.pretrained_cfg["input_size"]
    with torch.no_grad():
        images = torch.randn(2, *size)
        print(f"largest difference before training: {(converted(images) - original(images)).abs().max():.1e}")

    # A run names what it is made of, so that it can be loaded again: timm/NAME, and the file of weights.
    config = recipes.scale_schedule(recipes.recipe("finetune", str(data)), epochs)
    network = replace(config.network, init=str(weights), start="preserve", img_size=size[-1])
    config = replace(config, model=f"timm/{name}", method="mpvg", network=network, batch_size=16, out=str(out))
    config = replace(config, loader=replace(config.loader, workers=0), device="cpu", threads=1)
    accuracy = training.train(config)["accuracy"]
    print(f"accuracy: {100 * accuracy:.2f} %")
    return float(accuracy)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True)
    chosen = (sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4])) if len(sys.argv) > 2 else make_inputs(folder)
    main(folder / "run", *chosen)
