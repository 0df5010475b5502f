"""A study that takes a second: two methods on 64 digits, one epoch."""

import json
from pathlib import Path
from typing import Any

TEXT = """
study: mini
question: Does it run?
reference: gap
margins: {nll: 0.02, accuracy: 0.01}
arms:
  gap: {label: GAP, set: {method: gap}}
  pvg: {label: PVG, set: {method: pvg}}
  gap_again: {label: GAP again, set: {method: gap}, first_seed: 1000}
contrasts:
  pvg_over_gap: {weights: {pvg: 1, gap: -1}, claim: PVG is better than GAP.}
  again: {weights: {gap_again: 1, gap: -1}}
scales:
  tiny:
    digits: {label: digits, recipe: digits, set: {epochs: 1, batch_size: 700}, seeds: 2}
"""


def row_values(arm: str, seed: int, *, nll: float = 1.0, accuracy: float = 0.5, **more: Any) -> dict[str, Any]:
    """A row of the study above, as its JSON values, with the digest of the plan's config."""
    return {
        "format": 1,
        "study": "mini",
        "scale": "tiny",
        "setting": "digits",
        "arm": arm,
        "seed": seed,
        "status": "done",
        "digest": "2-000000000000",
        "metrics": {"nll": nll, "accuracy": accuracy},
        "best": {"accuracy": accuracy, "epoch": 1},
        "epochs": 1,
        "parameters": 100,
        "seconds": 1.0,
        "version": "0",
        "torch": "2",
        "hardware": "some",
        "threads": 1,
        "commit": "abc",
        "date": "2026-11-26T00:00:00+00:00",
        "run": f"runs/digits/{arm}/seed{seed}",
        "config": {},
    } | more


def write_ledger(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
