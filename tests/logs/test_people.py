"""Logs as people have them: each folder of `people` is a log tree, with what a person reads from it.

`right` of `expected.json` has `found`, and `runs`: keys of each run of the JSON results, in their order. Besides:
`reason_contains`, and `status_in` and `step_time_in` where more than one value would do; `stderr`, a text in it.
In the older form, the keys stand in `right` itself and are the last run's. `note` is for people.
"""

import json
import shlex
from pathlib import Path

import pytest

PEOPLE = Path(__file__).parent / "people"
CASES = sorted(path.parent for path in PEOPLE.glob("*/expected.json"))
ABOUT_ALL = {"found", "runs", "note", "stderr", "exit_code", "exit"}
EITHER = {"status_in": "status", "step_time_in": "step_time_s"}


def expected_runs(right, found):
    """For each run what must be so; in the older form only of the last one."""
    if "runs" in right:
        assert len(right["runs"]) == right["found"], "expected.json must have each run"
        return right["runs"]
    return [*({} for _ in found[1:]), {key: value for key, value in right.items() if key not in ABOUT_ALL}]


def differences(right, run):
    """What is otherwise than a person reads it."""
    unknown = right.keys() - run.keys() - EITHER.keys() - {"reason_contains"}
    assert not unknown, f"no such keys: {unknown}"
    may_be = {key: [value] for key, value in right.items() if key in run}
    may_be |= {key: right[name] for name, key in EITHER.items() if name in right}
    wrong = {key: (run[key], values) for key, values in may_be.items() if not any(same(run[key], value) for value in values)}
    part = right.get("reason_contains", "")
    return wrong if part in (run["reason"] or "") else wrong | {"reason": (run["reason"], part)}


def same(value, right):
    numbers = isinstance(value, (int, float)) and isinstance(right, (int, float))
    return value == pytest.approx(right, rel=1e-3) if numbers and float in {type(value), type(right)} else value == right


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_log_is_read_as_a_person_reads_it(ftgen, case):
    expected = json.loads((case / "expected.json").read_text(encoding="utf-8"))
    right = expected["right"]
    arguments = [*shlex.split(expected["argument"]), *expected["extra_args"]]
    done = ftgen("tabulate", *arguments, "--format", "json", cwd=case)
    codes = {right["exit_code"]} if "exit_code" in right else {0, 1}
    assert done.returncode in codes, done.stderr
    found = json.loads(done.stdout)["runs"] if done.stdout else []  # nothing where all is refused
    assert len(found) == right["found"], [run["log"] for run in found]
    wrong = [differences(*pair) for pair in zip(expected_runs(right, found), found, strict=True)]
    assert not any(wrong), f"(found, right): {wrong}"
    assert right.get("stderr", "") in done.stderr
