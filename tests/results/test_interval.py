"""Steps that are not all logged: what their numbers tell, and what each logged time counts for."""

import pytest

from ftgen.logs.step import Step
from ftgen.logs.steps import Steps
from ftgen.results.interval import Logged, logged
from ftgen.results.window import timed


def steps_of(numbers):
    return Steps({number: Step(float(number), 1.0) for number in numbers})


@pytest.mark.parametrize(
    ("numbers", "found"),
    [
        ([], Logged(0)),
        (range(100), Logged(100)),
        ([99], Logged(1, first=99)),  # the last of a hundred, or one of which 99 are lost
        ([*range(12), *range(13, 20)], Logged(19)),
        ([0, 2, 3], Logged(3)),
        (range(9, 100, 10), Logged(100, 10)),  # Megatron's
        (range(0, 100, 10), Logged(91, 10)),  # NeMo's
        ([0, *range(9, 100, 10)], Logged(100, 10)),
        ([*range(9, 90, 10), 94], Logged(95, 10)),  # with the last one of 95
        ([49, 99], Logged(100, 50)),
        ([0, 49, 99], Logged(100, 50)),
        ([50, 99], Logged(2, first=50)),
        ([9, 19, 39, 49], Logged(40, 10, 29)),
        ([9, 19, 29, 37, 49, 59], Logged(50, 10, 37)),
        (range(59, 100, 10), Logged(50, 10, 9)),  # from a checkpoint
    ],
)
def test_the_rhythm_is_what_most_lines_keep_to(numbers, found):
    assert logged(steps_of(numbers), 95) == found


@pytest.mark.parametrize(
    ("numbers", "window", "mean"),
    [
        (range(9, 100, 10), 20, (89 + 99) / 2),
        (range(14, 90, 15), 20, (5 * 74 + 15 * 89) / 20),
        (range(9, 100, 10), 5, 99),
        (range(9, 100, 10), range(15, 35), (5 * 19 + 10 * 29) / 15),
        (range(9, 100, 10), range(20, 29), None),
        ([9, 19, 29, 49], 20, None),
        ([9, 19, 29, 39, 59], 20, None),
        ([9, 19, 29, 39, 59], range(10, 40), 29),
    ],
)
def test_a_time_counts_for_the_steps_that_it_stands_for(numbers, window, mean):
    steps = steps_of(numbers)
    found = timed(steps, window, logged(steps, None))
    assert (found.mean_s, found.why_not is None) == (mean, mean is not None)
