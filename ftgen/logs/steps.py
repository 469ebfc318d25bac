"""The steps of a run. In: step lines, one by one or many at once. Out: `Step`s by number.

Of steps that were scanned many at once, number, loss and time are kept in arrays, and the lines themselves only of the last
few megabytes: the rest of a step is parsed when somebody asks for it. So the memory hardly grows with the log.
"""

from array import array
from bisect import bisect_left
from collections import deque
from collections.abc import Iterator, Mapping
from copy import copy

from ftgen.logs.formats import nemo
from ftgen.logs.step import Step, StepLine

KEPT = 4 << 20  # bytes of text, the last ones: the window is there


class Steps(Mapping[int, Step]):
    """Step by number, from 0, in ascending order."""

    def __init__(self, steps: Mapping[int, Step] | None = None) -> None:
        self._single = dict(steps or {})  # from lines that were parsed one by one
        self._of_bars: set[int] = set()
        self._counters: dict[int, int] = {}  # of bars, where they accumulate gradients
        self._numbers, self._losses, self._times = array("q"), array("d"), array("d")  # scanned, ascending
        self._texts: deque[tuple[int, int, bytes]] = (
            deque()
        )  # their lines, behind the places of the first and after the last
        self._known: dict[int, Step] = {}  # scanned steps that have been parsed, by their place
        self.last = max(self._single, default=-1)  # the highest number; -1 where there is no step

    def __repr__(self) -> str:
        return f"Steps({self.between(0, self.last + 1)})"

    def __len__(self) -> int:
        return len(self._numbers) + sum(self._place(number) is None for number in self._single)

    def __iter__(self) -> Iterator[int]:
        if not self._single:
            return iter(self._numbers)
        return iter(sorted({*self._single, *self._numbers}))

    def __contains__(self, number: object) -> bool:
        return number in self._single or (isinstance(number, int) and self._place(number) is not None)

    def __getitem__(self, number: int) -> Step:
        found = self.between(number, number + 1)
        if number not in found:
            raise KeyError(number)
        return found[number]

    @property
    def planned(self) -> int | None:
        """Steps of the whole run, as the last step says."""
        return self[self.last].planned if self.last in self else None

    def between(self, start: int, stop: int) -> dict[int, Step]:
        """The steps from `start` to before `stop` that are there, in ascending order, with all that their lines say."""
        first, last = bisect_left(self._numbers, start), bisect_left(self._numbers, stop)
        found = dict(zip(self._numbers[first:last], self._parsed(first, last), strict=True))
        single = {number: step for number, step in self._single.items() if start <= number < stop}
        return dict(sorted({**found, **single}.items())) if single else found

    def curve(self) -> Iterator[tuple[int, float | None, float | None]]:
        """Number, time in seconds and loss of every step, in ascending order."""
        for number in self:
            place = None if number in self._single else self._place(number)
            if place is None:
                yield number, self._single[number].time_s, self._single[number].loss
            else:
                yield number, self._times[place], self._losses[place]

    def __copy__(self) -> "Steps":
        """The same steps; one can be added to without the other."""
        other = Steps()
        vars(other).update({name: copy(value) for name, value in vars(self).items()})
        return other

    def add_scanned(self, text: bytes, scanned: nemo.Scanned) -> bool:
        """Take many steps at once; False, and nothing is taken, unless each step follows the one before it."""
        first, count = scanned.numbers[0], len(scanned.numbers)
        if first <= self.last or scanned.numbers != list(range(first, first + count)):
            return False
        self._texts.append((len(self._numbers), len(self._numbers) + count, text))
        while len(self._texts) > 1 and sum(len(text) for *_, text in self._texts) > KEPT:
            self._texts.popleft()
        self._numbers.extend(scanned.numbers)
        self._losses.extend(scanned.losses)
        self._times.extend(scanned.times_s)
        self.last = first + count - 1
        return True

    def add(self, line: StepLine, number: int) -> bool:
        """Take one line. Where several lines tell of a step, the slowest gives its time, and a line counts before a bar.

        True for a bar beyond the first of a step: with gradient accumulation no bar has the step's time.
        """
        before = self._single.get(number)
        if before is None and self._place(number) is not None:
            before = self[number]
        of_bar = number in self._of_bars
        if before is not None and line.bar and not of_bar:
            return False
        again = of_bar and line.counter is not None and self._counters.get(number, line.counter) != line.counter
        step = line.step if before is None or of_bar else _slower(before, line.step)
        self._single[number] = step._replace(time_s=None) if again else step
        (self._of_bars.add if line.bar else self._of_bars.discard)(number)
        if line.counter is not None:
            self._counters[number] = line.counter
        self.last = max(self.last, number)
        return again

    def cut(self, number: int) -> None:
        """Forget the steps from this one on: a resumed run makes them again."""
        place = bisect_left(self._numbers, number)
        self._parse(0, place)
        self._known = {each: step for each, step in self._known.items() if each < place}
        self._texts.clear()
        del self._numbers[place:], self._losses[place:], self._times[place:]
        self._single = {each: step for each, step in self._single.items() if each < number}
        self.last = max((*self._single, *self._numbers[-1:]), default=-1)

    def _place(self, number: int) -> int | None:
        """Where a scanned step is in the arrays."""
        place = bisect_left(self._numbers, number)
        return place if place < len(self._numbers) and self._numbers[place] == number else None

    def _parsed(self, first: int, last: int) -> Iterator[Step]:
        """The scanned steps from one place to before another; only number, time and loss of those whose lines are gone."""
        if not all(place in self._known for place in range(first, last)):
            self._parse(first, last)
        return (self._known.get(place) or Step(self._times[place], self._losses[place]) for place in range(first, last))

    def _parse(self, first: int, last: int) -> None:
        for start, end, text in self._texts:
            begin = max(first, start)
            if begin < min(last, end):
                lines = _last_lines(text, end - begin)[: last - begin]
                self._known |= {place: read.step for place, read in enumerate(map(nemo.parse, lines), begin) if read}


def _last_lines(text: bytes, count: int) -> list[bytes]:
    """So many step lines, the last ones in the text: most often these are few of many."""
    at = len(text)
    for _ in range(count):
        at = text.rfind(nemo.WORD, 0, at)
    lines = text[text.rfind(b"\n", 0, at) + 1 :].splitlines(keepends=True)
    return [line for line in lines if nemo.WORD in line]


def _slower(one: Step, other: Step) -> Step:
    """What both say, with the slower one's time."""
    times = [time_s for step in (one, other) for time_s in (step.time_s, step.fastest_s) if time_s]
    said = {name: value for name, value in other._asdict().items() if value is not None}
    return one._replace(**said)._replace(
        time_s=max(times, default=None),
        fastest_s=min(times, default=None),
        peak_memory=max(filter(None, (one.peak_memory, other.peak_memory)), default=None),
    )
