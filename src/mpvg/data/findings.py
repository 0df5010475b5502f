"""What is found to be wrong with the annotations of a split: counted, named, and refused or left out."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mpvg.data.rules import say_once
from mpvg.validation import shorten

_Bools = npt.NDArray[np.bool_]


class Findings:
    """Collects problems of one file; each record counts once, for the first that it has.

    Args:
        where: what messages call the file.
        strict: whether what is refused is refused, or left out like the rest.
    """

    def __init__(self, where: str, *, strict: bool) -> None:
        self._where, self._strict = where, strict
        self._refused, self._left_out = list[str](), list[str]()

    def refuse(self, what: str, problem: str, good: _Bools, bad: _Bools, names: "Sequence[Any] | Any") -> _Bools:
        """Counts records with a problem for which a data set is refused.

        Args:
            what: a record is.
            problem: verb and object, of one record.
            good: records that are good so far, (N,).
            bad: records with the problem, (N,).
            names: of the records.

        Returns:
            Those that are still good.
        """
        if len(found := np.flatnonzero(good & bad)):
            listed = self._refused if self._strict else self._left_out
            listed.append(f"{_count(len(found), what, problem)} (the first: {shorten(str(names[found[0]]))})")
        return good & ~bad

    def leave_out(self, what: str, problem: str, good: _Bools, bad: _Bools) -> _Bools:
        """Counts records that are left out in any case; see `refuse`."""
        if count := int((good & bad).sum()):
            self._left_out.append(_count(count, what, problem))
        return good & ~bad

    def report(self) -> None:
        """Says, once in a process, what is left out.

        Raises:
            ValueError: something is refused.
        """
        if self._refused:
            cure = "mend the data, or leave these out with --loader.skip_corrupt true"
            raise ValueError(f"{self._where}: {'; '.join(self._refused)}; {cure}")
        if self._left_out:
            say_once(f"{self._where}: left out: {'; '.join(self._left_out)}")


def _count(number: int, what: str, problem: str) -> str:
    verb, _, rest = problem.partition(" ")
    if number > 1:
        what, verb = f"{what}s", {"has": "have", "is": "are", "belongs": "belong"}[verb]
    return f"{number:,} {what} {verb} {rest}"
