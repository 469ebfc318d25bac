"""Watching runs while their logs grow: on a real terminal, in a pipe, and what is said of each."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from debian import program

from ftgen.errors import LogError
from ftgen.show.follow import Follower
from ftgen.show.watch import line

ROOT = Path(__file__).parents[2]
EXPERIMENT = "sft_nemo_llama3_8b_bf16_8"


class Job:
    """A run whose log grows line by line, as NeMo writes it."""

    def __init__(self, top, run_id="7", planned=40):
        folder = top / EXPERIMENT / f"{EXPERIMENT}_{run_id}" / EXPERIMENT
        folder.mkdir(parents=True)
        self.log, self.planned = folder / f"log-acct.{EXPERIMENT}_{run_id}_0.out", planned
        self.log.touch()

    def says(self, text):
        with self.log.open("a") as file:
            file.write(text)

    def steps(self, first, last, time_s=1.5):
        for step in range(first, last):
            self.says(
                f"Training epoch 0, iteration {step}/{self.planned - 1} | lr: 1e-06 | global_batch_size: 32 | "
                f"global_step: {step} | reduced_train_loss: {12 - step / 10:.4} | train_step_timing in s: {time_s} | "
                f"consumed_samples: {32 * (step + 1)}\n"
            )

    def ends(self, status=0):
        self.says(f"`Trainer.fit` stopped: `max_steps={self.planned}` reached.\nftgen: exit status {status}\n")


def look(top, jobs=None, later_s=0.0):
    return Follower([top], queue=lambda: jobs, clock=lambda: time.time() + later_s).look()


def test_a_run_is_as_far_as_its_log(tmp_path):
    job = Job(tmp_path)
    assert line(look(tmp_path)[0]) == f"{EXPERIMENT} 7: running, step 0/–, – s, loss –"
    job.steps(0, 10)
    assert line(look(tmp_path)[0]) == f"{EXPERIMENT} 7: running, step 10/40, 1.5 s, loss 11.1, 00:00:45 left"
    job.steps(10, 40)
    job.ends()
    (run,) = look(tmp_path)
    assert (run.state, run.over, run.eta_s) == ("complete", True, None)


def test_a_line_that_is_being_written_does_not_count_yet(tmp_path):
    job = Job(tmp_path)
    job.steps(0, 3)
    job.says("Training epoch 0, iteration 3/39 | global_step: 3 | reduced_train_loss: 11.7 | train_step_timing in s: 1")
    assert look(tmp_path)[0].run.steps == 3


def test_the_queue_has_its_say(tmp_path):
    Job(tmp_path).steps(0, 5)
    (run,) = look(tmp_path, {"7": "pending (Priority)"})
    assert (run.state, run.over) == ("pending (Priority)", False)
    (run,) = look(tmp_path, {}, later_s=120)
    assert (run.state, run.over) == ("incomplete", True)  # the job is gone and left nothing behind
    (run,) = look(tmp_path, {})
    assert not run.over  # it may have ended a moment ago, with its last lines on their way


def test_silence_is_said_and_is_no_end(tmp_path):
    Job(tmp_path).steps(0, 5)
    (run,) = look(tmp_path, later_s=3600)
    assert run.state.startswith("silent since ")
    assert not run.over


def test_a_failure_is_an_end(tmp_path):
    job = Job(tmp_path)
    job.steps(0, 5)
    job.says("[rank3]: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB\n")
    (run,) = look(tmp_path)
    assert (run.state, run.over) == ("failed", True)
    assert "out of GPU memory" in line(run)


def test_a_log_is_read_again_only_when_it_has_changed(tmp_path):
    job = Job(tmp_path)
    job.steps(0, 5)
    follower = Follower([tmp_path], queue=lambda: None)
    first = follower.look()[0].run
    assert follower.look()[0].run is first
    job.steps(5, 6)
    assert follower.look()[0].run.steps == 6


def test_jobs_that_have_yet_to_start_are_waited_for_and_mistyped_paths_are_not(tmp_path):
    assert look(tmp_path) == []
    with pytest.raises(LogError, match="there is no"):
        look(tmp_path / "nowhere")


def watching(*arguments, **options):
    command = [sys.executable, "-m", "ftgen", "watch", "--every", "0.1", *map(str, arguments)]
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # even if a shell runs the tests in the background
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, preexec_fn=heard, **pipes, **options)  # noqa: PLW1509


def test_piped_it_prints_a_line_a_change_and_ends_with_the_last_run(tmp_path):
    job = Job(tmp_path)
    process = watching(tmp_path)
    assert process.stdout.readline().endswith("running, step 0/–, – s, loss –\n")
    job.steps(0, 1)
    assert "step 1/40" in process.stdout.readline()
    time.sleep(0.5)  # nothing changes: nothing is said
    job.steps(1, 40)
    job.ends()
    rest, errors = process.communicate(timeout=30)
    assert rest.splitlines()[-1].endswith("complete, step 40/40, 1.5 s, loss 8.1")
    assert "step 1/40" not in rest
    assert (process.returncode, errors) == (0, "")


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("20_nemo_requeue_resume", ["77: complete, step 100/100"]),  # two files
        ("20b_appended_resume", ["77: complete, step 100/100"]),  # one file
        ("13_swissai_resumed", ["2424: complete, step 300/300"]),  # only the log of the second attempt is there
        ("41_sweep_in_one_job", ["500#1: complete", "500#2: complete", "500#3: complete"]),
    ],
)
def test_resumed_runs_and_several_runs_in_one_file_are_known(case, said):
    output, errors = watching(ROOT / "tests" / "logs" / "people" / case / "logs").communicate(timeout=30)
    assert [line for line, text in zip(output.splitlines(), said, strict=True) if text in line] == output.splitlines()
    assert errors == ""


def test_it_says_what_it_waits_for(tmp_path):
    process = watching(tmp_path)
    assert "no run yet: waiting for a file with step lines" in process.stdout.readline()
    process.kill()
    process.communicate(timeout=30)


def test_piped_it_leaves_cleanly_when_interrupted(tmp_path):
    Job(tmp_path).steps(0, 3)
    process = watching(tmp_path)
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=30)
    assert (process.returncode, rest, errors.strip()) == (130, "", "")


class Terminal:
    """A real one, by tmux, with a server of its own."""

    def __init__(self, folder):
        self.tmux = [program("tmux", "tmux"), "-S", str(folder / "socket"), "-f", "/dev/null"]
        environment = {"PYTHONPATH": str(ROOT), "LC_ALL": "C.UTF-8"}
        self("new-session", "-d", "-x", "110", "-y", "24", "bash --norc --noprofile", env=os.environ | environment)

    def __call__(self, *command, **options):
        return subprocess.run([*self.tmux, *command], capture_output=True, text=True, check=True, **options).stdout

    def shows(self, wanted, seconds=30):
        until = time.monotonic() + seconds
        while wanted not in (screen := self("capture-pane", "-p")):
            assert time.monotonic() < until, f"{wanted!r} is not in\n{screen}"
            time.sleep(0.1)
        return screen


@pytest.fixture
def terminal(tmp_path_factory):
    terminal = Terminal(tmp_path_factory.mktemp("tmux"))
    yield terminal
    terminal("kill-server")


def test_on_a_terminal_a_table_changes_in_place_and_leaves_cleanly(terminal, tmp_path):
    job, other = Job(tmp_path), Job(tmp_path, "8")
    other.steps(0, 40)
    other.ends()
    job.steps(0, 10)
    terminal("send-keys", f"{sys.executable} -m ftgen watch --every 0.1 {tmp_path}; echo code=$?", "Enter")
    screen = terminal.shows("10/40")
    assert screen.index(f"{EXPERIMENT} 7") < screen.index(f"{EXPERIMENT} 8")  # what still runs comes first
    assert "━" in screen
    assert "00:00:45" in screen
    assert terminal("display-message", "-p", "#{cursor_flag}").strip() == "0"
    job.steps(10, 20)
    screen = terminal.shows("20/40")
    assert "10/40" not in screen
    assert screen.count(f"{EXPERIMENT} 7") == 1
    terminal("send-keys", "C-c")
    screen = terminal.shows("code=130")
    assert "20/40" in screen  # the last look stays
    assert "Traceback" not in screen
    assert terminal("display-message", "-p", "#{cursor_flag}").strip() == "1"
