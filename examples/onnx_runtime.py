"""Names what is in images with an exported network: ONNX Runtime, Pillow and numpy alone.

mpvg export RUN --format onnx --out EXPORT
python onnx_runtime.py EXPORT IMAGE...
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def prepare(path: str, values: dict) -> np.ndarray:
    """An image file as the network's input, (channels, height, width), float32, as preprocess.json says."""
    try:
        image = Image.open(path)
        image.load()
    except OSError as error:
        sys.exit(f"{path} cannot be read ({error})")
    if values["orientation"] == "exif":
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        sys.exit(f"{path} has more than 8 bits; this script reads 8-bit images only, `mpvg predict` reads all")
    image = image.convert("L" if values["channels"] == 1 else "RGB")
    how = Image.Resampling[values["interpolation"].upper()]
    if values["resize"] == "square":
        image = image.resize((values["resize_to"],) * 2, how)
    else:
        width, height = image.size
        short = min(width, height)
        image = image.resize((values["resize_to"] * width // short, values["resize_to"] * height // short), how)
    if values["crop"] is not None:
        side = values["crop"]
        left, top = round((image.width - side) / 2), round((image.height - side) / 2)
        image = image.crop((left, top, left + side, top + side))
    pixels = np.asarray(image, np.float32).reshape(image.height, image.width, values["channels"]).transpose(2, 0, 1)
    if values["mean_image"] is not None:
        pixels = pixels - np.asarray(values["mean_image"], np.float32).reshape(pixels.shape)
    mean, std = (np.asarray(values[name], np.float32)[:, None, None] for name in ("mean", "std"))
    return ((pixels / 255 - mean) / std).astype(np.float32)


def main(folder: str, images: list[str]) -> None:
    """Prints the most probable class of each image."""
    values = json.loads((Path(folder) / "preprocess.json").read_text())
    network = onnxruntime.InferenceSession(str(Path(folder) / values["file"]), providers=["CPUExecutionProvider"])
    for path in images:
        (logits,) = network.run(None, {network.get_inputs()[0].name: prepare(path, values)[None]})
        shares = np.exp(logits[0] - logits[0].max())
        shares /= shares.sum()
        best = int(shares.argmax())
        print(f"{path}: {values['class_names'][best]} {100 * shares[best]:.2f} %")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2:])
