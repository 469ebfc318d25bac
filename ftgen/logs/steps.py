"""A run's steps. In: step lines, one by one or in chunks. Out: a mapping from a step's number to what is said of it.

A chunk is read only when one of its steps is asked for, and the text of old ones is let go and read again from the file:
so the memory that a log's steps need does not grow with the log.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from copy import copy
from itertools import chain

from ftgen.logs.chunk import Chunk
from ftgen.logs.span import Span
from ftgen.logs.step_line import Step, StepLine

NOTHING = Step(None, None)
NONE = range(0), Span.of({})
KEPT = 8 << 20  # bytes of text: the last steps', where the window is


class Steps(Mapping[int, Step]):
    """Step by number, from 0, in ascending order."""

    def __init__(self, steps: Mapping[int, Step] | None = None) -> None:
        self._single = dict(steps or {})
        self._of_bars: set[int] = set()
        self._chunks: list[Chunk] = []  # ascending
        self._in_chunks = 0  # steps
        self._again: dict[int, Callable[[Chunk], Chunk]] = {}  # by a chunk's first step: how to read its text again
        self._kept = 0  # the chunks before it have no text
        self._text = 0  # bytes of the others
        self._recent = NONE  # what was asked for last
        self.last = max(self._single, default=-1)  # the highest number; -1 where there is no step

    def __repr__(self) -> str:
        return f"Steps({dict(self)})"

    def __len__(self) -> int:
        return len(self._single) + self._in_chunks

    def __iter__(self) -> Iterator[int]:
        spans = [(number, number) for number in self._single] + [chunk[:2] for chunk in self._chunks]
        for first, last in sorted(spans):
            yield from range(first, last + 1)

    def __contains__(self, step: object) -> bool:
        return step in self._single or (isinstance(step, int) and self._chunk_with(step) is not None)

    def __getitem__(self, step: int) -> Step:
        if step in self._single:
            return self._single[step]
        asked, found = self._recent
        if step not in asked:
            chunk = self._chunk_with(step)
            if chunk is None:
                raise KeyError(step)
            found = self.between(chunk.first, chunk.last + 1)
        return found.get(step, NOTHING)  # the file is not any more what it was

    def copy(self) -> "Steps":
        """The same steps, to which others can be added."""
        other = copy(self)
        other._single, other._of_bars = dict(self._single), set(self._of_bars)
        other._chunks, other._again = list(self._chunks), dict(self._again)
        return other

    @property
    def neighbours(self) -> bool:
        """Whether there are steps that were read together, because they follow one another."""
        return any(chunk.first < chunk.last for chunk in self._chunks)

    @property
    def planned(self) -> int | None:
        """Steps in all, as the last one says."""
        asked, found = self._recent
        if asked.stop != self.last + 1 or not asked:
            found = self.between(self.last, self.last + 1)
        return found.said("planned")[-1] if self.last in found else None

    def between(self, start: int, stop: int) -> Span:
        """The steps from `start` to before `stop` that are there, in ascending order; no others are read."""
        asked, found = self._recent
        if asked.start == start and asked.stop == stop:
            return found
        if start in asked and stop - 1 in asked:
            return Span.of({number: step for number, step in found.items() if start <= number < stop})
        chunks = [chunk for chunk in self._chunks if chunk.first < stop and start <= chunk.last]
        spans = [self._whole(chunk).steps(max(start, chunk.first), min(stop, chunk.last + 1)) for chunk in chunks]
        if len(spans) == 1 and not self._single:
            found = spans[0]
        else:
            single = {number: step for number, step in self._single.items() if start <= number < stop}
            found = Span.of(dict(sorted(chain(single.items(), *(span.items() for span in spans)))))
        self._recent = range(start, stop), found
        return found

    def pieces(self) -> Iterator[Span]:
        """All the steps in ascending order, some at a time; each piece is read when it is asked for."""
        single, place = sorted(self._single), 0
        for chunk in list(self._chunks):
            end = bisect_left(single, chunk.first)
            if place < end:
                yield Span.of({number: self._single[number] for number in single[place:end]})
            place = end
            yield self._whole(chunk).steps(chunk.first, chunk.last + 1)
        if place < len(single):
            yield Span.of({number: self._single[number] for number in single[place:]})

    def add_chunk(self, chunk: Chunk, again: Callable[[Chunk], Chunk]) -> None:
        """Take a chunk; `again` is how to read it once more."""
        self._recent = NONE
        if chunk.first <= self.last:
            self._again[chunk.first] = again
            for number, step in self._whole(chunk).steps(chunk.first, chunk.last + 1).items():
                self.add(StepLine(number, step), number)
            return
        self._chunks.append(chunk)
        self._in_chunks += chunk.last - chunk.first + 1
        self._again[chunk.first] = again
        self._text += len(chunk.text)
        self.last = chunk.last
        while self._text > KEPT and self._kept < len(self._chunks) - 1:
            old = self._chunks[self._kept]
            self._chunks[self._kept] = old._replace(text=b"")
            self._text -= len(old.text)
            self._kept += 1

    def add(self, line: StepLine, number: int) -> None:
        """Take one line: a step that several lines tell of is as slow as the slowest of them says."""
        self._recent = NONE
        if number in self._single:
            before, of_bar = self._single[number], number in self._of_bars
            if line.bar and not of_bar:
                return
            self._single[number] = line.step if of_bar else _slower(before, line.step)
        elif chunk := self._chunk_with(number):
            if not line.bar:
                self._dissolve(chunk)
                self.add(line, number)
            return
        else:
            self._single[number] = line.step
            self.last = max(self.last, number)
        (self._of_bars.add if line.bar else self._of_bars.discard)(number)

    def _chunk_with(self, step: int) -> Chunk | None:
        return next((chunk for chunk in reversed(self._chunks) if chunk.first <= step <= chunk.last), None)

    def _whole(self, chunk: Chunk) -> Chunk:
        """The chunk with its text; without, where the file is not any more what it was."""
        return chunk if chunk.text else self._again[chunk.first](chunk)

    def _dissolve(self, chunk: Chunk) -> None:
        place = self._chunks.index(chunk)
        self._single |= self._whole(chunk).steps(chunk.first, chunk.last + 1)
        del self._chunks[place]
        self._in_chunks -= chunk.last - chunk.first + 1
        if place < self._kept:
            self._kept -= 1
        self._text -= len(chunk.text)


def _slower(one: Step, other: Step) -> Step:
    """What both say, with the slower one's time."""
    times = [time_s for step in (one, other) for time_s in (step.time_s, step.fastest_s) if time_s]
    said = {name: value for name, value in other._asdict().items() if value is not None}
    return one._replace(**said)._replace(
        time_s=max(times, default=None),
        fastest_s=min(times, default=None),
        peak_memory=max(filter(None, (one.peak_memory, other.peak_memory)), default=None),
    )
