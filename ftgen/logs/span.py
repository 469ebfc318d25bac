"""Steps by what they say of each thing. In: columns, or steps by number. Out: a `Span`, a mapping from number to step.

Figures are made of columns: a `Step` is put together when somebody asks for one.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from ftgen.logs.step_line import Step, steps_of

Column = Sequence[Any] | Callable[[], Sequence[Any]]  # or how to read it; one entry counts for all steps
NOT_SAID = (None,)


class Span(Mapping[int, Step]):
    """Some steps, by number in ascending order."""

    def __init__(self, numbers: Collection[int], columns: dict[str, Column]) -> None:
        self.numbers = numbers
        self._columns = columns  # by the names in `Step`
        self._steps: Mapping[int, Step] = {}

    @classmethod
    def of(cls, steps: Mapping[int, Step]) -> "Span":
        """Steps that are read."""
        span = cls(steps.keys(), dict(zip(Step._fields, zip(*steps.values(), strict=True), strict=False)))
        span._steps = steps
        return span

    def said(self, name: str) -> Sequence[Any]:
        """What each of the steps says of one thing, by its name in `Step`."""
        column = self._column(name)
        return column if len(column) == len(self.numbers) else [*column] * len(self.numbers)

    def told(self, name: str) -> set[Any]:
        """What any of the steps says of one thing."""
        return {*self._column(name)}

    def _column(self, name: str) -> Sequence[Any]:
        column = self._columns.get(name, NOT_SAID)
        if callable(column):
            column = self._columns[name] = column()
        return column

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[int]:
        return iter(self.numbers)

    def __contains__(self, number: object) -> bool:
        return number in self.numbers

    def __getitem__(self, number: int) -> Step:
        if not self._steps:
            columns = {name: self.said(name) for name in Step._fields}
            self._steps = dict(zip(self.numbers, steps_of(columns, len(self)), strict=True))
        return self._steps[number]
