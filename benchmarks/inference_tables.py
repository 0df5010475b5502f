"""Rewrites the tables of docs/inference.md and README.md from the records of `benchmarks/inference.py`.

python benchmarks/inference_tables.py
"""

import json
from pathlib import Path
from typing import Any

from mpvg.files import atomic_text

ROOT = Path(__file__).parents[1]
NETWORKS = {
    "deit_tiny_patch16_224": "DeiT-Ti",
    "deit_small_patch16_224": "DeiT-S",
    "swin_tiny_patch4_window7_224": "Swin-Ti",
}
METHODS = ("default", "gap", "mpvg", "folded mpvg", "timm", "transformers")
LABELS = {
    "eager": "PyTorch",
    "compiled": "PyTorch, torch.compile",
    "aotinductor": "PyTorch, AOTInductor",
    "onnx": "ONNX Runtime",
    "openvino": "OpenVINO",
    "int8": "ONNX Runtime, 8 bits",
}


def place(part: str) -> Path:
    return ROOT / "benchmarks" / "records" / f"inference-{part}.json"


def read(part: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(place(part).read_text())
    return record


def spread(values: dict[str, float]) -> str:
    return f"{values['median']:.3f} ({values['low']:.3f} to {values['high']:.3f})"


def origin(part: str) -> str:
    """The command of a part; where and when it was run, with the record."""
    command = f"`python benchmarks/inference.py {part}`"
    if not place(part).exists():
        return f"Not measured yet: {command}."
    where, link = read(part)["environment"], f"[record](../benchmarks/records/{place(part).name})"
    return f"{command}, one thread, {where['hardware']}, commit {where['commit']}, {where['date'][:10]}, {link}."


def markdown(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def speed_table() -> str:
    """Runtimes against PyTorch eager, and folded MPVG against GAP in each: the table of the README."""
    cost = {row["group"]: row for row in read("free")["results"] if row["variant"] == "folded mpvg"}
    found = {row["variant"]: row for row in read("runtimes")["results"]}
    rows = []
    for runtime in LABELS:
        row, ratio = found.get(runtime), cost.get(runtime)
        ms = f"{row['ms']:.1f}" if row else f"{read('runtimes')['eager_ms']:.1f}"
        speed = "1" if row is None else f"{1 / row['cpu']['median']:.2f}"
        free = "-" if ratio is None else "discarded" if ratio["discarded"] else spread(ratio["cpu"])
        rows.append([LABELS[runtime], ms, speed, free])
    return markdown(["runtime", "ms an image", "speed", "folded MPVG / GAP, CPU time"], rows)


def network_tables() -> str:
    """Milliseconds of a batch, for each network and batch size that was measured."""
    texts = []
    for batch in (1, 32):
        part = f"batch-{batch}"
        results = read(part)["results"] if place(part).exists() else []
        for name, label in NETWORKS.items():
            found = {row["variant"]: row for row in results if row["group"] == name}
            if found:
                texts += [_network_heading(label, batch, found), markdown(["", *LABELS], _network_rows(found))]
        texts.append(origin(part))
    return "\n\n".join(texts)


def _network_heading(label: str, batch: int, found: dict[str, Any]) -> str:
    control, share = found["gap, eager again"], found["gap, eager"]["share_of_matrix_rate"]
    text = f"{label}, batch {batch}: milliseconds a batch. A/A {spread(control['cpu'])}"
    if control["discarded"]:
        text += f", which is off ({', '.join(control['discarded'])}): differences of some percent mean nothing"
    return f"{text}. GAP in PyTorch has {100 * share:.0f} % of the rate of a large matrix product."


def _network_rows(found: dict[str, Any]) -> list[list[str]]:
    rows = []
    for method in METHODS:
        cells = [found.get(f"{method}, {runtime}") for runtime in LABELS]
        if any(cells):
            rows.append([method, *(f"{cell['ms']:.1f}" if cell else "-" for cell in cells)])
    return rows


def size_table() -> str:
    """Milliseconds and ratios over image sizes."""
    rows = []
    for size in (224, 384, 512, 768, 1024):
        found = {row["variant"]: row for row in read("sizes")["results"] if row["group"] == f"{size} pixels"}
        ms = [f"{found[key]['ms']:.1f}" for key in ("gap, eager", "folded mpvg, onnx", "folded mpvg, openvino")]
        ratios = [spread(found[key]["cpu"]) for key in ("folded mpvg, eager", "mpvg, eager", "gap, eager again")]
        rows.append([str(size), *ms, *ratios])
    head = ["pixels", "GAP, PyTorch, ms", "folded MPVG, ONNX Runtime, ms", "folded MPVG, OpenVINO, ms"]
    return markdown([*head, "folded MPVG / GAP, PyTorch", "MPVG / GAP", "A/A"], rows)


def tables() -> dict[Path, dict[str, str]]:
    """File -> what stands between its markers `<!-- name -->` and `<!-- /name -->`."""
    page = {
        "speed": f"{speed_table()}\n\n{origin('runtimes')}\n{origin('free')}",
        "networks": network_tables(),
        "sizes": f"{size_table()}\n\n{origin('sizes')}" if place("sizes").exists() else origin("sizes"),
    }
    return {ROOT / "docs" / "inference.md": page, ROOT / "README.md": {"speed": speed_table()}}


def rewritten(text: str, parts: dict[str, str]) -> str:
    """A page with its tables."""
    for name, content in parts.items():
        start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        head, rest = text.split(start)
        text = f"{head}{start}\n{content}\n{end}{rest.split(end)[1]}"
    return text


def main() -> None:
    for file, parts in tables().items():
        atomic_text(file, rewritten(file.read_text("utf-8"), parts))


if __name__ == "__main__":
    main()
