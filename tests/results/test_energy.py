"""Energy, power, clocks and cost of a run follow from the samples in its window, and a missing sample is no figure."""

import csv
import io
import json
import shutil
from pathlib import Path

import pytest
import telemetry

from ftgen.logs.find import find_runs
from ftgen.results.energy import REASONS
from ftgen.results.summary import summarize
from runtime.node import judge

CASES = Path(__file__).parents[1] / "logs"
RUN = "lora_nemo_llama3_8b_fp8_2_1795399548"  # LoRA in FP8 on two H200s, 60 steps
TOKENS = 20 * 8 * 4096  # of the last 20 steps
STEP_S = 0.55
ENDS = {step: STEP_S * (step + 1) for step in range(-1, 60)}
WINDOW = (ENDS[39], ENDS[59])
WINDOW_S = 20 * STEP_S


@pytest.fixture
def run(tmp_path):
    """The folder of a real run, to put telemetry into."""
    (found,) = CASES.glob(f"h200_parallel/logs/experiments/*/{RUN}/*/")
    shutil.copytree(found, tmp_path / "logs" / RUN)
    return tmp_path / "logs" / RUN


def summary(folder, **options):
    (found,) = find_runs([folder])
    return summarize(found, **options)


def price(run, per_gpu_hour=2.5, currency="EUR"):
    plan = json.loads((run / "plan.json").read_text())
    plan["price"] = {"per_gpu_hour": per_gpu_hour, "currency": currency}
    (run / "plan.json").write_text(json.dumps(plan))
    (log,) = run.glob("log-*.out")
    rest = log.read_text().partition("\n")[2]
    log.write_text(f"ftgen plan: {json.dumps(plan)}\n{rest}")


def counter(watts):
    """An energy counter of GPUs with constant power, which began long ago."""
    return lambda time, gpu: 1e6 + watts[gpu] * (time + 1000)


def test_joules_a_token_are_the_difference_of_the_counters(run):
    telemetry.write(run, telemetry.lines(ENDS, energy=counter((600, 500)), power=lambda *_: 1.0))
    found = summary(run)
    assert found.joules_per_token == pytest.approx(1100 * WINDOW_S / TOKENS, rel=1e-6)
    assert found.gpu_power_w == pytest.approx(550, rel=1e-6)
    assert found.sm_clock_mhz == 1750
    assert found.max_temperature_c == 61
    assert found.throttled == 1
    assert found.throttle_reasons == ("power cap 100%",)
    last = 5 + ENDS[59] - ENDS[-1]
    assert found.energy_kwh == pytest.approx(1100 * int(last + 5) / 3.6e6, rel=1e-6)
    assert (found.cost, found.currency) == (None, None)
    assert not [text for text in (*found.warnings, *found.notes) if "telemetry" in text]


def test_a_real_run_has_the_energy_of_its_counter():
    """LoRA in FP8 on an H200: the counter and the power that NVML gives are of different making, and agree."""
    (folder,) = CASES.glob("h200_energy/logs/experiments/*/lora_nemo_llama3_8b_fp8_1_1795853375/*/")
    found = summary(folder)
    seen = [json.loads(line) for line in (folder / "telemetry.vm.jsonl").read_text().splitlines()]
    ends = {line["step"]: line["time_s"] for line in seen if "step" in line}
    powers = [line["power_w"][0] for line in seen if "power_w" in line and ends[20] < line["time_s"] < ends[39]]
    assert found.gpu_power_w == pytest.approx(sum(powers) / len(powers), rel=0.01)
    assert found.joules_per_token == pytest.approx(found.gpu_power_w * found.step_time_s / (4 * 4096), rel=0.01)
    assert found.throttle_reasons == ("power cap 100%",)


def test_without_a_counter_the_power_is_integrated(run):
    """A power that rises evenly has a known integral, also between the samples."""
    telemetry.write(run, telemetry.lines(ENDS, power=lambda time, _gpu: 400 + 10 * time))
    mean_w = 400 + 10 * sum(WINDOW) / 2
    found = summary(run)
    assert found.gpu_power_w == pytest.approx(mean_w, rel=1e-5)
    assert found.joules_per_token == pytest.approx(2 * mean_w * WINDOW_S / TOKENS, rel=1e-5)


def test_another_window_has_its_own_energy(run):
    telemetry.write(run, telemetry.lines(ENDS, power=lambda time, _gpu: 400 + 10 * time))
    assert summary(run, window=range(10, 20)).gpu_power_w == pytest.approx(400 + 10 * (ENDS[9] + ENDS[19]) / 2, rel=1e-5)


def test_a_run_without_telemetry_has_no_figure(run, ftgen):
    found = summary(run)
    assert found.joules_per_token is found.gpu_power_w is found.throttled is found.energy_kwh is None
    done = ftgen("tabulate", run, "--columns", "run_id,joules_per_token,throttle_reasons,cost")
    assert done.stdout.count("–") == 3
    assert "joules" not in ftgen("tabulate", run).stdout


@pytest.mark.parametrize(
    "left_out",
    [(16, 23), (ENDS[59] - 0.1, 1e9), (-1e9, ENDS[39] + 0.1)],
    ids=["a gap in the window", "no sample after it", "no sample before it"],
)
def test_a_missing_sample_is_no_joules(run, left_out):
    times = [time for second in range(45) if not left_out[0] < (time := second - 4.6) < left_out[1]]
    telemetry.write(run, telemetry.lines(ENDS, times=times))
    assert summary(run).joules_per_token is None


def test_a_missing_gpu_is_no_joules_and_a_note(run):
    telemetry.write(run, telemetry.lines(ENDS, gpus=1))
    found = summary(run)
    assert found.joules_per_token is found.energy_kwh is None
    assert found.gpu_power_w == pytest.approx(600)
    assert "the telemetry has 1 of 2 GPUs in the window: no joules per token are reported" in found.notes


def test_nodes_count_together_each_by_its_own_clock(run):
    telemetry.write(run, telemetry.lines(ENDS, gpus=1, power=lambda *_: 500.0))
    late = {step: end + 40 for step, end in ENDS.items()}
    telemetry.write(run, telemetry.lines(late, gpus=1, node="node2", power=lambda *_: 700.0), "node2")
    found = summary(run)
    assert found.joules_per_token == pytest.approx(1200 * WINDOW_S / TOKENS, rel=1e-6)
    assert found.gpu_power_w == pytest.approx(600)


def test_ends_of_steps_that_are_missing_are_a_note(run):
    telemetry.write(run, telemetry.lines({step: end for step, end in ENDS.items() if step != 45}))
    found = summary(run)
    assert found.joules_per_token is None
    assert "the telemetry does not have the ends of the window's steps" in found.notes


def test_heat_that_holds_the_clock_back_is_a_warning(run):
    hot = telemetry.POWER_CAP | telemetry.THERMAL
    middle = sum(WINDOW) / 2
    telemetry.write(run, telemetry.lines(ENDS, reasons=lambda time: hot if time > middle else telemetry.IDLE))
    found = summary(run)
    assert found.throttled == pytest.approx(0.5, abs=0.1)
    assert [text.rpartition(" ")[0] for text in found.throttle_reasons] == ["power cap", "thermal slowdown"]
    assert any(
        text.startswith("the clocks of the GPUs were held back in the window: thermal slowdown ") for text in found.warnings
    )


def test_few_samples_are_a_warning(run):
    telemetry.write(run, telemetry.lines(ENDS))
    assert "the window has only 1 sample of telemetry" in summary(run, window=range(30, 33)).warnings


def test_torn_and_strange_lines_are_left_out(run):
    good = telemetry.lines(ENDS)
    expected = summary_with(run, good)
    strange = [
        '{"time_s":1795000010.5,"power_w":[1e999,NaN],"ener',
        '{"time_s":1795000010.6,"power_w":"all"}',
        '{"step":59,"time_s":17950000',
        "[" * 100_000,
        '{"format":2,"gpus":[1]}',
        "\x00\ufffd",
    ]
    assert summary_with(run, [*good[:20], *strange[2:], *good[20:]]).joules_per_token == expected.joules_per_token
    assert summary_with(run, [*good, *strange]).joules_per_token == expected.joules_per_token
    assert summary_with(run, strange).joules_per_token is None


def summary_with(run, text):
    telemetry.write(run, text)
    return summary(run)


def test_the_last_attempt_counts(run):
    """Without [save] an attempt begins anew, in the same file."""
    first = telemetry.lines({step: end for step, end in ENDS.items() if step < 50}, power=lambda *_: 100.0)
    later = telemetry.lines({step: end + 100 for step, end in ENDS.items()})
    found = summary_with(run, [*first, *later])
    assert found.gpu_power_w == pytest.approx(600)
    spans = [int(ends - ENDS[-1]) + 10 for ends in (ENDS[49], ENDS[59])]
    assert found.energy_kwh == pytest.approx(2 * (100 * spans[0] + 600 * spans[1]) / 3.6e6, rel=1e-6)


def test_a_counter_that_begins_anew_is_no_figure(run):
    telemetry.write(
        run, telemetry.lines(ENDS, energy=lambda time, _gpu: 1e5 + 600 * time if time < 30 else 600 * (time - 30))
    )
    found = summary(run)
    assert found.joules_per_token is found.energy_kwh is None


def test_the_price_gives_the_cost_of_the_run_and_of_a_million_tokens(run):
    price(run)
    telemetry.write(run, telemetry.lines(ENDS))
    found = summary(run)
    assert found.currency == "EUR"
    assert found.cost == pytest.approx(2.5 * 2 * (int(ENDS[59] - ENDS[-1]) + 10) / 3600)
    assert found.cost_per_million_tokens == pytest.approx(2.5 * 2 / 3600 / found.tokens_per_s * 1e6)


def test_without_a_known_time_there_is_a_price_of_tokens_and_none_of_the_run(run):
    price(run)
    found = summary(run)
    assert found.cost is None
    assert found.cost_per_million_tokens == pytest.approx(2.5 * 2 / 3600 / found.tokens_per_s * 1e6)


@pytest.mark.parametrize("wrong", [-1, True, "much", 1e400, None])
def test_a_price_that_is_none_is_left_out(run, wrong):
    price(run, wrong)
    assert summary(run).cost_per_million_tokens is None


def test_tables_have_the_energy_of_runs_that_have_it(run, ftgen):
    price(run)
    telemetry.write(run, telemetry.lines(ENDS))
    joules = f"{summary(run).joules_per_token:.4f}"
    done = ftgen("tabulate", run)
    assert "Energy in joules per token" in done.stdout
    assert joules in done.stdout
    assert "EUR" in done.stdout
    (row,) = csv.DictReader(io.StringIO(ftgen("tabulate", run, "--format", "csv").stdout))
    assert float(row["joules_per_token"]) == summary(run).joules_per_token
    assert row["throttle_reasons"] == "power cap 100%"


def test_the_report_has_the_energy(run, ftgen, tmp_path):
    telemetry.write(run, telemetry.lines(ENDS))
    done = ftgen("report", run, "--output", tmp_path / "report.html")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "report.html").read_text()
    assert "J/token" in page
    assert "<dt>SM clock (MHz)</dt><dd>1,750</dd>" in page


def test_saves_in_the_window_use_no_energy_of_its_steps(tmp_path):
    """The steps after a save are left out, and the time and the energy of the save with them."""
    shutil.copytree(CASES / "saved", tmp_path / "saved")
    (log,) = (tmp_path / "saved").rglob("log-*_2.out")
    ends, time_s, saving = {}, 0.0, []
    for step in range(59, 100):
        begin_s, time_s = time_s, time_s + (10.0 if step in (80, 90) else 1.0)
        ends[step] = time_s
        saving += [(begin_s, time_s)] if step in (80, 90) else []
    power = lambda time, _gpu: 5000.0 if any(begin < time <= end for begin, end in saving) else 100.0  # noqa: E731
    telemetry.write(log.parent, telemetry.lines(ends, gpus=1, power=power))
    found = summary(tmp_path / "saved", window=range(80, 100))
    assert 100 <= found.gpu_power_w < 1000  # with the saves it would be 2678


def test_a_sealed_run_takes_its_telemetry_with_it(run, ftgen, tmp_path):
    price(run)
    telemetry.write(run, telemetry.lines(ENDS))
    file = tmp_path / "run.zip"
    done = ftgen("seal", run, "-o", file)
    assert done.returncode == 0, done.stderr
    done = ftgen("verify", file)
    assert done.returncode == 0, done.stdout
    assert "results follow from the logs" in done.stdout
    assert "telemetry" not in done.stdout.partition("\n")[0].partition("the run has no")[2]


def test_figures_of_other_telemetry_do_not_verify(run, ftgen, tmp_path):
    import test_seal

    telemetry.write(run, telemetry.lines(ENDS))
    ftgen("seal", run, "-o", tmp_path / "run.zip")
    change = lambda files: {name: text.replace(b"600.0", b"500.0") for name, text in files.items()}  # noqa: E731
    other = test_seal.changed(tmp_path / "run.zip", tmp_path / "other.zip", change, rehash=True)
    done = ftgen("verify", other)
    assert done.returncode == 1
    assert "joules_per_token: 0.0" in done.stdout


def test_reasons_are_those_of_the_node_check_and_the_power_cap():
    assert {0x4: "power cap"} | judge.THROTTLED == REASONS
