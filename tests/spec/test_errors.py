"""Bad input: every problem located, named and hinted at, and nothing written."""

from pathlib import Path

import pytest

CASES = Path(__file__).parents[1] / "errors"


@pytest.mark.parametrize("case", sorted(CASES.iterdir()), ids=lambda case: case.name)
def test_a_bad_spec_is_refused_with_every_problem_located(case, ftgen, tmp_path, matches_golden):
    site = ["--site", "site.toml"] if (case / "site.toml").exists() else []
    more = (case / "arguments").read_text().splitlines() if (case / "arguments").exists() else []
    done = ftgen("compile", "spec.toml", *site, *more, "--out", tmp_path / "out", cwd=case)
    assert (done.returncode, done.stdout) == (1, "")
    assert not (tmp_path / "out").exists()
    matches_golden(case / "expected.txt", done.stderr)


def test_a_missing_spec_is_named(ftgen, tmp_path):
    done = ftgen("compile", "specs/no_such.toml", "--out", tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("specs/no_such.toml: No such file or directory\n")


def test_the_problems_of_several_specs_come_together(ftgen, tmp_path):
    done = ftgen("compile", CASES / "batch/spec.toml", CASES / "gpu/spec.toml", "--out", tmp_path / "out")
    assert done.returncode == 1
    assert "batch/spec.toml:4: global_batch_size" in done.stderr
    assert "gpu/spec.toml:2: precision" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["two words.toml", "-rf.toml", "$(id).toml"])
def test_a_file_name_that_is_no_job_name_is_refused(ftgen, tmp_path, name):
    (tmp_path / name).write_text('scheme = "lora"\nprecision = "bf16"\ngpus = 8\n')
    done = ftgen("compile", "--", tmp_path / name)
    assert done.returncode == 1
    assert "a spec's file name must have" in done.stderr


@pytest.mark.parametrize("arguments", [["compile"], ["nonsense"], ["compile", "x", "--nonsense"]])
def test_wrong_usage_exits_with_2(ftgen, arguments):
    assert ftgen(*arguments).returncode == 2
