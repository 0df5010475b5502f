"""What a detector finds in an image: as text, as COCO's results, and drawn."""

import json
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from mpvg.data.rle import encode_mask
from mpvg.data.scenes import to_pixels
from mpvg.models.dense.regions import paste_mask
from mpvg.overlays import palette

SHOWN = 0.3
"""Score from which on an object is named and drawn; the metrics count all."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Detections:
    """Objects in an image, the most certain first."""

    columns: ClassVar[tuple[str, ...]] = ("class", "score", "left", "top", "right", "bottom")
    height: int
    """Of the image whose pixels are meant."""
    width: int
    boxes: Tensor
    """Left, top, right, bottom in pixels, `(N, 4)`."""
    scores: Tensor
    """In [0, 1], `(N,)`."""
    labels: Tensor
    """Classes from 0 on, `(N,)`."""
    probabilities: Tensor
    """Of the pixels within each box to be inside the object, `(N, S, S)`."""
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    """Ids of the classes in COCO's results."""

    def resized(self, height: int, width: int) -> "Detections":
        """The same objects in the image at another size."""
        scale = self.boxes.new_tensor([width / self.width, height / self.height] * 2)
        return replace(self, height=height, width=width, boxes=self.boxes * scale)

    def masks(self) -> Tensor:
        """The pixels of each object, `(N, height, width)`, bool."""
        found = self.probabilities.new_zeros((len(self.boxes), self.height, self.width), dtype=torch.bool)
        for number, (mask, box) in enumerate(zip(self.probabilities, self.boxes.tolist(), strict=True)):
            found[number] = paste_mask(mask, box, self.height, self.width)
        return found

    def to_coco(self, image_id: int | str) -> list[dict[str, Any]]:
        """The objects as COCO's results, which are JSON: boxes with width and height, masks as run lengths."""
        # One mask at a time: a hundred of a photograph take half a gigabyte.
        results = []
        for number, (left, top, right, bottom) in enumerate(self.boxes.tolist()):
            mask = paste_mask(self.probabilities[number], (left, top, right, bottom), self.height, self.width)
            counts = encode_mask(mask.cpu().numpy()).decode("ascii")
            results.append(
                {
                    "image_id": image_id,
                    "category_id": self.category_ids[int(self.labels[number])],
                    "bbox": [left, top, right - left, bottom - top],
                    "score": float(self.scores[number]),
                    "segmentation": {"size": [self.height, self.width], "counts": counts},
                }
            )
        return results

    def file(self, image: str) -> tuple[str, bytes]:
        """COCO's results as JSON, in which the image is named."""
        return ".json", json.dumps(self.to_coco(image)).encode()

    def lines(self) -> list[str]:
        """One line for each object that is certain enough, and how many others there are."""
        shown, lines = self._shown(), []
        for score, label, box in zip(shown.scores, shown.labels, shown.boxes.tolist(), strict=True):
            left, top, right, bottom = map(round, box)
            name = self.class_names[int(label)]
            lines.append(f"{100 * float(score):6.2f} %  {name}, {left}, {top} to {right}, {bottom}")
        rest = len(self.scores) - len(lines)
        return [*lines, *([f"{rest} with a score below {100 * SHOWN:.0f} %"] if rest or not lines else [])]

    def rows(self) -> list[dict[str, Any]]:
        """One row for each object that is certain enough, with its box in pixels."""
        shown = self._shown()
        found = zip(shown.labels.tolist(), shown.scores.tolist(), shown.boxes.tolist(), strict=True)
        return [
            dict(zip(self.columns, (self.class_names[label], score, *box), strict=True)) for label, score, box in found
        ]

    def draw(self, image: Image.Image) -> Image.Image:
        """The image, in RGB and of `width` x `height` pixels, with the boxes, masks and names of certain objects."""
        shown, pixels = self._shown(), to_pixels(image).as_subclass(Tensor).to(torch.uint8)
        if len(shown.boxes):
            names = [
                f"{self.class_names[int(label)]} {100 * float(score):.0f}"
                for score, label in zip(shown.scores, shown.labels, strict=True)
            ]
            colors = [tuple(map(int, color)) for color in palette(len(names))]
            masks = shown.masks().cpu()
            # Of the most certain object: torchvision leaves pixels of several objects dark.
            masks &= masks.cumsum(dim=0) == 1
            pixels = draw_segmentation_masks(pixels, masks, alpha=0.5, colors=colors)
            pixels = draw_bounding_boxes(pixels, shown.boxes.cpu(), names, colors)
        drawn: Image.Image = functional.to_pil_image(pixels)
        return drawn

    def _shown(self) -> "Detections":
        """The objects that are certain enough."""
        kept = self.scores >= SHOWN
        parts = {name: getattr(self, name)[kept] for name in ("boxes", "scores", "labels", "probabilities")}
        return replace(self, **parts)
