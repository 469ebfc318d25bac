"""Runs made up in memory, for tests of what is made of them."""

from ftgen.logs.find import Run
from ftgen.logs.identity import from_name
from ftgen.logs.log import Log
from ftgen.logs.step import Step
from ftgen.logs.steps import Steps
from ftgen.results.summary import judge


def log_of(experiment, times, batch=32):
    steps = {step: Step(time_s, 1.0, planned=len(times)) for step, time_s in enumerate(times)}
    return Log(from_name(experiment)._replace(global_batch_size=batch), steps=Steps(steps))


def summary_of(experiment, times, batch=32, window=None, run_id="1"):
    run = Run(experiment, run_id, f"logs/log-a.b_{run_id}_0.out", 0, 0, None)
    return judge(run, log_of(experiment, times, batch), window=window)


# Names that would like to be more than text.
EVIL = [
    "=1+1",
    "＝1+1",
    "@x",
    "-2|3",
    " \t+cmd",
    "[red]a[/red]",
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(1)>",
    '"><svg onload=alert(1)>',
    "javascript:alert(1)",
    "{{ 7 * 7 }}{% raw %}",
    "a\nb\r\x1b[31mc",
    "\x1b]8;;http://x\x07y",
    "\u202egnp",
    "\udcff",
    "`*_x_*`",
    r"\input{/etc/passwd}",
    r"\\ & % $ # _ { } ~ ^ ' '' ` `` -- --- ?` << >> \"",
    "\\end{tabular}\\immediate\\write18{x}",
    "naïve–±中文🙂",
]
