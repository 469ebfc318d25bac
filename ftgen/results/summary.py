"""A run's figures and its verdict. In: a `Run` and its `Log`. Out: a `Summary`.

The formulas are those of the recipe. A figure that is unknown or invalid is None, and `reason` says why.
"""

from collections.abc import Iterable
from datetime import datetime
from functools import lru_cache, partial
from typing import NamedTuple

from ftgen import catalogue
from ftgen.catalogue import Published
from ftgen.logs.find import Run
from ftgen.logs.identity import Identity
from ftgen.logs.log import Log
from ftgen.logs.many import Progress, read_all
from ftgen.logs.read import read_log
from ftgen.results.energy import energy
from ftgen.results.goodput import goodput
from ftgen.results.interval import Logged, logged
from ftgen.results.options import off, option_of_engine, options, other_work
from ftgen.results.verdict import planned_steps, verdict_of
from ftgen.results.warnings import logged_tflops, warnings
from ftgen.results.window import RECIPE_WINDOW, Timed, Window, checked, count, timed

LORA_WORK = 2 / 3  # of SFT's FLOPs: the frozen weights need no gradients
SECONDS_PER_DAY = 86400
TRILLION = 1e12  # tokens
TERA = 1e12


class Summary(NamedTuple):
    """One run in figures. None means unknown."""

    experiment: str
    run_id: str
    status: str  # of STATUSES
    reason: str | None  # for the status, and for a missing step time
    model: str | None
    scheme: str | None
    precision: str | None
    gpu: str | None
    gpus: int | None
    global_batch_size: int | None
    seq_length: int | None  # tokens
    steps: int  # that the run made, with those that have no line of their own
    window: int  # the number of steps whose mean is the step time
    step_time_s: float | None
    tokens_per_s: float | None
    mfu: float | None  # a fraction
    days_per_1t_tokens: float | None
    peak_memory_gib: float | None
    published: Published | None  # the recipe's figures for the same work
    log: str
    warnings: tuple[str, ...] = ()  # reasons to distrust a figure
    notes: tuple[str, ...] = ()  # facts that explain the figures but are no reason to distrust them
    planned_steps: int | None = None
    window_first: int | None = None  # the window's first and last step, numbered from 0
    window_last: int | None = None
    spread: float | None = None  # standard deviation of the window's step times, as a fraction of their mean
    restarts: int = 0  # earlier attempts, in logs of their own or in this one
    started: datetime | None = None  # by the log, in the cluster's time
    ended: datetime | None = None
    options: tuple[str, ...] = ()  # how the plan differs from the recipe
    tflops_per_gpu: float | None = None  # TFLOP/s, from the step time and the model's FLOPs
    logged_tflops_per_gpu: float | None = None  # TFLOP/s, as the framework logs them: the mean of the window
    engine: str | None = None  # nemo, megatron_bridge
    assumed: tuple[str, ...] = ()  # keys that the experiment's name suggests and the log does not say
    tokens_trained: int | None = None  # of all steps until the last one, with their padding
    validation_loss: float | None = None  # of the last validation
    validation_step: int | None = None  # number of steps before it
    total_time_s: float | None = None  # of all attempts, without the time in the queue
    goodput: float | None = None  # a fraction: time of the steps that count, by total_time_s
    saves: int | None = None
    save_time_s: float | None = None
    save_share: float | None = None  # a fraction of total_time_s
    attempts: tuple[str, ...] = ()  # what each attempt contributed
    joules_per_token: float | None = None  # J, of all GPUs in the window
    gpu_power_w: float | None = None  # W, mean of the GPUs in the window
    sm_clock_mhz: float | None = None  # MHz, mean of the GPUs in the window
    throttled: float | None = None  # a fraction: share of the window in which clocks were held back
    throttle_reasons: tuple[str, ...] = ()  # with the share of each
    max_temperature_c: float | None = None  # °C, of any GPU in the window
    energy_kwh: float | None = None  # kWh, of all GPUs and attempts
    cost: float | None = None  # of the run, in `currency`
    cost_per_million_tokens: float | None = None
    currency: str | None = None

    @property
    def published_step_time_s(self) -> float | None:
        """The recipe's step time for the same work, in seconds."""
        return self.published.step_time_s if self.published else None


def summarize(run: Run, *, window: Window | None = None) -> Summary:
    """Read a run's log and judge it. `window` replaces the plan's window."""
    return judge(run, read_log(run), window=window)


def summarize_all(
    runs: Iterable[Run],
    *,
    window: Window | None = None,
    progress: Progress = lambda _: None,
    processes: int | None = None,
) -> list[Summary]:
    """A summary of each run, in the order of `find_runs`."""
    if window is not None:
        checked(window)
    return read_all(runs, partial(judge, window=window), progress=progress, processes=processes)


def judge(run: Run, log: Log, *, window: Window | None = None) -> Summary:
    """The figures of a log over the steps of `window`, its status and its warnings. LogError for an impossible window."""
    what = log.identity
    window = checked(what.window_steps or RECIPE_WINDOW if window is None else window)
    planned = planned_steps(log)
    lines = logged(log.steps, planned)
    verdict = verdict_of(run, log, planned, lines)
    part = timed(log.steps, window, lines, log.history.interruptions)
    shares = goodput(log)
    validated = max(log.history.validations, default=None)
    time_s = None if verdict.status == "invalid" else part.mean_s
    used = energy(run, log, part._replace(mean_s=time_s), shares.total_time_s)
    tokens = tokens_per_s(what, time_s)
    utilization = model_flops_utilization(what, time_s)
    tflops = utilization * what.peak_flops / TERA if utilization and what.peak_flops else None
    peaks = [step.peak_memory for step in part.steps.values() if step.peak_memory] or list(filter(None, [log.peak_memory]))
    return Summary(
        experiment=what.experiment,
        run_id=run.run_id,
        status=verdict.status,
        reason="; ".join(filter(None, (verdict.reason, None if verdict.status == "invalid" else part.why_not))) or None,
        model=what.model,
        scheme=what.scheme,
        precision=what.precision,
        gpu=what.gpu,
        gpus=what.gpus,
        global_batch_size=what.global_batch_size,
        seq_length=what.seq_length,
        steps=lines.made,
        window=window if isinstance(window, int) else len(window),
        step_time_s=time_s,
        tokens_per_s=tokens,
        mfu=utilization if utilization is None or utilization <= 1 else None,
        days_per_1t_tokens=TRILLION / tokens / SECONDS_PER_DAY if tokens else None,
        peak_memory_gib=max(peaks) / 2**30 if peaks else None,
        tflops_per_gpu=tflops,
        logged_tflops_per_gpu=logged_tflops(log, part),
        published=None if other_work(log.plan or {}) else _published(what),
        log=run.log,
        warnings=(*_impossible(what, utilization), *warnings(what, log, part, tflops), *used.warnings),
        notes=(*_notes(run, log, lines, part), *used.notes),
        planned_steps=planned,
        window_first=part.first,
        window_last=part.last,
        spread=part.spread if time_s else None,
        restarts=max(log.earlier_logs + log.attempts, len(log.history.attempts)) - 1,
        started=log.started,
        ended=log.ended,
        options=options(log.plan, log.environment) if log.plan else option_of_engine(what.engine),
        engine=what.engine,
        assumed=what.assumed,
        tokens_trained=_tokens(what, log.steps.last + 1),
        validation_loss=None if validated is None else log.history.validations[validated],
        validation_step=None if validated is None else validated,
        **shares._asdict(),
        **{name: value for name, value in used._asdict().items() if name not in {"warnings", "notes"}},
    )


def tokens_per_s(what: Identity, time_s: float | None) -> float | None:
    """seq_length x global_batch_size / step time."""
    if not (time_s and what.seq_length and what.global_batch_size):
        return None
    return what.seq_length * what.global_batch_size / time_s


def model_flops_utilization(what: Identity, time_s: float | None) -> float | None:
    """global_batch_size x FLOPs per sample / step time / GPUs / peak, as a fraction; two thirds of it for LoRA."""
    if not (time_s and what.global_batch_size and what.flops_per_sample and what.gpus and what.peak_flops):
        return None
    work = LORA_WORK if what.scheme == "lora" else 1.0
    return what.global_batch_size * what.flops_per_sample * work / time_s / what.gpus / what.peak_flops


def _impossible(what: Identity, utilization: float | None) -> list[str]:
    """An MFU above 100%: the GPU, the sequence length or the batch is not what it is taken for."""
    if utilization is None or utilization <= 1:
        return []
    rest = "the GPU, the sequence length or the batch is not what it is taken for"
    return [f"the MFU would be {utilization:.0%} of the {(what.gpu or '').upper()}'s peak: {rest}"]


def _tokens(what: Identity, steps: int) -> int | None:
    """Tokens of so many steps, with padding."""
    if not (what.seq_length and what.global_batch_size and steps):
        return None
    return steps * what.global_batch_size * what.seq_length


def _notes(run: Run, log: Log, lines: Logged, window: Timed) -> list[str]:
    """Facts that explain the figures but are no reason to distrust them."""
    notes = [f"the log has a step line every {lines.every} steps"] if lines.every > 1 else []
    if log.earlier_logs:
        notes.append(f"this is restart {run.restart}; the figures leave out {count(log.earlier_logs, 'earlier log')}")
    if log.resumes:
        notes.append(f"the run was resumed {count(log.resumes, 'time')}; the steps of its attempts count together")
    if log.attempts - log.resumes > 1:
        notes.append(f"the log has {log.attempts} attempts; only the steps of the last one count")
    if lines.first:
        notes.append(f"the log begins with step {lines.first}: the run was resumed, or the beginning of its log is missing")
    if (other := other_work(log.plan or {})) and _published(log.identity):
        notes.append(f"not compared with the recipe's published figures: this run did other work ({', '.join(other)})")
    if window.left_out:
        left_out = count(window.left_out, "step")
        notes.append(f"the step time is without {left_out} of the window, directly after a save, a validation or a resume")
    if log.survived:
        first = min(log.survived.values(), key=lambda told: told.row or 0)
        notes.append(f"the run went on after: {first.note}" + (f" (line {first.row})" if first.row else ""))
    notes += [f"{name} was off: {lacking}" for name, lacking in off(log.environment).items()]
    if log.identity.assumed:
        assumed = (f"{key} {getattr(log.identity, key)}" for key in log.identity.assumed)
        notes.append(f"assumed, because the log does not say it: {', '.join(assumed)}")
    return notes


@lru_cache
def _published(what: Identity) -> Published | None:
    """The recipe's figures for the same number of tokens in a step, on any GPU; None if there are none."""
    if not (what.model and what.scheme and what.precision and what.gpus):
        return None
    row = catalogue.published_for(what.model, what.scheme, what.precision, what.gpus)
    same = row and (row.global_batch_size, row.seq_length) == (what.global_batch_size, what.seq_length)
    return row if same else None
