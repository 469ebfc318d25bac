"""Renders the job that sets a site up.

In: a `Site`, its name, and `Plan`s. Out: a bash script (`str`). Pure.

The job creates the folders, the image or the virtual environment, and the source trees, unless they exist. At the end, it
imports the packages that a job needs.
"""

from importlib.metadata import PackageNotFoundError, requires

from ftgen import __version__
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
STACK = ("torch", "lightning", "transformers", "megatron.core", "nemo.collections.llm")
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
    """The setup job of a site for the jobs of `plans`. Without plans: for GPUs, and without source trees."""
    on_a_gpu = not plans or any(plan.gpu.name != "cpu" for plan in plans)
    sources: list[SourcePlan] = list(dict.fromkeys(source for plan in plans for source in plan.sources))
    extra = "gpu" if on_a_gpu else "runtime"
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
            constraints=source_file("constraints.txt").rstrip(),
            check=_check(
                STACK=STACK + (ON_A_GPU if on_a_gpu else ()),
                RECIPES=sorted({plan.model.nemo_recipe for plan in plans}),
                GPU=on_a_gpu,
                HINT=HINTS[site.python.kind].format(extra=extra),
            ),
            end_of_file=END_OF_FILE,
        )
    )


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
