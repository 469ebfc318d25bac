"""The steps of a run. In: step lines, one by one or many at once. Out: `Step`s by number.

Of lines that were read at once, number, loss and time are kept in arrays, and the text only of the last steps:
the rest of a step is read when somebody asks for it. So the memory hardly grows with the log.
"""

from array import array
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from copy import copy
from functools import lru_cache
from heapq import merge
from operator import lt

from ftgen.logs.formats import nemo
from ftgen.logs.step import Step, StepLine

KEPT = 10_000  # lines, the last ones: the window is there
SPARSE = 4096  # bytes a step: where other lines take more room, they are not kept


class Steps(Mapping[int, Step]):
    """Step by number, from 0, in ascending order."""

    def __init__(self, steps: Mapping[int, Step] | None = None) -> None:
        self._whole = dict(steps or {})  # of lines that were read one by one, or have been asked for
        self._bars: dict[int, int | None] = {}  # steps of bars, with their counter where they accumulate gradients
        self._numbers, self._losses, self._times = array("q"), array("d"), array("d")  # of lines read at once, ascending
        self._texts: list[tuple[int, bytes]] = []  # with the lines of the last of these, each with the place of its first
        self.first = min(self._whole, default=-1)  # the lowest and the highest number; -1 where there is no step
        self.last = max(self._whole, default=-1)

    def __repr__(self) -> str:
        return f"Steps({self.between(0, self.last + 1)})"

    def __len__(self) -> int:
        return len(self._numbers) + len(self._others())

    def __bool__(self) -> bool:
        return self.last >= 0

    def __iter__(self) -> Iterator[int]:
        return merge(self._numbers, self._others())

    def __getitem__(self, number: int) -> Step:
        if number in self._whole:
            return self._whole[number]
        place = self._place(number)
        if place is None:
            raise KeyError(number)
        text = next(((first, text) for first, text in reversed(self._texts) if first <= place), None)
        read = nemo.parse(_step_lines(text[1])[place - text[0]]) if text else None
        if read is None:
            return Step(self._times[place], self._losses[place])
        self._whole[number] = read.step
        return read.step

    def __copy__(self) -> "Steps":
        """The same steps; one can be added to without the other."""
        other = Steps()
        vars(other).update({name: copy(value) for name, value in vars(self).items()})
        return other

    @property
    def planned(self) -> int | None:
        """Steps of the whole run, as the last step says."""
        return self[self.last].planned if self.last in self else None

    def between(self, start: int, stop: int) -> dict[int, Step]:
        """The steps from `start` to before `stop` that are there, in ascending order, with all that their lines say."""
        first, last = bisect_left(self._numbers, start), bisect_left(self._numbers, stop)
        whole = (number for number in self._whole if start <= number < stop)
        return {number: self[number] for number in sorted({*self._numbers[first:last], *whole})}

    def curve(self) -> Iterator[tuple[int, float | None, float | None]]:
        """Number, time in seconds and loss of every step, in ascending order."""
        for number in self:
            if step := self._whole.get(number):
                yield number, step.time_s, step.loss
            else:
                place = bisect_left(self._numbers, number)
                yield number, self._times[place], self._losses[place]

    def add_alike(self, alike: nemo.Alike) -> bool:
        """Take many lines at once; False, and nothing is taken, unless each step is after the one before it."""
        numbers = alike.numbers
        if numbers[0] <= self.last or not all(map(lt, numbers, numbers[1:])):
            return False
        sparse = len(alike.text) > SPARSE * len(numbers)
        self._texts.append((len(self._numbers), b"".join(_step_lines(alike.text)) if sparse else alike.text))
        self._numbers.extend(numbers)
        self._losses.extend(alike.losses)
        self._times.extend(alike.times_s)
        while len(self._texts) > 1 and len(self._numbers) - self._texts[1][0] >= KEPT:
            del self._texts[0]
        self.first = self.first if self else numbers[0]
        self.last = numbers[-1]
        return True

    def add(self, line: StepLine, number: int) -> bool:
        """Take one line. Where several lines tell of a step, the slowest gives its time, and a line counts before a bar.

        True for a bar beyond the first of a step: with gradient accumulation no bar has the step's time.
        """
        before, of_bar = self.get(number), number in self._bars
        if before and line.bar and not of_bar:
            return False
        counter = self._bars.pop(number, None)
        again = None not in {counter, line.counter} and counter != line.counter
        step = _slower(before, line.step) if before and not of_bar else line.step
        self._whole[number] = step._replace(time_s=None) if again else step
        if line.bar:
            self._bars[number] = counter if line.counter is None else line.counter
        self.first = min(self.first, number) if self else number
        self.last = max(self.last, number)
        return again

    def cut(self, number: int) -> None:
        """Forget the steps from this one on: a resumed run makes them again."""
        place = bisect_left(self._numbers, number)
        self._texts = [(first, text) for first, text in self._texts if first < place]
        del self._numbers[place:], self._losses[place:], self._times[place:]
        self._whole = {each: step for each, step in self._whole.items() if each < number}
        self.last = max((*self._whole, *self._numbers[-1:]), default=-1)
        self.first = self.first if self else -1

    def _place(self, number: int) -> int | None:
        """Where a step is in the arrays."""
        place = bisect_left(self._numbers, number)
        return place if place < len(self._numbers) and self._numbers[place] == number else None

    def _others(self) -> list[int]:
        """Numbers of the steps that are not in the arrays."""
        return [number for number in sorted(self._whole) if self._place(number) is None]


@lru_cache(maxsize=1)  # it is asked for one line after the other
def _step_lines(text: bytes) -> list[bytes]:
    return [line for line in text.splitlines(keepends=True) if nemo.WORD in line]


def _slower(one: Step, other: Step) -> Step:
    """What both say, with the slower one's time."""
    times = [time_s for step in (one, other) for time_s in (step.time_s, step.fastest_s) if time_s]
    said = {name: value for name, value in other._asdict().items() if value is not None}
    return one._replace(**said)._replace(
        time_s=max(times, default=None),
        fastest_s=min(times, default=None),
        peak_memory=max(filter(None, (one.peak_memory, other.peak_memory)), default=None),
    )
