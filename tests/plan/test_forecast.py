"""A forecast rests on measured runs of the same kind, says which, and is as good as held-out runs show."""

import json
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ftgen.catalogue.measurements import HISTORY, MEASURED, PUBLISHED, Measured, from_run, measurements
from ftgen.plan.experiments import load_one
from ftgen.plan.forecast import forecast
from ftgen.plan.nearest import error_of, held_out, nearest

ROOT = Path(__file__).parents[2]
SPEC = ROOT / "specs" / "lora_fp8_8.toml"
OPTIMIZED = ("cuda_graphs", "loss_tokens_only", "scale_small_tensor")
ROW = Measured(
    model="llama3_8b",
    gpu="h100",
    scheme="lora",
    precision="fp8",
    engine="nemo",
    gpus=8,
    global_batch_size=32,
    seq_length=4096,
    step_time_s=1.0,
    source="a",
    split=(1, 1, 1),
    fp8_scaling="delayed",
    lora_targets=("linear_qkv",),
    optimizations=OPTIMIZED,
)
EIGHT, SIXTEEN = ROW, ROW._replace(gpus=16, global_batch_size=64, step_time_s=1.1)


def plan_of(*settings, site=None):
    return load_one(SPEC, site, settings).plan


def test_the_same_work_takes_as_long():
    guess = nearest(ROW, [ROW, ROW._replace(step_time_s=1.2), ROW._replace(step_time_s=1.3)])
    assert guess.step_time_s == 1.2
    assert len(guess.rows) == 3
    assert str(guess.way) == "the same work"


def test_more_gpus_take_as_much_longer_as_was_measured():
    other = [row._replace(model="llama3_70b", split=(2, 4, 1)) for row in (EIGHT, SIXTEEN)]
    wanted = ROW._replace(gpus=32, global_batch_size=128)
    guess = nearest(wanted, [EIGHT, *other])
    assert guess.step_time_s == pytest.approx(1.1**2)
    assert (guess.growth, guess.doublings) == (pytest.approx(0.1), 2)
    assert guess.beyond == ("measured between nodes on up to 16 GPUs",)
    assert nearest(wanted, [EIGHT, SIXTEEN]).step_time_s == pytest.approx(1.1 * 1.1)  # from the nearer one


def test_growth_inside_a_node_says_nothing_of_several_nodes():
    four = ROW._replace(gpus=4, global_batch_size=16)
    assert nearest(SIXTEEN, [four, EIGHT]) == "no measured run tells how LoRA FP8 scales from 4 to 16 GPUs"
    two = nearest(ROW._replace(gpus=2, global_batch_size=8), [four, EIGHT])
    assert two.step_time_s == pytest.approx(1.0)
    assert two.beyond == ()


def test_more_tokens_for_a_gpu_take_longer_in_proportion():
    guess = nearest(ROW._replace(global_batch_size=64), [ROW])
    assert guess.step_time_s == 2.0
    assert str(guess.way) == "other tokens"


@pytest.mark.parametrize(
    "change",
    [
        {"gpu": "h200"},
        {"scheme": "sft"},
        {"precision": "bf16"},
        {"engine": "megatron_bridge"},
        {"model": "llama3_70b"},
        {"micro_batch_size": 2},
        {"packed": False},
        {"fp8_scaling": "current"},
        {"lora_targets": ("linear_qkv", "linear_proj")},
        {"split": (2, 1, 1)},
        {"optimizations": ()},
        {"optimizations": tuple("abcdef")},
    ],
    ids=str,
)
def test_another_kind_of_run_gives_no_forecast(change):
    assert nearest(ROW, [ROW._replace(**change)]).startswith(
        "no measured run of LoRA FP8 of llama3_8b on h100 with nemo, with "
    )


def test_models_of_the_same_sizes_are_of_one_kind():
    assert nearest(ROW._replace(model="llama31_8b"), [ROW]).step_time_s == 1.0


def test_nearer_optimizations_count_first_then_gpus_then_whose_run_it_is():
    rows = [
        ROW._replace(optimizations=OPTIMIZED[:2], step_time_s=2.0),
        ROW._replace(gpus=16, global_batch_size=64, step_time_s=3.0),
        ROW._replace(origin=PUBLISHED, optimizations=(), step_time_s=4.0),
        ROW._replace(step_time_s=5.0),
        ROW._replace(origin=HISTORY, step_time_s=6.0),
    ]
    times = []
    while not isinstance(guess := nearest(ROW, rows), str):
        times.append(guess.step_time_s)
        rows = [row for row in rows if row not in guess.rows]
    assert times[:2] == [6, 5]
    assert times[-2:] == [2, 4]


def test_errors_are_those_of_runs_that_were_held_out():
    rows = [ROW, ROW._replace(step_time_s=1.25)]
    assert [error_of(row, guess) for row, guess in held_out(rows)] == [pytest.approx(0.25), pytest.approx(-0.2)]


def test_without_runs_to_try_it_on_the_error_is_not_known():
    plan = plan_of("optimizations.preset=stock")
    assert forecast(plan, [ROW._replace(optimizations=())]).error is None
    tried = forecast(plan, [ROW._replace(optimizations=(), step_time_s=time_s) for time_s in (1.0, 1.1)])
    assert tried.error.share == pytest.approx(0.1)
    assert (tried.error.trials, tried.error.of_kind) == (2, True)


def test_a_longer_way_has_a_larger_error():
    plan = plan_of("gpus=32", "optimizations.preset=stock")
    eight, sixteen = (row._replace(optimizations=()) for row in (EIGHT, SIXTEEN))
    alike = [row._replace(model="llama3_70b", split=(2, 4, 1)) for row in (eight, sixteen)]
    alike += [row._replace(packed=False) for row in (eight, sixteen._replace(step_time_s=1.2))]
    found = forecast(plan, [eight, *alike])
    errors = [abs(error_of(row, each)) for row, each in held_out([eight, *alike]) if each.way == found.guess.way]
    assert found.error.share == pytest.approx(2 * max(errors))


def test_the_figures_of_a_plan_follow_from_the_step_time(tmp_path):
    site = tmp_path / "site.toml"
    site.write_text('price_per_gpu_hour = 2\ncurrency = "EUR"\n')
    found = forecast(
        plan_of("max_steps=3600", "optimizations.preset=stock", site=site), [ROW._replace(optimizations=(), power_w=500.0)]
    )
    assert (found.hours, found.gpu_hours, found.kwh, found.cost) == (1, 8, 4, 16)


def test_plan_prints_what_a_forecast_rests_on(ftgen, tmp_path):
    site = tmp_path / "site.toml"
    site.write_text('price_per_gpu_hour = 2.5\ncurrency = "EUR"\n')
    done = ftgen("plan", SPEC, "--site", site)
    assert done.returncode == 0, done.stderr
    part = " ".join(done.stdout.partition("Forecast of the steps")[2].partition("Enabled")[0].split())
    assert "held-out forecasts" in part
    assert (
        "rests on bench/results/2026-11-22-h100.json (1 run); with other optimizations; scaled from 1 to 8 GPUs, +" in part
    )
    assert "for each doubling; measured inside a node on up to 2 GPUs" in part
    assert " kWh at 68" in part
    assert " EUR " in part
    assert len(done.stdout.splitlines()) <= 40
    every = ftgen("plan", SPEC, "--all").stdout
    assert "forecast.step_time_s" in every
    assert "forecast.cost" in every


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            ("gpu=a100", "precision=bf16"),
            "none: no measured run of LoRA BF16 of llama3_8b on a100 with nemo, with this split and data",
        ),
        (("gpu=h200", "scheme=sft"), "none: no measured run tells how SFT FP8 scales from 2 to 8 GPUs"),
        (("epochs=2", 'data.kind="squad"'), "the data decides how many there are"),
    ],
)
def test_what_is_not_known_is_said(ftgen, settings, said):
    done = ftgen("plan", SPEC, *(word for text in settings for word in ("--set", text)))
    assert done.returncode == 0, done.stderr
    assert said in " ".join(done.stdout.split())


def test_runs_of_a_history_count_and_come_first(ftgen, tmp_path):
    """Runs of another GPU, which the catalogue has no runs of."""
    file, theirs = tmp_path / "a.sqlite", tmp_path / "b.sqlite"
    assert ftgen("history", "add", ROOT / "tests" / "logs" / "h100", "--history", file).returncode == 0
    lines = ftgen("history", "export", "--history", file).stdout
    assert '"h100"' in lines
    (tmp_path / "runs.jsonl").write_text(lines.replace('"h100"', '"b200"'))
    assert ftgen("history", "import", tmp_path / "runs.jsonl", "--history", theirs).returncode == 0
    settings = ("--set", "gpus=1", "--set", "gpu=b200", "--set", "optimizations.preset=stock")
    assert "none: no measured run" in ftgen("plan", SPEC, *settings).stdout
    done = ftgen("plan", SPEC, *settings, "--history", theirs)
    assert "step time       1.09 s" in done.stdout, done.stdout + done.stderr
    assert str(theirs)[:20] in done.stdout
    own = ("--set", "gpus=1", "--set", "optimizations.preset=stock", "--history", file)
    assert "bench/results" not in ftgen("plan", SPEC, *own).stdout


def test_a_history_that_is_not_there_is_an_error(ftgen, tmp_path):
    done = ftgen("plan", SPEC, "--history", tmp_path / "none.sqlite")
    assert done.returncode == 1
    assert "there is no such history" in done.stderr


@pytest.mark.parametrize(
    "change",
    [
        {"status": "failed"},
        {"step_time_s": None},
        {"step_time_s": "fast"},
        {"window_first": 0},
        {"window_first": None},
        {"gpus": True},
        {"model": None},
        {"plan": None},
        {"plan": {}},
        {"plan": {"optimizations": ["a"], "parallelism": [], "data": 3}},
        {"plan": {"lora": {"targets": 3}, "micro_batch_size": 1}},
    ],
    ids=str,
)
def test_a_record_that_is_no_run_with_a_step_time_is_left_out(change):
    results = {**ROW._asdict(), "status": "complete", "window_first": 40} | change
    assert from_run(results, change.get("plan", json.loads(plan_of().to_json())), "x", HISTORY) is None
    assert change


def test_a_long_history_takes_no_longer():
    rows = [ROW._replace(origin=HISTORY, step_time_s=1 + number / 1e4) for number in range(5000)]
    begin = time.perf_counter()
    rows = [row._replace(optimizations=()) for row in rows]
    found = forecast(plan_of("optimizations.preset=stock"), [*rows, *measurements()])
    assert time.perf_counter() - begin < 5
    assert found.guess.rows[-1].step_time_s == rows[-1].step_time_s


def test_the_catalogue_has_what_was_measured():
    done = subprocess.run(
        [sys.executable, ROOT / "bench" / "measured.py", "--check"], check=False, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [row for row in measurements() if row.origin == MEASURED]
    assert len(rows) >= 28
    assert all((ROOT / row.source).is_file() for row in rows)


def test_the_errors_that_the_docs_state_are_those_of_held_out_runs():
    done = subprocess.run(
        [sys.executable, ROOT / "bench" / "forecast.py"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    page = (ROOT / "docs" / "how-to" / "forecast.md").read_text()
    assert done.stdout in page
    errors = {str(guess.way): [] for _, guess in held_out(measurements())}
    for row, guess in held_out(measurements()):
        if row.optimizations:
            errors[str(guess.way)].append(abs(error_of(row, guess)))
    assert max(errors["the same work"]) < 0.02
    assert max(errors["another number of GPUs"]) < 0.04
    assert not math.isnan(sum(map(sum, errors.values())))
