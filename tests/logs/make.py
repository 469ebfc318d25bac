"""Write the logs of the cases in this folder: made up, line by line as NeMo 2 prints them. Run it after a change here.

Each case is a folder with `logs/` as a cluster would have them, and what `ftgen tabulate` is to make of it.
"""

import gzip
import json
import shutil
from pathlib import Path

import zstandard

from ftgen.plan.resolve import resolve
from ftgen.spec.site import Site
from ftgen.spec.spec import Spec

HERE = Path(__file__).parent
WOBBLE = (-0.01, 0.01)  # around the mean, so that the last steps' mean is not any one step's time


def plan(scheme, precision, gpus, max_steps, **more):
    spec = Spec.model_validate({"scheme": scheme, "precision": precision, "gpus": gpus, "max_steps": max_steps} | more)
    return resolve(spec, Site(), name=f"{scheme}_{precision}_{gpus}")


def step_line(step, last, batch, time_s, **keys):
    values = {
        "lr": f"{1e-6 * (step + 1):.4}",
        "global_batch_size": batch,
        "global_step": step,
        "peak_memory_usage": 52613349376,
        "memory_allocated": 34359738368,
        "reduced_train_loss": f"{12 - step / 10:.4}",
        "train_step_timing in s": f"{time_s:.4}",
        "consumed_samples": batch * (step + 1),
    } | keys
    shown = [f"{key.replace('__', ' ')}: {value}" for key, value in values.items() if value is not None]
    return " | ".join([f"Training epoch 0, iteration {step}/{last}", *shown]) + "\n"


def step_lines(steps, batch, mean_s, planned=None, first=0, **keys):
    last = (planned or steps) - 1
    times = [3 * mean_s if step < 5 else mean_s + WOBBLE[step % 2] for step in range(steps)]
    return [step_line(step, last, batch, time_s, **keys) for step, time_s in enumerate(times) if step >= first]


def run(case, experiment, run_id, lines, plan=None, head=None, restart=0, account="acct", name=None):
    folder = HERE / case / "logs" / "experiments" / experiment / f"{experiment}_{run_id}" / experiment
    folder.mkdir(parents=True, exist_ok=True)
    if plan:
        (folder / "plan.json").write_text(plan if isinstance(plan, str) else plan.to_json() + "\n")
    if head:
        lines = [f"ftgen plan: {json.dumps(json.loads(head.to_json()))}\n", *lines]
    name = name or f"log-{account}.{experiment}_{run_id}_{restart}.out"
    (folder / name).write_bytes(b"".join(line if isinstance(line, bytes) else line.encode() for line in lines))


def ended(status=0):
    return ["`Trainer.fit` stopped: `max_steps=25` reached.\n", f"ftgen: exit status {status}\n"]


def labelled(lines, rank=0):
    return [f"{rank}: {line}" for line in lines]


def documented():
    """The recipe's four 8-GPU step times."""
    measured = {("sft", "bf16"): 1.32, ("sft", "fp8"): 0.95, ("lora", "bf16"): 0.92, ("lora", "fp8"): 0.68}
    for (scheme, precision), mean_s in measured.items():
        what = plan(scheme, precision, 8, 25)
        run("documented", what.experiment, 1771198, step_lines(25, 32, mean_s) + ended(), plan=what, head=what)


def sizes():
    """8, 16 and 32 GPUs, one of them twice, and a run of another batch size, for which nothing is published."""
    for gpus, run_id, mean_s in ((8, 101, 0.68), (16, 102, 0.69), (32, 103, 0.7), (16, 99, 0.71)):
        what = plan("lora", "fp8", gpus, 25)
        run("sizes", what.experiment, run_id, step_lines(25, 4 * gpus, mean_s) + ended(), plan=what)
    what = plan("lora", "fp8", 8, 25, global_batch_size=64)
    run("sizes", what.experiment, 104, step_lines(25, 64, 1.3) + ended(), plan=what)


def verdicts():
    """One run for each way of not being right."""
    what = plan("lora", "bf16", 8, 25)
    good = step_lines(25, 32, 0.92)

    def case(run_id, lines):
        run("verdicts", what.experiment, run_id, lines, plan=what)

    nan = step_line(12, 24, 32, 0.92, reduced_train_loss="nan")
    case(1, [*good[:12], nan, *good[13:], *ended()])
    case(2, good[:18])
    case(3, [*good[:23], good[23][:-40]])
    oom = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 79.11 GiB\n"
    trace = ["[rank0]: Traceback (most recent call last):\n", '[rank0]:   File "finetune.py", line 7, in <module>\n']
    case(4, [*good[:1], *trace, f"[rank0]: {oom}", "ftgen: exit status 1\n"])
    limit = "slurmstepd: error: *** STEP 608.0 ON node1 CANCELLED AT 2025-01-01T00:30:00 DUE TO TIME LIMIT ***\n"
    case(5, [*good[:23], limit])
    case(6, [*good, "`Trainer.fit` stopped: `max_steps=25` reached.\n", "ftgen: exit status 134\n"])
    case(7, [*good[:3], *trace, "[rank0]: ValueError: the loader is empty\n", limit.replace(" DUE TO TIME LIMIT", "")])
    case(8, [*good[:15], *good[16:], *ended()])
    case(9, [*good[:24], *ended()])
    case(10, [])
    case(11, ["ftgen: error: HF_TOKEN is not set\n", "  hint: export HF_TOKEN\n", "ftgen: exit status 1\n"])
    case(12, [*good[:6], "RuntimeError: found NaN in local grad norm for bucket #0\n"])
    case(13, [*good[:9], "[rank3]:[E] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7)\n", limit])
    case(14, [*good[:24], good[24].replace("0.91", "nan"), *ended()])


def launcher():
    """As the recipe's own launcher leaves them: no plan, srun's labels, NeMo-Run's names, an older NeMo's memory keys."""
    experiment = "lora_nemo_llama3_8b_bf16_16"
    lines = step_lines(25, 64, 0.924, peak_memory_usage=None, max_memory_reserved=52613349376)
    start = ["0: [NeMo I 2025-01-01 00:00:00 nemo_logging:393] Experiments will be logged\n"]
    run("launcher", experiment, 1771198, [*start, *labelled(lines), "0: [after training is done] datetime: 2025\n"])
    name = "log-acct-acct.sft_nemo_llama3_8b_fp8_8_77_0.out"
    run("launcher", "sft_nemo_llama3_8b_fp8_8", 1736000000, labelled(step_lines(25, 32, 0.95)), name=name)
    unknown = step_lines(25, 32, 0.5, peak_memory_usage=None, memory_allocated=None, lr=None)
    run("launcher", "sft_nemo_llama9_1b_bf16_8", 5, unknown)
    run("launcher", "my-own-thing", 6, unknown)
    without = dict.fromkeys(("lr", "global_batch_size", "global_step"))
    bare = [line.partition(" | ")[2] for line in step_lines(25, 32, 0.92, **without)]
    run("launcher", "lora_nemo_llama3_8b_bf16_8", 7, bare)


def restarts():
    """The highest restart counts; an attempt that is repeated in the same file counts alone; ranks print the same step."""
    what = plan("sft", "fp8", 8, 25)
    requeue = "slurmstepd: error: *** JOB 9 ON node1 CANCELLED AT 2025-01-01T00:10:00 DUE TO JOB REQUEUE ***\n"
    run("restarts", what.experiment, 9, [*step_lines(22, 32, 5.0, planned=25), requeue], plan=what, restart=9)
    run("restarts", what.experiment, 9, step_lines(25, 32, 0.95) + ended(), plan=what, restart=10)
    what = plan("sft", "fp8", 16, 25)
    again = plan("sft", "fp8", 16, 25)
    head = f"ftgen plan: {json.dumps(json.loads(again.to_json()))}\n"
    first = step_lines(22, 64, 5.0, planned=25)
    run("restarts", what.experiment, 11, [*first, requeue, head, *step_lines(25, 64, 0.96), *ended()], head=what)
    what = plan("sft", "fp8", 32, 25)
    both = zip(labelled(step_lines(25, 128, 0.96)), labelled(step_lines(25, 128, 0.9), 8), strict=True)
    run("restarts", what.experiment, 12, [*(line for pair in both for line in pair), *ended()], plan=what)


def plans():
    """Where the plan comes from: the head line, a later ftgen's plan, none that can be read."""
    what = plan("sft", "bf16", 8, 25)
    lines = step_lines(25, 32, 1.32) + ended()
    run("plans", what.experiment, 1, lines, head=what)
    later = json.loads(what.to_json()) | {"format": 9, "weather": {"wind": "west"}}
    run("plans", what.experiment, 2, lines, plan=json.dumps(later, indent=2))
    run("plans", what.experiment, 3, lines, plan='{\n  "format": 1,\n  "experiment": \n')
    wrong = json.loads(what.to_json()) | {"gpus": "8", "seq_length": 0}
    run("plans", what.experiment, 4, lines, plan=json.dumps(wrong), head=what)
    tiny = plan("sft", "fp32", 1, 25, model="tiny_llama", gpu="cpu", global_batch_size=4, seq_length=256)
    run("plans", tiny.experiment, 5, step_lines(25, 4, 0.05, peak_memory_usage=0) + ended(), plan=tiny)
    run("plans", what.experiment, 6, step_lines(25, 64, 1.32) + ended(), plan=what)


def garbled():
    """Lines that are not as they were written, and one that would like to be more than text."""
    lines = [*step_lines(3, 32, 1.0, planned=25), b"ftgen: error: \x1b[31m\xff\xfe | `<b>` [link](x)\x07\n"]
    run("garbled", "sft_nemo_llama3_8b_bf16_8", 1, lines)
    lines = step_lines(25, 32, 1.32)
    lines[9] = lines[9].rstrip("\n") + lines[9]
    lines[10] = lines[10].replace(" | ", " | \x00", 1)
    run("garbled", "sft_nemo_llama3_8b_bf16_8", 2, lines)
    lines = step_lines(25, 32, 1.32)
    killed = "slurmstepd: error: *** STEP 608.0 ON node1 CANCELLED AT 2025-01-01T00:30:00 DUE TO PREEMPTION ***\n"
    lines[24] = lines[24].partition("1.31")[0] + "1.3" + killed
    run("garbled", "sft_nemo_llama3_8b_bf16_8", 3, lines)
    crlf = [line.replace("\n", "\r\n") for line in step_lines(25, 32, 1.32)]
    run("garbled", "sft_nemo_llama3_8b_bf16_8", 4, crlf)


def bar(step, steps, batch, time_s):
    """As Lightning's progress bar prints a step: its count is from 1, its numbers have few digits."""
    values = {
        "reduced_train_loss": f"{12 - step / 10:.3f}",
        "global_step": f"{step:.2f}",
        "consumed_samples": f"{batch * (step + 1):.1f}",
        "train_step_timing in s": f"{time_s:.3f}",
    }
    said = ", ".join(f"{key}={value}" for key, value in values.items())
    share = (step + 1) / steps
    return f"Epoch 0: : {share:4.0%}|{'█' * int(10 * share)}| {step + 1}/{steps} [00:{step % 60:02}<00:30, {said}]"


def megatron(step, steps, batch, time_s, flops, loss="8.114214E+00", grad_norm="0.042", skipped=0, nan=0):
    """As Megatron-Bridge prints a step: two lines, of two ranks; counted from 1, in milliseconds."""
    cells = [
        f" [2025-12-22 15:18:{step % 60:02}] iteration {step + 1:8}/{steps:8} ",
        f" consumed samples: {batch * (step + 1):12} ",
        f" elapsed time per iteration (ms): {1000 * time_s:.1f} ",
        " learning rate: 3.000000E-05 ",
        f" global batch size: {batch:5} ",
        f" lm loss: {loss} " if loss else "",
        " loss scale: 1.0 ",
        f" grad norm: {grad_norm} ",
        f" number of skipped iterations: {skipped:3} ",
        f" number of nan iterations: {nan:3} ",
    ]
    return (
        f"Step Time : {time_s:.2f}s GPU utilization: {flops / time_s:.1f}MODEL_TFLOP/s/GPU\n",
        "".join(f"{cell}|" for cell in cells if cell) + "\n",
    )


def times(mean_s, steps=25):
    return [3 * mean_s if step < 5 else mean_s + WOBBLE[step % 2] for step in range(steps)]


def packed(case, experiment, run_id, data, suffix):
    run(case, experiment, run_id, [data], name=f"log-acct-part.{experiment}_{run_id}_0.out{suffix}")


def elsewhere():
    """Logs of other makes: progress bars, Megatron-Bridge, colours, compressed, cut off, and a batch log beside."""
    name = "sft_nemo_llama3_8b_bf16_8"
    bars = [bar(step, 25, 32, time_s) for step, time_s in enumerate(times(1.32))]
    run("elsewhere", name, 1, ["\r".join(text for text in bars for _ in range(3)), "\n"])

    pairs = [megatron(step, 25, 32, time_s, 736) for step, time_s in enumerate(times(1.32))]
    lines = [line for step, pair in enumerate(pairs) for line in (pair if step % 2 else pair[::-1])]
    run("elsewhere", name, 2, ["[before the start of training step] datetime: 2025-12-22 15:18:00\n", *lines])
    lost = megatron(12, 25, 32, 1.32, 736, loss=None, grad_norm="nan")
    run("elsewhere", name, 3, [*lines[:24], *lost, *lines[26:]])
    skipped = megatron(12, 25, 32, 1.32, 736, skipped=1)
    run("elsewhere", name, 4, [*lines[:24], *skipped, *lines[26:]])

    plain = step_lines(25, 32, 1.32)
    colours = [line.replace("1.3", "\x1b[1m1.3\x1b[0m").replace(" | ", "\x1b[90m | \x1b[0m") for line in plain]
    run("elsewhere", name, 5, colours)
    data = "".join(plain).encode()
    packed("elsewhere", name, 6, gzip.compress(data, mtime=0), ".gz")
    packed("elsewhere", name, 7, zstandard.ZstdCompressor().compress(data), ".zst")
    packed("elsewhere", name, 8, gzip.compress(data, mtime=0)[:-200], ".gz")

    run("elsewhere", name, 9, plain[:20])
    limit = "slurmstepd: error: *** JOB 9 ON node1 CANCELLED AT 2025-01-01T00:30:00 DUE TO TIME LIMIT ***\n"
    run("elsewhere", name, 9, [limit], name=f"sbatch_acct.{name}_9.out")


def intervals():
    """Steps that are not all logged: every 10th or 5th, with the mean time of those since; lost lines; the rest unlogged."""
    name = "sft_nemo_llama3_8b_bf16_8"
    seconds = times(1.32, 100)

    def every(steps, interval, planned=None):
        logged = range(interval - 1, steps, interval)
        means = {step: sum(seconds[step + 1 - interval : step + 1]) / interval for step in logged}
        return [megatron(step, planned or steps, 32, mean_s, 736)[1] for step, mean_s in means.items()]

    def case(run_id, lines, done=True):
        run("intervals", name, run_id, [*lines, *(["[after training is done] datetime: 2025-12-22\n"] if done else [])])

    tens, fives = every(100, 10), every(100, 5)
    case(1, tens)
    case(2, fives)
    case(3, [*fives[:7], *fives[8:]])  # a line is lost before the window
    case(4, [*fives[:-2], fives[-1]])  # and in it
    case(5, every(95, 10))  # the last five have no line
    case(6, every(95, 10), done=False)
    case(7, [megatron(0, 100, 32, 3.9, 736)[1], *fives])  # the first has one
    case(8, every(90, 15))
    case(9, every(100, 50))
    case(10, tens[5:])  # goes on from a checkpoint
    case(11, [*fives[:9], fives[9].replace("50/", "48/"), *fives[10:]])
    case(
        12,
        [
            line
            for pair in ((megatron(step, 100, 32, s, 736)) for step, s in list(enumerate(seconds))[4::5])
            for line in pair
        ],
    )
    what = plan("lora", "fp8", 8, 100)
    stopped = [line.replace("25", "100") for line in ended()]
    nemo = [line for step, line in enumerate(step_lines(100, 32, 0.68)) if step % 5 == 4]
    run("intervals", what.experiment, 13, [*nemo, *stopped], plan=what, head=what)
    nemo = [line for step, line in enumerate(step_lines(100, 32, 0.68)) if step % 4 == 0]
    run("intervals", what.experiment, 14, [*nemo, *stopped], plan=what, head=what)


def warned():
    """All steps are there, and yet the figures are not to be trusted."""
    what = plan("sft", "bf16", 8, 25)

    def case(run_id, change, **keys):
        seconds = times(1.32)
        change(seconds)
        lines = [
            step_line(step, 24, 32, time_s, **{key: of(step, time_s) for key, of in keys.items()})
            for step, time_s in enumerate(seconds)
        ]
        run("warned", what.experiment, run_id, lines + ended(), plan=what, head=what)

    def slow(seconds):
        seconds[20] = 2.9

    def throttled(seconds):
        seconds[15:] = [time_s * 1.04 for time_s in seconds[15:]]

    def noisy(seconds):
        seconds[:] = [time_s * (1 + (step * 7 % 10 - 5) / 100) for step, time_s in enumerate(seconds)]

    def steady(seconds):
        pass

    def tflops(step, time_s):
        return f"{1.84e14 * 32 / 8 / time_s / 1e12:.4}"

    case(1, slow)
    case(2, throttled)
    case(3, noisy)
    case(4, steady, TFLOPS_per_GPU=tflops)
    case(5, steady, TFLOPS_per_GPU=lambda *_: "281.5")
    case(6, steady, TFLOPS_per_GPU=lambda step, time_s: tflops(step, 1.0 if step == 10 else time_s))
    case(7, steady, consumed_samples=lambda step, _: 32 * (step + 1) + (step == 22))
    case(8, steady, peak_memory_usage=lambda step, _: 72613349376 if step == 11 else 52613349376)
    case(9, steady, global_batch_size=lambda step, _: 64 if step > 20 else 32)
    other = plan("sft", "bf16", 8, 25, micro_batch_size=2)
    run("warned", what.experiment, 10, step_lines(25, 32, 1.32) + ended(), plan=what, head=other)


if __name__ == "__main__":
    for make in (documented, sizes, verdicts, launcher, restarts, plans, garbled, elsewhere, intervals, warned):
        shutil.rmtree(HERE / make.__name__ / "logs", ignore_errors=True)
        make()
