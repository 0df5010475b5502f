"""`mpvg models`, `mpvg recipes` and `mpvg version`: what there is to choose from."""

import json
from importlib.resources import files

from mpvg.cli.arguments import Parser, print_table, say


def models(arguments: list[str]) -> int:
    """Lists the networks."""
    parser = Parser(prog="mpvg models", description="Lists the networks with their size and cost.")
    parser.parse_args(arguments)
    from mpvg.recipes import RECIPES

    recipes: dict[str, list[str]] = {}
    for name, recipe in RECIPES.items():
        recipes.setdefault(recipe().model, []).append(name)
    # Counted before: `python -m mpvg.analysis.networks` takes ten seconds, and loads torch.
    counted = json.loads((files("mpvg") / "models/sizes.json").read_text(encoding="utf-8"))
    rows = [("model", "image", "layers", "parameters", "GFLOPs", "recipes")]
    for name, found in counted.items():
        image = " x ".join(map(str, found["image"]))
        size = f"{found['parameters']:,}", f"{found['flops'] / 1e9:.2f}"
        rows.append((name, image, str(found["depth"]), *size, ", ".join(recipes.get(name, ["-"]))))
    print_table(rows, right=("layers", "parameters", "GFLOPs"))
    say("", "Counted with method mpvg and the head of its usual data; GFLOPs are of one image.")
    say("timm/<name> takes a vision transformer of timm, such as timm/vit_tiny_patch16_224.")
    return 0


def recipes(arguments: list[str]) -> int:
    """Lists the recipes."""
    parser = Parser(prog="mpvg recipes", description="Lists the recipes: complete configs, each for one kind of data.")
    parser.parse_args(arguments)
    from mpvg.recipes import RECIPES

    rows = [("recipe", "data", "model", "epochs", "batch", "what for")]
    for name, recipe in RECIPES.items():
        config = recipe()
        purpose = (recipe.__doc__ or "").splitlines()[0]
        rows.append((name, config.data, config.model, str(config.epochs), str(config.batch_size), purpose))
    print_table(rows, right=("epochs", "batch"))
    say("", "mpvg train --recipe RECIPE --print_config shows all of its values.")
    return 0


def version(arguments: list[str]) -> int:
    """Prints the version."""
    Parser(prog="mpvg version", description="Prints the version.").parse_args(arguments)
    import mpvg

    say(f"mpvg {mpvg.__version__}")
    return 0
