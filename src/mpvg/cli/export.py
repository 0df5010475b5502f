"""`mpvg export`: a run's network for an application."""

import math
from typing import TYPE_CHECKING

from mpvg.cli.arguments import run_parser, say
from mpvg.cli.own import add_model, use_models_of_runs

if TYPE_CHECKING:
    from mpvg.inference.export import Report

FORMATS = ("onnx", "torch-export", "openvino", "hub-folder")


def export(arguments: list[str]) -> int:
    """Writes a network with its preprocessing, after comparing it with PyTorch."""
    parser = run_parser("export", "Writes a run's network for an application, compared with PyTorch.", "last")
    parser.add_argument("--format", required=True, metavar="FORMAT", help=", ".join(FORMATS))
    parser.add_argument("--out", required=True, help="a new folder")
    parser.add_argument("--int8", action="store_true", help="ONNX: 8-bit weights; prints the change of the accuracy")
    parser.add_argument(
        "--dynamic_size", action="store_true", help="images of any size, where the network can; it is not folded"
    )
    add_model(parser)
    given = parser.parse_args(arguments)
    use_models_of_runs(given.model, [given.run])
    from mpvg import runs
    from mpvg.cli.evaluate import weights_text
    from mpvg.inference.export import export_run

    run = runs.load(given.run)
    report = export_run(
        run,
        given.out,
        given.format,
        which=given.checkpoint,
        ema=given.ema,
        int8=given.int8,
        dynamic_size=given.dynamic_size,
    )
    say(f"{given.run}: {weights_text(run, given.checkpoint, ema=given.ema)}")
    say(*_lines(report, given.format))
    last, best = (run.recorded(which) for which in ("last", "best"))
    if given.checkpoint == "last" and best is not None and best != last:
        say(f"`mpvg predict {given.run}` uses the best weights unless told otherwise; --checkpoint best exports those")
    return 0


def _lines(report: "Report", kind: str) -> list[str]:
    """What is said of an export."""
    files = sorted(path for path in report.path.iterdir() if path.is_file())
    sizes = ", ".join(f"{path.name} {path.stat().st_size / 1e6:.2f} MB" for path in files)
    shapes = ", ".join(" x ".join(map(str, shape)) for shape in report.batches)
    lines = [
        f"{report.path}: {sizes}",
        f"largest difference to PyTorch: {report.difference:.1e} in a logit, on {report.images}, as {shapes}",
    ]
    if kind == "openvino":
        lines.append("OpenVINO ran with INFERENCE_PRECISION_HINT=f32; without it, it may compute in bfloat16")
    if report.int8 is not None:
        from mpvg.inference.quantization import int8_instruction

        relative, before, after = report.int8
        lines.append(
            f"int8: logits change by {relative:.3f} of the largest; this processor's instruction for 8-bit products: "
            f"{int8_instruction() or 'none, so the weights have 7 bits'}"
        )
        lines.append(
            "int8: the accuracy was not measured, because the validation set cannot be read"
            if math.isnan(before)
            else f"int8: accuracy {100 * before:.2f} % before, {100 * after:.2f} % after, on the validation set"
        )
    return lines
