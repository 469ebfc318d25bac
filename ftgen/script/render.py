"""Renders a plan to its script and its entrypoint. In: a `Plan`. Out: texts by file name (`dict[str, str]`). Pure."""

import json
import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ftgen.files import source_folder
from ftgen.plan.plan import Plan, SlurmPlan
from ftgen.plan.site_rules import IN_AN_IMAGE
from ftgen.script.paths import path_in_bash
from ftgen.spec.site import Site
from ftgen.spec.spec import is_one_line
from ftgen.units import format_walltime

END_OF_FILE = "END_OF_FTGEN_FILE"
AGAIN = 85  # exit code of a run that was saved before its last step, as in runtime/job/stop.py
GRACE_S = 20  # seconds from SIGTERM to SIGKILL when a job ends its tasks; the default of Slurm's KillWait is 30

# Variables of sbatch (man sbatch 22.05), by the header's option that each overrides; and variables that add an option.
SBATCH_OVERRIDES = {
    "account": "SBATCH_ACCOUNT",
    "constraint": "SBATCH_CONSTRAINT",
    "exclusive": "SBATCH_EXCLUSIVE",
    "gpus-per-node": "SBATCH_GPUS_PER_NODE",
    "gres": "SBATCH_GRES",
    "job-name": "SBATCH_JOB_NAME",
    "mem": "SBATCH_MEM_PER_NODE",
    "mem-per-cpu": "SBATCH_MEM_PER_CPU",
    "mem-per-gpu": "SBATCH_MEM_PER_GPU",
    "no-requeue": "SBATCH_NO_REQUEUE",
    "open-mode": "SBATCH_OPEN_MODE",
    "output": "SBATCH_OUTPUT",
    "partition": "SBATCH_PARTITION",
    "qos": "SBATCH_QOS",
    "requeue": "SBATCH_REQUEUE",
    "reservation": "SBATCH_RESERVATION",
    "signal": "SBATCH_SIGNAL",
    "time": "SBATCH_TIMELIMIT",
}
SBATCH_ADDS = (
    "SBATCH_ARRAY_INX",
    "SBATCH_CLUSTERS",
    "SBATCH_CORE_SPEC",
    "SBATCH_CPUS_PER_GPU",
    "SBATCH_GPUS",
    "SBATCH_GPUS_PER_NODE",
    "SBATCH_GPUS_PER_TASK",
    "SBATCH_GRES",
    "SBATCH_MEM_PER_CPU",
    "SBATCH_MEM_PER_GPU",
    "SBATCH_MEM_PER_NODE",
    "SBATCH_NO_REQUEUE",
    "SBATCH_OVERCOMMIT",
    "SBATCH_REQUEUE",
    "SBATCH_THREADS_PER_CORE",
)
# Options that tell how a step uses its nodes. The training's srun gets those of sbatch_flags: an srun in a job does not read
# --cpus-per-task of the job since Slurm 22.05 (its release notes), and the script drops the variables for the others.
STEP_OPTIONS = ("--cpus-per-task", "--hint", "--threads-per-core", "--cpu-freq", "--mem-bind", "--network", "--profile")


# Options of the header that the conversion job must not have: it has one task. sbatch refuses two ways to request memory.
ONLY_OF_RUNS = ["dependency", "exclusive", "gres", "gpus-per-node", "ntasks-per-node", "segment", "mem(-per-[cg]pu)?"]
ONLY_OF_RUNS += ["contiguous", "spread-job", "switches"]
# A shell that is not a login shell may lack the function `module`: these files of Lmod and Environment Modules define it.
FIND_MODULE = (
    'for init in "$LMOD_PKG/init/bash" "$MODULESHOME/init/bash" /etc/profile.d/{lmod,z00_lmod,modules}.sh; do '
    'type -t module >/dev/null && break; [[ ! -r $init ]] || . "$init"; done; true'
)


class Verbatim(str):
    """Text that a bash template does not quote, because it is already safe in its place."""

    __slots__ = ()


def render(plan: Plan) -> dict[str, str]:
    """`<name>.sh`, a script that needs no other file, and `<name>.py`, its entrypoint."""
    entrypoint = _python().get_template("entrypoint.py.j2").render(plan=plan, plan_json=plan.to_json())
    files = {f"{plan.name}.py": entrypoint, **_runtime(plan.engine)}
    script = (
        bash()
        .get_template("job.sh.j2")
        .render(
            plan=plan,
            summary=summary(plan),
            point=assignments(plan.point),
            overrides=shlex.join(word for text in assignments(plan.overrides) for word in ("--set", text)),
            sbatch_lines=sbatch_lines(plan),
            sbatch_variables=_sbatch_variables(plan),
            convert_options=_convert_options(plan),
            grace_s=GRACE_S,
            again=AGAIN,
            save_wait_s=_save_wait_s(plan),
            stage_path=default_stage_path(plan.stage_path),
            interpreter=_interpreter(plan),
            srun_flags=plan.slurm.srun_flags,
            step_flags=_step_flags(plan.slurm),
            in_job=True,
            in_image=plan.python.kind in IN_AN_IMAGE,
            site_lines=site_lines(plan.modules, plan.setup_lines),
            expands=plan.python.kind not in IN_AN_IMAGE and any("$" in text for text in plan.environment.values()),
            only_of_runs=Verbatim("|".join(ONLY_OF_RUNS)),
            folders=sorted({str(Path(path).parent) for path in files} - {"."}),
            files=sorted(files.items()),
            end_of_file=Verbatim(END_OF_FILE),
        )
    )
    return {f"{plan.name}.sh": script, f"{plan.name}.py": entrypoint}


def assignments(document: dict[str, Any], prefix: str = "") -> list[str]:
    """Every `key.path=value` of a document, in the syntax of --set."""
    found = []
    for key, value in document.items():
        if isinstance(value, dict):
            found += assignments(value, f"{prefix}{key}.")
        else:
            found.append(f"{prefix}{key}={value if isinstance(value, str) else json.dumps(value)}")
    return found


def summary(plan: Plan) -> str:
    """One line that describes the run."""
    scheme = {"lora": "LoRA", "sft": "SFT"}[plan.scheme]
    where = f"{plan.nodes} node{'s' * (plan.nodes > 1)} of {plan.gpus_per_node} {plan.gpu.name}"
    return f"{scheme} {plan.precision.upper()} fine-tuning of {plan.model.name} on {where}"


def job_name(plan: Plan) -> str:
    """One name for all jobs of a model: with `singleton`, Slurm runs one at a time. --comment distinguishes them."""
    return f"{plan.slurm.job_name_prefix or ''}ftgen_{plan.model.name}"


def sbatch_lines(plan: Plan) -> list[str]:
    """The options after #SBATCH, in their long form."""
    slurm = plan.slurm
    requeue = {True: ["--requeue"], False: ["--no-requeue"], None: []}[slurm.requeue]
    options = {
        "job-name": job_name(plan),
        "dependency": "singleton",
        "comment": None if any(flag.startswith("--comment") for flag in slurm.sbatch_flags) else plan.experiment,
        "account": slurm.account,
        "partition": slurm.partition,
        "qos": slurm.qos,
        "reservation": slurm.reservation,
        "constraint": slurm.constraint,
        "nodes": plan.nodes,
        "segment": slurm.segment,
        "ntasks-per-node": plan.gpus_per_node,
        "cpus-per-task": slurm.cpus_per_gpu,
        **gpu_request(slurm, plan.gpus_per_node),
        "time": format_walltime(slurm.walltime_s),
        "signal": f"B:USR1@{slurm.end_before_limit_s}",
        **memory_request(slurm, slurm.mem),
        "output": output_file(slurm.output_folder, plan.experiment),
        "open-mode": "append",
    }
    lines = [f"--{option}={value}" for option, value in options.items() if value is not None]
    return [*lines, *(["--exclusive"] if slurm.exclusive else []), *requeue, *slurm.sbatch_flags]


def _step_flags(slurm: SlurmPlan) -> list[str]:
    """Options of the training's srun that the header has too."""
    flags = [f"--cpus-per-task={slurm.cpus_per_gpu}"] if slurm.cpus_per_gpu else []
    return flags + [flag for flag in slurm.sbatch_flags if flag.partition("=")[0] in STEP_OPTIONS]


def site_lines(modules: list[str], setup_lines: list[str]) -> list[str]:
    """The lines of bash that a job runs before Python."""
    return [*([FIND_MODULE] if modules else []), *(f"module load {shlex.quote(module)}" for module in modules), *setup_lines]


def gpu_request(site: Site | SlurmPlan, count: int) -> dict[str, str]:
    """The sbatch options that request `count` GPUs of each node, and its other resources. May be empty."""
    gpus = f"{site.gpu_type}:{count}" if site.gpu_type else str(count)
    gres = [f"gpu:{gpus}"] if site.gpu_request == "gres" else []
    request = {"gpus-per-node": gpus} if site.gpu_request == "gpus-per-node" else {}
    return request | ({"gres": ",".join([*gres, *site.gres])} if gres or site.gres else {})


def memory_request(site: Site | SlurmPlan, mem: str | None) -> dict[str, str | None]:
    """The sbatch option that requests memory; `mem` is that of a node. Slurm accepts only one of them."""
    return {"mem": mem, "mem-per-cpu": site.mem_per_cpu, "mem-per-gpu": site.mem_per_gpu}


def output_file(folder: str | None, name: str) -> str:
    """Slurm's own output file; %j is the number of the job. Without a folder, in the folder of the submission."""
    return str(Path(folder or "", f"sbatch_{name}_%j.out"))


def _convert_options(plan: Plan) -> list[str]:
    """sbatch options of the conversion job, which the user's override. Its script lacks the options ONLY_OF_RUNS."""
    slurm = plan.slurm
    options = {
        "dependency": "singleton",
        "nodes": 1,
        "ntasks": 1,
        **gpu_request(slurm, 1),
        "time": format_walltime(slurm.convert_walltime_s),
    }
    if not any(flag.startswith("--mem") for flag in slurm.convert_flags):
        options |= memory_request(slurm, slurm.mem)
    return [f"--{option}={value}" for option, value in options.items() if value is not None]


def _sbatch_variables(plan: Plan) -> list[tuple[str, str]]:
    """Variables of the submitting shell that change the request of the header, each with the value of the header."""
    header = {option: value for option, _, value in (line[2:].partition("=") for line in sbatch_lines(plan))}
    overridden = [(variable, header[option]) for option, variable in SBATCH_OVERRIDES.items() if option in header]
    return sorted((dict.fromkeys(SBATCH_ADDS, "") | dict(overridden)).items())


def default_stage_path(stage_path: str | None) -> Verbatim:
    """The default of STAGE_PATH, for bash."""
    return Verbatim(path_in_bash(stage_path) if stage_path else "${SLURM_SUBMIT_DIR:-$PWD}")


def _save_wait_s(plan: Plan) -> int:
    """Seconds that a training may take to save and stop after Slurm's warning: the rest is for ending it."""
    lead_s = plan.slurm.end_before_limit_s
    return lead_s - min(15, lead_s // 3)


def _interpreter(plan: Plan) -> str:
    path = plan.python.path
    return f"{path}/bin/python" if plan.python.kind == "venv" else path or "python3"


@cache
def _runtime(engine: str) -> dict[str, str]:
    """The texts of the runtime's files that a job of this engine needs, by their path in a run directory."""
    folder = source_folder("runtime")
    paths = [path for path in sorted(folder.rglob("*.py")) if _is_for(engine, path.relative_to(folder))]
    files = {f"runtime/{path.relative_to(folder).as_posix()}": path.read_text(encoding="utf-8") for path in paths}
    clash = [path for path, text in files.items() if END_OF_FILE in text.splitlines() or not text.endswith("\n")]
    assert not clash, f"these files cannot be in a here-document: {clash}"  # noqa: S101 - our own files
    return files


def _is_for(engine: str, path: Path) -> bool:
    """Whether a job of the engine needs the file: it is not in the folder of another engine."""
    return not (path.parts[0] == "engines" and len(path.parts) > 2) or path.parts[1] == engine


def _environment(**options: Any) -> Environment:
    return Environment(
        loader=FileSystemLoader(source_folder("templates")),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # noqa: S701 - bash and Python, not HTML
        **options,
    )


def _python() -> Environment:
    return _environment()


def bash() -> Environment:
    """The environment for bash: every {{ value }} is one shell word, unless a filter makes it safe for another place."""
    environment = _environment(finalize=_quote, comment_start_string="<#", comment_end_string="#>")  # ${#array[@]}
    environment.filters |= {
        "comment": lambda text: Verbatim(" ".join(str(text).split())),
        "directive": _directive,
        "path": lambda path: Verbatim(path_in_bash(path)),
        "verbatim": Verbatim,
        "words": lambda words: Verbatim(shlex.join(words)),
    }
    return environment


def _quote(value: Any) -> str:
    return value if isinstance(value, Verbatim) else shlex.quote(str(value))


def _directive(line: str) -> Verbatim:
    """An option after #SBATCH, or the name of a variable: one word.

    sbatch (src/sbatch/opt.c) reads quotes, and a backslash takes the next character as it is. It expands no variable in
    --comment and the like. An unquoted # begins a comment.
    """
    if re.fullmatch(r"[A-Za-z0-9_.,:&|()\[\]*/%+@=-]+", line):
        return Verbatim(line)
    option, _, value = line.partition("=")
    assert re.fullmatch("--[A-Za-z0-9-]+", option), line  # noqa: S101 - ftgen.plan.flags checks it
    assert is_one_line(value), line  # noqa: S101 - site.py checks it
    return Verbatim(option + '="' + re.sub(r'(["\\])', r"\\\1", value) + '"')
