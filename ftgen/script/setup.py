"""Renders the job that sets a site up.

In: a `Site`, its name, and `Plan`s. Out: a bash script (`str`). Pure.

The job creates the folders, the image or the virtual environment, and the source trees, unless they exist. At the end, it
imports the packages that a job needs.
"""

import re
from importlib.metadata import PackageNotFoundError, requires

from ftgen import __version__
from ftgen.errors import Problem, SpecError
from ftgen.files import source_file, source_folder
from ftgen.plan.plan import Plan, SourcePlan
from ftgen.plan.resolve import memory_of_a_node, python_of
from ftgen.script.render import (
    END_OF_FILE,
    bash,
    default_stage_path,
    gpu_request,
    memory_request,
    output_file,
    site_lines,
)
from ftgen.spec.site import Site
from ftgen.units import parse_walltime

WALLTIME = "02:00:00"  # enough for an image of 20 GB, or 3 GB of packages; submitted again, the job continues
# Options of sbatch_flags that are about the nodes and tasks of a run. The set-up job has one node and one task.
OF_SEVERAL_NODES = {"--contiguous", "--segment", "--spread-job", "--switches", "--ntasks-per-socket", "--ntasks-per-core"}
STACK = {
    "nemo": ("torch", "lightning", "transformers", "megatron.core", "nemo.collections.llm"),
    "megatron_bridge": ("torch", "transformers", "megatron.core"),  # compatibility.py makes megatron.bridge importable
}
CONSTRAINTS = {"nemo": "constraints.txt", "megatron_bridge": "constraints-bridge.txt"}
# pip installs these without their own requirements, which do not fit together. See `bridge` in the Makefile of ftgen.
ALONE = re.compile(r"^(?:megatron-(?:bridge|core)|nvidia-resiliency-ext)==.*$", re.MULTILINE)
ON_A_GPU = ("transformer_engine.pytorch",)
OTHER_IMAGE = "set python.image in the site profile to another image: `ftgen list --images` says which fit"
HINTS = {
    "venv": "remove the folder of python.path and submit this script again",
    "container": OTHER_IMAGE,
    "apptainer": OTHER_IMAGE,
    "singularity": OTHER_IMAGE,
    "none": "install ftgen's extra {extra} into this Python, or export FTGEN_PYTHON=<a Python that has it>",
}


def render_setup(site: Site, name: str, plans: list[Plan]) -> str:
    """The setup job of a site for the jobs of `plans`. Without plans: for NeMo on GPUs, and without source trees.

    SpecError: the plans need two environments, or one that ftgen cannot install.
    """
    engine = _engine(site, plans)
    on_a_gpu = not plans or any(plan.gpu.name != "cpu" for plan in plans)
    sources: list[SourcePlan] = list(dict.fromkeys(source for plan in plans for source in plan.sources))
    extra = "bridge" if engine == "megatron_bridge" else "gpu" if on_a_gpu else "runtime"
    constraints = source_file(CONSTRAINTS[engine]).rstrip()
    return (
        bash()
        .get_template("setup.sh.j2")
        .render(
            site=site,
            site_name=name,
            version=__version__,
            sbatch_lines=_sbatch_lines(site),
            python=python_of(site),
            in_job=False,
            site_lines=site_lines(site.modules, site.setup_lines),
            expands=any("$" in text for text in site.environment.values()),
            stage_path=default_stage_path(site.stage_path),
            sources=sources,
            requirements=requirements(extra),
            constraints=constraints,
            alone=ALONE.findall(constraints) if engine == "megatron_bridge" else [],
            check=_check(
                engine,
                STACK=STACK[engine] + (ON_A_GPU if on_a_gpu else ()),
                RECIPES=sorted({str(getattr(plan.model, f"{engine}_recipe")) for plan in plans}),
                GPU=on_a_gpu,
                HINT=HINTS[site.python.kind].format(extra=extra),
            ),
            end_of_file=END_OF_FILE,
        )
    )


def _engine(site: Site, plans: list[Plan]) -> str:
    """The engine of all plans."""
    engines = sorted({plan.engine for plan in plans}) or ["nemo"]
    if len(engines) > 1:
        rule = f"all specs of one set-up must have the same engine, found {' and '.join(engines)}"
        raise SpecError(Problem(("engine",), rule, "set each engine up with a site profile of its own"))
    if engines == ["megatron_bridge"] and site.python.kind == "venv" and any(plan.gpu.name != "cpu" for plan in plans):
        rule = "must not be a virtual environment for Megatron-Bridge on GPUs: no wheel has its Transformer Engine"
        hint = 'set python.kind = "container", and an image that has Megatron-Bridge 0.6: `ftgen list --images`'
        raise SpecError(Problem(("site", "python", "kind"), rule, hint))
    return engines[0]


def _check(engine: str, **values: object) -> str:
    """The program that looks for the packages and imports them: the check of a job, and more."""
    engines = source_folder("runtime") / "engines"
    files = [engines / "installed.py", engines / engine / "packages.py"]
    text = "\n\n".join(file.read_text(encoding="utf-8") for file in files)
    packages = re.sub(r"^from runtime\..*\n", "", text, flags=re.MULTILINE)
    check = (source_folder("templates") / "setup_check.py").read_text(encoding="utf-8")
    settings = "".join(f"{name} = {value!r}\n" for name, value in values.items())
    return f"{packages}\n\n{settings}{check}".rstrip()


def requirements(extra: str) -> list[str]:
    """The requirements of an extra of ftgen, for pip, without ftgen."""
    try:
        lines = requires("ftgen") or []
    except PackageNotFoundError:
        lines = []
    found = []
    for line in lines:
        package, _, marker = line.partition(";")
        if f'"{extra}"' not in marker.replace("'", '"'):
            continue
        found += requirements("runtime") if package.startswith("ftgen[") else [package.strip()]
    assert found, "the metadata of ftgen has no requirements: install ftgen with pip"  # noqa: S101
    return found


def _sbatch_lines(site: Site) -> list[str]:
    options = {
        "job-name": f"{site.job_name_prefix or ''}ftgen_setup",
        "dependency": "singleton",
        "account": site.account,
        "partition": site.partition,
        "qos": site.qos,
        "reservation": site.reservation,
        "constraint": site.constraint,
        "nodes": 1,
        "ntasks": 1,
        "cpus-per-task": site.cpus_per_gpu,
        **gpu_request(site, 1),
        "time": min(WALLTIME, site.max_walltime or WALLTIME, key=parse_walltime),
        **memory_request(site, memory_of_a_node(site)),
        "output": output_file(site.output_folder, "ftgen_setup"),
        "open-mode": "append",
    }
    flags = [flag for flag in site.sbatch_flags if _fits_one_node(flag)]
    return [*(f"--{option}={value}" for option, value in options.items() if value is not None), *flags]


def _fits_one_node(flag: str) -> bool:
    option, _, value = flag.partition("=")
    return option not in OF_SEVERAL_NODES and not (option == "--nodelist" and set(value) & set(",["))
