"""COCO's average precision (AP) of boxes and masks, computed by faster-coco-eval, which agrees with pycocotools."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mpvg.data.annotations import ImageAnnotations
from mpvg.data.coco import NO_OBJECT
from mpvg.tasks.task import NO_IMAGE

KINDS = {"box": "bbox", "mask": "segm"}
"""What is compared -> its name in COCO."""
THRESHOLDS = ("ap", "ap50", "ap75")
"""Over intersection over union .5 to .95, at .5 and at .75: the first numbers of COCO's summary."""


def evaluator() -> Any:
    """faster-coco-eval.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    try:
        import faster_coco_eval
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"the metrics of detection need faster-coco-eval ({error}); pip install 'mpvg[det]'"
        ) from error
    return faster_coco_eval


def truth_record(truth: ImageAnnotations, category_ids: Sequence[int]) -> dict[str, Any]:
    """An annotated image with its objects, as COCO's JSON has them."""
    size = [truth.height, truth.width]
    boxes = truth.boxes.copy()
    boxes[:, 2:] -= boxes[:, :2]
    objects = zip(boxes.tolist(), truth.labels.tolist(), truth.areas.tolist(), truth.crowd, strict=True)
    return {
        "image": {"id": truth.image_id, "height": truth.height, "width": truth.width},
        "annotations": [
            {
                "image_id": truth.image_id,
                "category_id": category_ids[label],
                "bbox": box,
                "area": area,
                "iscrowd": int(crowd),
                "segmentation": {"size": size, "counts": counts},
            }
            for (box, label, area, crowd), counts in zip(objects, truth.run_lengths(), strict=True)
        ],
    }


def dataset(truths: Sequence[Mapping[str, Any]], category_ids: Sequence[int]) -> dict[str, Any]:
    """Images of `truth_record` as one file of COCO, in the order of their ids."""
    ordered = sorted(truths, key=lambda truth: int(truth["image"]["id"]))
    annotations = [one for truth in ordered for one in truth["annotations"]]
    return {
        "images": [truth["image"] for truth in ordered],
        "annotations": [{**one, "id": number} for number, one in enumerate(annotations, 1)],
        "categories": [{"id": number, "name": str(number)} for number in category_ids],
    }


def check_objects(truths: Sequence[Mapping[str, Any]]) -> None:
    """Raises ValueError where there is no image of `truth_record`, or no object in them, so that there is no AP."""
    if not truths:
        raise ValueError(NO_IMAGE)
    if all(one["iscrowd"] for truth in truths for one in truth["annotations"]):
        raise ValueError(NO_OBJECT)


@dataclass(frozen=True)
class AveragePrecision:
    """What COCO's evaluation gives of boxes and masks."""

    metrics: dict[str, float]
    """AP, AP50 and AP75, in [0, 1]: `box_ap`, `mask_ap50` and so on."""
    precision: Mapping[str, "npt.NDArray[np.float64]"]
    """Of "box" and "mask": (thresholds of the overlap, recalls, classes, areas, numbers of detections), with -1 where a
    class has no object."""
    recalls: Sequence[float]
    """From 0 to 1."""


def average_precision(
    truths: Sequence[Mapping[str, Any]], results: Sequence[Mapping[str, Any]], category_ids: Sequence[int]
) -> AveragePrecision:
    """COCO's evaluation of boxes and masks.

    Args:
        truths: images, from `truth_record`, each once.
        results: what was found in them, as COCO's results.
        category_ids: of all classes.

    Raises:
        ModuleNotFoundError: faster-coco-eval is not installed.
        ValueError: no object is annotated, so that there is no AP.
    """
    check_objects(truths)
    evaluations = {name: _evaluated(truths, results, category_ids, name) for name in KINDS}
    return AveragePrecision(
        metrics={
            f"{name}_{threshold}": float(value)
            for name, evaluation in evaluations.items()
            for threshold, value in zip(THRESHOLDS, evaluation.stats[: len(THRESHOLDS)], strict=True)
        },
        precision={name: evaluation.eval["precision"] for name, evaluation in evaluations.items()},
        recalls=evaluations["box"].params.recThrs.tolist(),
    )


def _evaluated(
    truths: Sequence[Mapping[str, Any]],
    results: Sequence[Mapping[str, Any]],
    category_ids: Sequence[int],
    name: str,
) -> Any:
    """COCO's evaluation of one of `KINDS`."""
    package, file = evaluator(), dataset(truths, category_ids)
    position = {image["id"]: number for number, image in enumerate(file["images"])}
    ordered = sorted(results, key=lambda result: position[result["image_id"]])
    truth = package.COCO(file, print_function=_silent)
    given = truth.loadRes([dict(result) for result in ordered])  # it writes into the records
    evaluation = package.COCOeval_faster(truth, given, KINDS[name], print_function=_silent)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation


def _silent(*_: Any) -> None:
    """In place of a function that prints."""
