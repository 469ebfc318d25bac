"""Whole jobs with a marker for a token: afterwards, and meanwhile, it is nowhere that anyone could read it."""

import re
import sys
from pathlib import Path

from cluster import Desk, until

TOKEN = "hf_MarkerThatMustNeverBeSeen"


def command_lines() -> str:
    """Of every process there is."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_text(errors="replace").replace("\0", " "))
        except OSError:
            continue
    return "\n".join(found)


def files_with_it(desk: Desk) -> list[Path]:
    return [path for path in desk.folder.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]


def test_the_token_is_in_no_file_no_command_line_and_nothing_that_slurm_shows(desk):
    """A chain that makes the checkpoint in a job of its own, fails in one run, and is requeued in another."""
    scripts = [desk.compile(name, gpus=2) for name in ("a", "b")]
    first = desk.submit(*scripts, HF_TOKEN=TOKEN, PROGRAM_MODE="raise", PROGRAM_CONVERT_S="1")
    seen = ""
    shown = set()

    def over() -> bool:
        nonlocal seen
        seen += command_lines()
        shown.update(desk.job(int(line.split()[0])).text for line in desk.queue())
        return not desk.queue()

    until(over, 60, desk.everything)
    assert f"job {first + 1} converts it" in desk.output(first)
    assert "code/a.py finetune" in seen  # the look was in time
    assert TOKEN not in seen
    assert shown
    assert TOKEN not in "".join(shown)
    for number in range(first, first + 4):
        assert TOKEN not in desk.cluster.call("scontrol", "show", "job", "--details", number)
        assert TOKEN not in desk.cluster.call("scontrol", "write", "batch_script", number, "-")
    assert files_with_it(desk) == []


def test_a_real_fine_tune_over_two_nodes_trains_and_keeps_the_token_to_itself(desk):
    """NeMo itself, two ranks on two nodes that talk by gloo, the checkpoint made by the job before."""
    extra = "max_steps = 22\nglobal_batch_size = 4\nwindow = { last_steps = 2 }\n"
    script = desk.compile("real", gpus=2, source="random", site='gpus_per_node = 1\ngpu_request = "gres"\n', extra=extra)
    first = desk.submit(script, HF_TOKEN=TOKEN, FTGEN_PYTHON=sys.executable, FTGEN_STALE_S="60")
    assert desk.ended(first, 120).state == "COMPLETED", desk.everything()
    seen = ""

    def over() -> bool:
        nonlocal seen
        seen += command_lines()
        return not desk.queue()

    until(over, 400, desk.everything)
    run = first + 2
    assert desk.job(run).state == "COMPLETED", desk.everything()
    log = desk.log(run)
    assert re.search(r"iteration 21/21 .*reduced_train_loss: [\d.]+ .*train_step_timing in s", log), log[-4000:]
    assert "random weights" in desk.log(first + 1, kind="convert")
    assert "random weights" not in log  # it was there
    assert "code/real.py finetune" in seen
    assert TOKEN not in seen
    assert files_with_it(desk) == []
