"""`mpvg explore`: a page on which one changes what the layers of a network receive."""

from mpvg.cli.arguments import Parser, add_weights, positive, say
from mpvg.cli.own import add_model, use_models_of_runs


def explore(arguments: list[str]) -> int:
    """Serves the page to this machine until Ctrl-C."""
    text = "A page for this machine only: one image, and what happens if layers receive another position embedding."
    parser = Parser(prog="mpvg explore", description=text)
    parser.add_argument("run", help="folder that `mpvg train` made")
    parser.add_argument("second", nargs="?", metavar="RUN", help="a second one, which is shown beside it")
    add_weights(parser, "last")
    parser.add_argument("--port", type=positive, help="of the page (default: the first free one from 7860 on)")
    add_model(parser, "a network of your own that runs were made with")
    given = parser.parse_args(arguments)
    names = [given.run] if given.second is None else [given.run, given.second]
    use_models_of_runs(given.model, names)
    from mpvg import runs
    from mpvg.analysis.explore import ExploredRun
    from mpvg.cli import explorer
    from mpvg.cli.evaluate import weights_text

    if given.port is not None:
        explorer.check_port(given.port)
    found = [runs.load(name) for name in names]
    explored = [ExploredRun(run, given.checkpoint, ema=given.ema) for run in found]
    for name, one in zip(names, explored, strict=True):
        say(f"{name}: {weights_text(one.run, given.checkpoint, ema=given.ema)}")
        if one.missing:
            say(f"{name}: no validation set, so images can only be uploaded: {one.missing}")
    with explorer.own_environment(), explorer.launched(explorer.build(explored, names), given.port) as address:
        say(f"open {address} in a browser of this machine; Ctrl-C ends it")
        explorer.wait()
    say("", "ended")
    return 0
