"""`ftgen setup`: the job that sets a site up, on a real Slurm, with small stand-ins for what it would download."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from cluster import ROOT, SITE, Desk


def setup(desk: Desk, profile: str, *specs: Path) -> Path:
    (desk.folder / "lab.toml").write_text(profile + SITE if "[" not in profile else SITE + profile)
    command = [
        sys.executable,
        "-m",
        "ftgen",
        "setup",
        "--site",
        desk.folder / "lab.toml",
        *specs,
        "--out",
        desk.folder / "out",
    ]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{desk.folder}/out/setup/lab.sh\n"
    assert not list((desk.folder / "out").glob("*.sh"))  # sbatch generated/*.sh does not submit it
    subprocess.run(["shellcheck", desk.folder / "out/setup/lab.sh"], check=True)
    return desk.folder / "out/setup/lab.sh"


def wheels(folder: Path) -> None:
    """Packages of the stack's names that hold next to nothing."""
    modules = {
        "torch": "torch",
        "lightning": "lightning",
        "transformers": "transformers",
        "transformer_engine": "",
        "leptonai": "",
    }
    modules |= {
        "megatron_core": "megatron/core",
        "nemo_toolkit": "nemo/collections/llm",
        "huggingface_hub": "",
        "pyarrow": "",
    }
    versions = {
        "torch": "2.13.0",
        "megatron_core": "0.15.3",
        "nemo_toolkit": "2.7.3",
        "pyarrow": "21.0.0",
        "leptonai": "0.39",
    }
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
    folder.mkdir()
    for name, module in modules.items():
        version = pinned.get(name.replace("_", "-"), pinned.get(name, versions.get(name, "2.9.0")))
        info = f"{name}-{version}.dist-info"
        files = {f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"}
        files[f"{info}/WHEEL"] = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        package = module or name
        files[f"{package}/__init__.py"] = f"__version__ = {version!r}\n"
        beside = ["../lightning.py", "../transformers.py", "../nemo_run.py", "../fiddle.py"]
        beside += ["../nemo/collections/llm/recipes/llama3_8b.py"]
        more = {"transformer_engine": ["pytorch.py"], "nemo_toolkit": beside}
        files |= {f"{name}/{path}".replace("nemo_toolkit/../", ""): "" for path in more.get(name, [])}
        with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
            for path, text in files.items():
                wheel.writestr(path, text)
            wheel.writestr(f"{info}/RECORD", "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"]))


VENV = '[python]\nkind = "venv"\npath = "$STAGE_PATH/venv"\n'


def test_a_virtual_environment_is_built_from_the_pins_once_and_a_broken_one_goes_on(desk):
    script = setup(desk, VENV)
    wheels(desk.folder / "wheels")
    pip = {"PIP_FIND_LINKS": str(desk.folder / "wheels"), "PIP_NO_INDEX": "1"}
    broken = desk.submit(script, **(pip | {"PIP_FIND_LINKS": "/nowhere"}))
    assert desk.ended(broken).exit_code == 1
    first = desk.submit(script, **pip)
    assert desk.ended(first, 120).state == "COMPLETED", desk.everything()
    said = desk.output(first)
    assert "ftgen: megatron.core 0.15.3 in " in said
    assert "ftgen: nemo.collections.llm 2.7.3 in " in said
    assert said.endswith("ftgen: lab is set up\nftgen: exit status 0\n")
    assert {"HF_ckpt", "logs", "venv"} <= {path.name for path in desk.stage.iterdir()}
    again = desk.submit(script, **(pip | {"PIP_FIND_LINKS": "/nowhere"}))
    assert desk.ended(again).state == "COMPLETED", desk.everything()
    assert f"{desk.stage}/venv exists" in desk.output(again)


def test_a_stack_that_cannot_be_imported_fails_the_job(desk):
    script = setup(desk, "")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", desk.folder / "bare"], check=True)
    job = desk.submit(script, FTGEN_PYTHON=str(desk.folder / "bare/bin/python"))
    assert desk.ended(job).exit_code == 1
    said = desk.output(job)
    assert "ftgen: error: the package megatron-core is not installed\n" in said
    assert "ftgen: error: megatron.core cannot be imported: ModuleNotFoundError" in said
    assert "  hint: install ftgen's extra gpu into this Python, or export FTGEN_PYTHON=" in said


@pytest.fixture
def repository(tmp_path: Path) -> tuple[str, str]:
    """A Git repository and a commit of it that is not its last."""
    folder = tmp_path / "repository"

    def git(*words: str) -> str:
        identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
        return subprocess.run(
            ["git", *identity, *words], cwd=folder, check=True, capture_output=True, text=True
        ).stdout.strip()

    (folder / "megatron/core").mkdir(parents=True)
    git("init", "--quiet")
    for version in ("0.15.1", "0.15.2"):
        (folder / "megatron/core/__init__.py").write_text(f"__version__ = '{version}'\n")
        git("add", "-A")
        git("commit", "--quiet", "-m", version)
    return folder.as_uri(), git("rev-parse", "HEAD~1")


def test_other_sources_are_cloned_at_their_commit_and_come_first_on_the_job_s_path(desk, repository, tmp_path):
    url, commit = repository
    wheels(desk.folder / "wheels")
    extra = f'[sources]\nmegatron_lm = {{ url = "{url}", commit = "{commit}" }}\n'
    job_script = desk.compile("spec", site='convert = "task"\n', extra=extra)
    before = desk.submit(job_script)
    assert desk.ended(before).exit_code == 1
    assert f"{desk.stage}/" in desk.log(before)
    assert " is missing\n  hint: ftgen setup" in desk.log(before)
    assert "ftgen setup --site SITE spec.toml clones it" in desk.log(before)
    python = tmp_path / "stack"
    subprocess.run([sys.executable, "-m", "venv", python], check=True)
    found = [str(path) for path in (desk.folder / "wheels").iterdir()]
    subprocess.run([python / "bin/pip", "install", "--quiet", "--no-deps", "--no-index", *found], check=True)
    script = setup(desk, "", desk.folder / "spec.toml")
    for _ in range(2):
        job = desk.submit(script, FTGEN_PYTHON=str(python / "bin/python"))
        assert desk.ended(job).state == "COMPLETED", desk.everything()
    folder = desk.stage / f"Megatron-LM-{commit[:12]}"
    assert f"ftgen: megatron.core 0.15.1 in {folder}/megatron/core\n" in desk.output(job)
    assert f"{folder} exists" in desk.output(job)
    assert desk.ended(desk.submit(job_script)).state == "COMPLETED", desk.everything()


@pytest.mark.parametrize(
    ("kind", "tool", "words", "name"),
    [
        ("container", "enroot", "import --output", "docker://nvcr.io#nvidia/nemo:24.12"),
        ("apptainer", "apptainer", "pull", "docker://nvcr.io/nvidia/nemo:24.12"),
        ("singularity", "singularity", "pull", "docker://nvcr.io/nvidia/nemo:24.12"),
    ],
)
def test_an_image_is_made_once_under_its_name_only_when_it_is_whole(desk, kind, tool, words, name):
    """None of these programs is here: only the command line is looked at, and what becomes of a broken import."""
    profile = f'[python]\nkind = "{kind}"\nimage = "$STAGE_PATH/nemo.img"\nimage_from = "nvcr.io/nvidia/nemo:24.12"\n'
    script = setup(desk, profile)
    tools = desk.folder / "tools"
    tools.mkdir()
    fake = (
        f'#!/bin/bash\necho "{tool} $*"\n[ -e {tools}/works ] || exit 3\n'
        "[ $1 = exec ] || touch $STAGE_PATH/nemo.img.partial\n"
    )
    (tools / tool).write_text(fake)
    (tools / tool).chmod(0o755)
    path = {"PATH": f"{tools}:{desk.cluster.environment['PATH']}"}
    broken = desk.submit(script, **path)
    assert desk.ended(broken).exit_code == 3
    assert not (desk.stage / "nemo.img").exists()
    assert f"{tool} {words} {desk.stage}/nemo.img.partial {name}\n" in desk.output(broken)
    (tools / "works").touch()
    job = desk.submit(script, **path)
    ended = desk.ended(job)
    assert (desk.stage / "nemo.img").exists(), desk.everything()
    if kind == "container":  # Slurm without pyxis does not know the option
        assert ended.state == "FAILED"
        assert "unrecognized option '--container-image=" in desk.output(job)
    else:
        line = f"{kind} exec --no-home --bind {desk.stage}:{desk.stage} {desk.stage}/nemo.img python3 -"
        assert line in desk.output(job)


def test_the_set_up_job_asks_for_what_the_site_wants_and_runs_its_lines_and_variables(desk):
    """The same keys as for the other jobs. Its Python is one that shows its environment."""
    folder = desk.folder / "out of slurm"
    folder.mkdir()
    site = f"""\
gpu_request = "gres"
exclusive = false
cpus_per_gpu = 2
mem_per_cpu = "300"
gres = ["nvme:1"]
job_name_prefix = "acct."
output_folder = "{folder}"
stage_path = "~/stage"
setup_lines = ['export PROXY="http://proxy"; name=x; die() {{ :; }}']
sbatch_flags = ['--comment={{"a": "it is"}}']
[environment]
BOTH = "$PROXY:$NOT_SET:$HOME"
"""
    (desk.folder / "lab.toml").write_text(site)
    command = [sys.executable, "-m", "ftgen", "setup", "--site", desk.folder / "lab.toml", "--out", desk.folder / "out"]
    subprocess.run([str(word) for word in command], check=True, capture_output=True, cwd=ROOT)
    script = desk.folder / "out/setup/lab.sh"
    subprocess.run(["shellcheck", script], check=True)
    desk.python.write_text('#!/bin/sh\necho "it has $BOTH in $STAGE_PATH"\n')
    job = desk.submit(script, STAGE_PATH="", HOME=str(desk.folder))
    ended = desk.ended(job)
    assert ended.state == "COMPLETED", desk.everything()
    for record in ("JobName=acct.ftgen_setup", "CPUs/Task=2", "MinMemoryCPU=300M", "gres:nvme:1", 'Comment={"a": "it is"}'):
        assert record in ended.text
    said = (folder / f"sbatch_ftgen_setup_{job}.out").read_text()
    assert f"it has http://proxy:{desk.folder} in {desk.folder}/stage\n" in said
    assert "ftgen: warning: BOTH refers to $NOT_SET, which is not set\n" in said
