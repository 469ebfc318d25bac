"""How well `ftgen plan` forecasts step times: each row of the catalogue's measurements forecast from the others.

    python bench/forecast.py [--rows]

In: nothing. Out: a table with the errors of each way of forecasting; with --rows also each forecast.
"""

import argparse
from collections import defaultdict
from statistics import median

from ftgen.catalogue.measurements import Measured, measurements
from ftgen.plan.nearest import error_of, held_out, named


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rows", action="store_true", help="print each forecast")
    options = parser.parse_args()
    errors: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row, guess in held_out(measurements()):
        error = error_of(row, guess)
        errors[str(guess.way), _kind(row)].append(abs(error))
        if options.rows:
            print(f"{row.step_time_s:7.3f} s, forecast {guess.step_time_s:7.3f} s ({error:+.1%}): {_name(row)}: {guess.way}")
    print("| what the nearest runs had | recipe | forecasts | median error | largest error |\n|---|---|---|---|---|")
    for (way, kind), found in sorted(errors.items()):
        print(f"| {way} | {kind} | {len(found)} | {median(found):.1%} | {max(found):.1%} |")


def _kind(row: Measured) -> str:
    return f"{named(row)}, {'optimized' if row.optimizations else 'stock'}"


def _name(row: Measured) -> str:
    return f"{_kind(row)}, {row.model}, {row.gpus} {row.gpu}, {row.origin}"


if __name__ == "__main__":
    main()
