"""Lines that a job of a run with [save] or [validation] writes between the steps. In: text. Out: a `Mark` for each.

ftgen: clock 2026-11-26T07:52:36+00:00 at the start
ftgen: resumed after step 26: /…/checkpoints/step_26
ftgen: clock 2026-11-26T07:53:02+00:00 after step 26
ftgen: saved step 30 in 0.36 s: checkpoints/step_30, 0.005 GiB
ftgen: validation after step 50: loss 4.950499 over 20 sequences in 0.18 s
ftgen: clock 2026-11-26T07:53:27+00:00 at the end
"""

import re
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import NamedTuple

from ftgen.logs.step import number

WORD = b"ftgen: "
LINE = re.compile(
    rb"ftgen: (?:"
    rb"clock (?P<time>20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00) (?:(?P<start>at the start)|at the end|after step \d{1,9})|"
    rb"resumed after step (?P<resumed>\d{1,9}): |"
    rb"saved step (?P<saved>\d{1,9}) in (?P<save_s>\d{1,9}\.\d\d) s: |"
    rb"validation after step (?P<validated>\d{1,9}): loss (?P<loss>[-+.\da-z]{1,30}) over )"
)


Mark = Mapping[str, bytes | None]  # what one line says, by the names of the groups of LINE


class Attempt(NamedTuple):
    """One attempt of a run."""

    began: datetime
    ended: datetime  # the last time that it wrote
    resumed: int = 0  # steps that earlier attempts had made; 0: it began with the first one


class History:
    """All attempts of a run, with their saves and validations.

    Steps are counted from 1: `saved step 30` comes behind step 29 of the step lines.
    """

    def __init__(self, marks: Iterable[Mark] = ()) -> None:
        self.attempts: list[Attempt] = []
        self.saves: list[tuple[int, float]] = []  # step, seconds
        self.validations: dict[int, float] = {}  # loss by step
        for mark in marks:
            time = moment(mark["time"] or b"")
            if mark["start"] and time:
                self.attempts.append(Attempt(time, time))
            elif time and self.attempts:
                self.attempts[-1] = self.attempts[-1]._replace(ended=time)
            elif mark["resumed"] and self.attempts:
                self.attempts[-1] = self.attempts[-1]._replace(resumed=int(mark["resumed"]))
            elif mark["saved"] and mark["save_s"]:
                self.saves.append((int(mark["saved"]), float(mark["save_s"])))
            elif mark["validated"] and (loss := number(mark["loss"])) is not None:
                self.validations[int(mark["validated"])] = loss

    @property
    def interruptions(self) -> frozenset[int]:
        """Numbers, from 0, of the steps that come directly after a save, a validation or a resume: they take longer."""
        resumed = {attempt.resumed for attempt in self.attempts if attempt.resumed}
        return frozenset({step for step, _ in self.saves} | self.validations.keys() | resumed)


def find(text: bytes) -> list[Mark]:
    """The marks of a text, in its order."""
    return [line.groupdict() for line in LINE.finditer(text)] if text.rfind(WORD) >= 0 else []


def moment(text: bytes) -> datetime | None:
    """The date and time that the text is; None for the 31st of June."""
    try:
        return datetime.fromisoformat(text.decode())
    except ValueError:
        return None
