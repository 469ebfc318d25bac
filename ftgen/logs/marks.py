"""Lines that a job of a run with [save] or [validation] writes between the steps. In: text. Out: a `Mark` for each.

ftgen: clock 2026-11-26T07:52:36+00:00 at the start
ftgen: resumed after step 26: /…/checkpoints/step_26
ftgen: clock 2026-11-26T07:53:02+00:00 after step 26
ftgen: saved step 30 in 0.36 s: checkpoints/step_30, 0.005 GiB
ftgen: validation after step 50: loss 4.950499 over 20 sequences in 0.18 s
ftgen: clock 2026-11-26T07:53:27+00:00 at the end
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import NamedTuple

WORD = b"ftgen: "
LINE = re.compile(
    rb"ftgen: (?:"
    rb"clock (?P<time>20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00) (?:(?P<start>at the start)|at the end|after step \d{1,9})|"
    rb"resumed after step (?P<resumed>\d{1,9}): |"
    rb"saved step (?P<saved>\d{1,9}) in (?P<save_s>\d{1,9}\.\d\d) s: |"
    rb"validation after step (?P<validated>\d{1,9}): loss (?P<loss>[-+.\da-z]{1,30}) over )"
)


class Mark(NamedTuple):
    """What one line says. Steps are counted from 1: `saved step 30` comes behind step 29 of the step lines."""

    kind: str  # start, clock, resumed, saved, validated
    step: int = 0
    value: float = 0.0  # seconds of a save, loss of a validation
    time: datetime | None = None


@dataclass
class Attempt:
    """One attempt of a run."""

    began: datetime
    ended: datetime  # the last time that it wrote
    resumed: int = 0  # steps that earlier attempts had made; 0: it began with the first one


@dataclass
class History:
    """All attempts of a run, with their saves and validations."""

    attempts: list[Attempt] = field(default_factory=list)
    saves: list[tuple[int, float]] = field(default_factory=list)  # step, seconds
    validations: dict[int, float] = field(default_factory=dict)  # loss by step

    def take(self, text: bytes, start: int = 0, stop: int | None = None) -> None:
        """Take the lines of a part of a text."""
        for mark in find(text, start, len(text) if stop is None else stop):
            if mark.kind == "start" and mark.time:
                self.attempts.append(Attempt(mark.time, mark.time))
            elif mark.kind == "clock" and mark.time and self.attempts:
                self.attempts[-1].ended = mark.time
            elif mark.kind == "resumed" and self.attempts:
                self.attempts[-1].resumed = mark.step
            elif mark.kind == "saved":
                self.saves.append((mark.step, mark.value))
            elif mark.kind == "validated":
                self.validations[mark.step] = mark.value

    def __copy__(self) -> "History":
        """The same history; one can be added to without the other."""
        attempts = [Attempt(each.began, each.ended, each.resumed) for each in self.attempts]
        return History(attempts, [*self.saves], dict(self.validations))

    @property
    def interruptions(self) -> frozenset[int]:
        """Numbers, from 0, of the steps that come directly after a save, a validation or a resume: they take longer."""
        resumed = {attempt.resumed for attempt in self.attempts if attempt.resumed}
        return frozenset({step for step, _ in self.saves} | self.validations.keys() | resumed)


def find(text: bytes, start: int, stop: int) -> Iterator[Mark]:
    """The marks of a part of a text, in its order."""
    if text.find(WORD, start, stop) < 0:
        return
    for line in LINE.finditer(text, start, stop):
        if line["time"]:
            yield Mark("start" if line["start"] else "clock", time=datetime.fromisoformat(line["time"].decode()))
        elif line["resumed"]:
            yield Mark("resumed", int(line["resumed"]))
        elif line["saved"]:
            yield Mark("saved", int(line["saved"]), float(line["save_s"]))
        else:
            try:
                yield Mark("validated", int(line["validated"]), float(line["loss"]))
            except ValueError:  # no number
                continue
