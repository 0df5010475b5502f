"""What a study will take and can decide, before it is run; and after its pilot, without a look at the arms' means."""

import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

from mpvg.data.loader import count_cores
from mpvg.study.contrasts import decidable, pooled_sd
from mpvg.study.folder import StudyFolder
from mpvg.study.plan import Cell
from mpvg.study.results import collect
from mpvg.training.planning import measure_hours


def preview(folder: StudyFolder) -> list[str]:
    """The runs of a study, the hours that they take on this machine, and what so many seeds can decide, in lines.

    Raises:
        ValueError: a config does not fit the data, the network or the hardware.
    """
    cells, rows = folder.cells(), folder.rows()
    done = {row.key for row in rows}
    lines = [f"{len(cells)} runs, {sum(cell.key in done for cell in cells)} of them done"]
    lines += [f"arm {arm} is left out of {setting}: {reason}" for (setting, arm), reason in folder.refused.items()]
    hours, cores = 0.0, count_cores()
    for setting in folder.study.settings(folder.scale):
        own = [cell for cell in cells if cell.setting == setting.name and cell.key not in done]
        arms = Counter(cell.arm for cell in own)
        if own:
            with tempfile.TemporaryDirectory() as out:
                each = _hours(own[0], Path(out))
            epochs = own[0].config.epochs
            hours += each * sum(cell.config.epochs for cell in own) / epochs
            lines.append(
                f"{setting.label}: {len(arms)} arms x {max(arms.values())} seeds, {60 * each:.2g} minutes a run of "
                f"{epochs} epochs"
            )
    lines.append(f"about {hours:.2g} hours of one worker, {hours / cores:.2g} with {cores} at a time")
    return lines + describe_spread(folder)


def _hours(cell: Cell, out: Path) -> float:
    """The hours of a run, with the one that comes first."""
    first = 0.0 if cell.pretrain is None else measure_hours(replace(cell.pretrain, out=str(out / "first")))
    network = replace(cell.config.network, init=None if cell.pretrain else cell.config.network.init)
    return first + measure_hours(replace(cell.config, network=network, out=str(out / "run")))


def describe_spread(folder: StudyFolder) -> list[str]:
    """The spread over the seeds so far, pooled over the arms, and the seeds that are needed; the means stay hidden."""
    results = collect(folder.study, folder.scale, folder.rows())
    lines = []
    planned = {setting.name: folder.seeds or setting.seeds for setting in folder.study.settings(folder.scale)}
    for setting in results.settings:
        for metric in folder.study.margins:
            samples = {arm.name: arm.values[metric] for arm in setting.arms if len(arm.values[metric]) > 1}
            if samples:
                text = decidable(folder.study, pooled_sd(samples), planned[setting.name], metric)
                lines.append(f"{setting.label}, {text}")
    return lines or ["what the seeds can decide depends on their spread, which is not known yet: --pilot measures it"]
