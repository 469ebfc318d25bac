"""Any spec compiles to a script that bash reads as it was meant, or is refused with every problem located.

`pytest tests/test_properties.py --hypothesis-profile=long` looks much further, and elsewhere each time.
"""

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import strategies
import tomli
import tomli_w
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from ftgen.documents import has
from ftgen.errors import SpecError
from ftgen.plan.experiments import load_one
from ftgen.plan.plan import Plan
from ftgen.script.paths import VARIABLE
from ftgen.script.render import render, sbatch_lines
from runtime.job import variables

STAGE = "/no such folder/of mine"
# Runs the script's own functions without doing its work, and says what bash then holds, each value ended by a NUL.
PROBE = r"""
die() { printf '%s\0' "$STAGE_PATH"; exit 0; }
module() { printf 'module %s\0' "$2"; }
export -f module
scontrol() { echo n1; }
command() { :; }
tell() { :; }
[[ $3 == none ]] || (find_places)
export STAGE_PATH="$1" SLURM_JOB_ID=7 SLURM_JOB_NUM_NODES="$nodes" SLURM_JOB_NODELIST=n1
load_environment finetune
find_python
printf 'python=%s\0' "${python[@]}"
((${#srun_flags[@]} == 0)) || printf 'flag=%s\0' "${srun_flags[@]}"
unpack "$2"
env -0
"""
two_values = st.lists(strategies.raw_text, min_size=2, max_size=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("any")


def load(folder: Path, spec: str | bytes, site: str | bytes = "", overrides: tuple[str, ...] = ()) -> Plan | SpecError:
    for name, text in (("any.toml", spec), ("site.toml", site)):
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    try:
        return load_one(folder / "any.toml", folder / "site.toml", overrides).plan
    except SpecError as error:
        return error


def assert_located(error: SpecError, texts: dict[str, str]) -> None:
    """Each problem names the user's file, and the line of its key where that is said."""
    assert error.problems
    for problem in error.problems:
        assert problem.what
        assert "\n" not in problem.what
        if problem.file == "--set":
            continue
        text = texts[Path(problem.file).name]
        if problem.where and has(tomli.loads(text), problem.where):
            line = text.split("\n")[problem.line - 1] if problem.line else ""
            assert any(tomli_key(key) in line for key in problem.where) or line.lstrip().startswith(('"', "{", "["))


def tomli_key(key: str | int) -> str:
    """A key as tomli_w writes it."""
    return tomli_w.dumps({str(key): 1}).removesuffix(" = 1\n")


@given(spec=strategies.any_spec, site=strategies.any_site)
def test_any_document_compiles_or_is_refused_with_located_problems(folder, spec, site):
    texts = {"any.toml": tomli_w.dumps(spec), "site.toml": tomli_w.dumps(site)}
    result = load(folder, *texts.values())
    if isinstance(result, SpecError):
        assert_located(result, texts)
    else:
        render(result)


@given(text=st.binary(max_size=80) | strategies.hostile_text)
def test_any_file_is_refused_with_its_name(folder, text):
    result = load(folder, text)
    assert isinstance(result, SpecError)
    assert all(Path(problem.file).name == "any.toml" for problem in result.problems)


@example(keys=["sources.nemo"], values=["{}", ""])  # a table that lacks what it needs
@given(
    keys=st.lists(strategies.key_paths | strategies.hostile_text, max_size=2),
    values=st.lists(strategies.raw_text, min_size=2),
)
def test_any_override_is_recorded_or_refused(folder, keys, values):
    overrides = tuple(f"{key}={value}" for key, value in zip(keys, values, strict=False))
    result = load(folder, 'scheme = "lora"\nprecision = "bf16"\ngpus = 8\n', "", overrides)
    if isinstance(result, SpecError):
        assert_located(result, {"any.toml": "", "site.toml": ""})
    else:
        header = render(result)["any.sh"].partition("\n#SBATCH")[0]
        assert all(line.startswith("#") for line in header.split("\n"))
        assert set(result.overrides) == {key.strip() for key in keys[: len(values)]}


HERE = {"PATH": "/usr/bin:/bin", "HOME": "/home/it's me"}  # the job's environment


def expanded(path: str) -> str:
    """A path as a job expands it, with ~ and the variables that the strategies know."""
    path = re.sub(r"\A~(?=/|\Z)", "$HOME", path)
    values = HERE | {"STAGE_PATH": STAGE}
    return re.sub(
        r"\$(?:(PATH|HOME|STAGE_PATH)(?![A-Za-z0-9_])|\{(PATH|HOME|STAGE_PATH)\})", lambda it: values[it[1] or it[2]], path
    )


def paths_of(plan: Plan) -> list[str]:
    """The paths of a plan that a job expands."""
    python = plan.python
    return [path for path in (plan.stage_path, python.path, python.image, *python.mounts) if path]


def in_environment(name: str, text: str, environment: dict[str, str]) -> str:
    """A value of [environment] as the entrypoint expands it, which has the same rules as the script."""
    return variables.expanded(name, text, environment) if "$" in text else text


@settings(max_examples=settings.default.max_examples // 2)
@given(spec=strategies.working_spec, site=strategies.working_site)
def test_bash_reads_back_every_value_and_does_nothing_else(folder, spec, site):
    plan = load(folder, tomli_w.dumps(spec), tomli_w.dumps(site))
    assume(isinstance(plan, Plan))
    named = {name for path in paths_of(plan) for found in VARIABLE.findall(path) for name in found if name}
    assume(named <= {*HERE, "STAGE_PATH"})  # a path with a variable that is not set ends the job
    files = render(plan)
    (folder / "any.sh").write_text(files["any.sh"], newline="\n")
    checked = subprocess.run(["bash", "-n", folder / "any.sh"], capture_output=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, b"")
    seen = values_in_bash(folder, files["any.sh"], plan.stage_path)
    environment = HERE | {"STAGE_PATH": STAGE}
    for name, text in plan.environment.items():
        if "$" in text and plan.python.image:
            assert name not in seen["env"]
            continue
        environment[name] = in_environment(name, text, environment)
        assert seen["env"][name] == environment[name]
    assert seen["stage"] == expanded(plan.stage_path or "")
    assert seen["modules"] == plan.modules
    assert (seen["python"], seen["flags"]) == words_of_srun(plan)
    unpacked = (folder / "unpacked/any.py").read_bytes()
    assert unpacked.decode() == files["any.py"]
    assert plan_in(files["any.py"]) == plan.document()
    assert directives(files["any.sh"]) == sbatch_lines(plan)
    assert {path.name for path in folder.iterdir()} == {"any.toml", "site.toml", "any.sh", "unpacked"}


def words_of_srun(plan: Plan) -> tuple[list[str], list[str]]:
    """The interpreter, and srun's options."""
    python, flags = plan.python, plan.slurm.srun_flags
    mounts = ",".join([f"{STAGE}:{STAGE}", *map(expanded, python.mounts)])
    image = expanded(python.image or "")
    if python.kind == "container":
        home = "--container-mount-home" if python.mount_home else "--no-container-mount-home"
        writable = ["--container-writable"] * python.writable
        name = ["--container-name=ftgen_7"] * python.container_name
        return ["python3"], [*flags, f"--container-image={image}", f"--container-mounts={mounts}", home, *writable, *name]
    if python.kind in {"apptainer", "singularity"}:
        options = ["--nv", *["--writable-tmpfs"] * python.writable, *["--no-home"] * (not python.mount_home)]
        return [python.kind, "exec", *options, "--bind", mounts, image, "python3"], flags
    path = f"{python.path}/bin/python" if python.kind == "venv" else python.path or "python3"
    return [expanded(path)], flags


def values_in_bash(folder: Path, script: str, stage: str | None) -> dict:
    functions = script.rpartition('main "$@"')[0]
    done = subprocess.run(
        ["bash", "-s", STAGE, "unpacked", "none" if stage is None else "some"],
        input=(functions + PROBE).encode(),
        capture_output=True,
        cwd=folder,
        env=HERE,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    said = "" if stage is None else done.stdout.decode().partition("\0")[0]
    values = done.stdout.decode().removeprefix(f"{said}\0").split("\0")
    return {
        "stage": said,
        "modules": [value.removeprefix("module ") for value in values if value.startswith("module ")],
        "python": [value.removeprefix("python=") for value in values if value.startswith("python=")],
        "flags": [value.removeprefix("flag=") for value in values if value.startswith("flag=")],
        "env": dict(value.split("=", 1) for value in values if "=" in value),
    }


def directives(script: str) -> list[str]:
    """What sbatch reads: lines that begin with #SBATCH, up to the first one that is neither empty nor a comment."""
    found = []
    for line in script.split("\n"):
        if line.strip() and not line.startswith("#"):
            break
        if line.startswith("#SBATCH"):
            found += shlex.split(line.removeprefix("#SBATCH "))
    return found


def plan_in(entrypoint: str) -> dict:
    """The plan that an entrypoint carries, which must be JSON as every language reads it."""
    (text,) = re.findall(r'^PLAN = json\.loads\(r"""\n(.*?)\n"""\)$', entrypoint, flags=re.DOTALL | re.MULTILINE)
    return json.loads(text, parse_constant=pytest.fail)


@settings(
    max_examples=max(1, settings.default.max_examples // 25), suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(spec=strategies.any_spec, override=strategies.raw_text)
def test_the_command_line_never_ends_in_a_traceback(ftgen, folder, spec, override):
    (folder / "any.toml").write_text(tomli_w.dumps(spec))
    done = ftgen("compile", folder / "any.toml", "--out", folder / "unpacked", "--set", f"seed={override}")
    assert done.returncode in (0, 1)
    assert "Traceback" not in done.stderr
    assert (done.returncode == 0) == (done.stderr == "")
