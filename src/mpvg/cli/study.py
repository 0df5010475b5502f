"""`mpvg demo`: several runs compared."""

from pathlib import Path

from mpvg.cli.arguments import Parser


def demo(arguments: list[str]) -> int:
    """Trains and compares a few methods."""
    parser = Parser(prog="mpvg demo", description="Trains and compares a few methods on real images.")
    parser.add_argument("--data", default="digits", choices=("digits", "fashion-mnist"))
    parser.add_argument("--out", default="demo", help="folder of the runs and of report.html (default: demo)")
    given = parser.parse_args(arguments)
    from mpvg.study import demo

    demo.demo(given.data, Path(given.out))
    return 0
