"""Jobs in images. pyxis, enroot, apptainer and singularity are not here: stand-ins record their command lines, and set the
variables that an image has. What the real programs make of these command lines is not tested."""

import shutil

import pytest
from cluster import SITE, Desk

TASK = 'convert = "task"\n'
OF_THE_IMAGE = {"MASTER_ADDR": "of-the-image", "MASTER_PORT": "1", "LD_LIBRARY_PATH": "/image/lib", "NCCL_DEBUG": "image"}
ENVIRONMENT = '[environment]\nLD_LIBRARY_PATH = "/opt/x/lib:$LD_LIBRARY_PATH"\nNCCL_DEBUG = "WARN"\n'
SHOW = "MASTER_ADDR MASTER_PORT LD_LIBRARY_PATH PROGRAM_STARTED_WITH NCCL_DEBUG"


def stand_in(desk: Desk, name: str, body: str) -> dict[str, str]:
    """A program in front of all others on PATH."""
    tools = desk.folder / "tools"
    tools.mkdir(exist_ok=True)
    (tools / name).write_text(f'#!/bin/bash\nprintf "{name} %s\\n" "$*" >>$STAGE_PATH/lines\n{body}\n')
    (tools / name).chmod(0o755)
    return {"PATH": f"{tools}:{desk.cluster.environment['PATH']}"}


def as_the_image_says() -> str:
    return "export " + " ".join(f"{name}={value}" for name, value in OF_THE_IMAGE.items())


def pyxis(desk: Desk) -> dict[str, str]:
    """An srun that knows pyxis's options as far as it shows them, and then is the real one."""
    real = shutil.which("srun")
    body = "words=() in=\nfor word; do case $word in\n--container-image=*) in=yes ;;&\n--container-*|--no-container-*) ;;\n"
    body += f'*) words+=("$word") ;;\nesac; done\n[[ -z $in ]] || {as_the_image_says()}\nexec {real} "${{words[@]}}"'
    return stand_in(desk, "srun", body)


def lines(desk: Desk) -> list[str]:
    return (desk.stage / "lines").read_text().splitlines()


def test_the_variables_of_the_job_win_over_those_of_an_image_and_search_paths_extend_the_image_s(desk):
    site = f'{TASK}{SITE}master_addr = "10.1.2.3"\n[python]\nkind = "container"\nimage = "/images/nemo.sqsh"\n{ENVIRONMENT}'
    job = desk.submit(desk.compile("spec", gpus=2, site=site), PROGRAM_SHOW=SHOW, LD_LIBRARY_PATH="/host/lib", **pyxis(desk))
    assert desk.ended(job).state == "COMPLETED", desk.everything()
    assert desk.shown(job, "MASTER_ADDR") == ["10.1.2.3"] * 2
    assert set(desk.shown(job, "MASTER_PORT")) == {str(20000 + job % 10000)}
    assert desk.shown(job, "NCCL_DEBUG") == ["WARN"] * 2
    assert desk.shown(job, "LD_LIBRARY_PATH") == ["/opt/x/lib:/image/lib"] * 2
    assert desk.shown(job, "PROGRAM_STARTED_WITH") == ["/opt/x/lib:/image/lib"] * 2  # Python was started again with it


def test_one_container_serves_all_steps_and_named_variables_enter_before_the_image_s_own(desk):
    python = '[python]\nkind = "container"\nimage = "nvcr.io/nvidia/nemo:24.12"\ncontainer_name = true\n'
    python += 'container_env = ["UCX_TLS", "MY_VARIABLE"]\nmounts = ["~/data:/data:ro"]\n'
    job = desk.submit(desk.compile("spec", gpus=2, site=TASK + SITE + python), HOME="/home/of-me", **pyxis(desk))
    assert desk.ended(job).state == "COMPLETED", desk.everything()
    mounts = f"{desk.stage}:{desk.stage},/home/of-me/data:/data:ro"
    options = f"--container-image=nvcr.io#nvidia/nemo:24.12 --container-mounts={mounts} --no-container-mount-home "
    options += f"--container-writable --container-name=ftgen_{job} --container-env=UCX_TLS,MY_VARIABLE"
    steps = [line for line in lines(desk) if "--container-image" in line]
    assert len(steps) == 3  # check, convert, finetune
    assert all(f" {options} {desk.python} " in line for line in steps)


def test_an_image_that_the_site_says_is_not_written_to_is_not(desk):
    python = '[python]\nkind = "container"\nimage = "/x.sqsh"\nwritable = false\nmount_home = true\n'
    job = desk.submit(desk.compile("spec", site=TASK + SITE + python), **pyxis(desk))
    assert desk.ended(job).state == "COMPLETED", desk.everything()
    assert all("--container-writable" not in line and " --container-mount-home " in line for line in lines(desk))


def test_a_container_needs_pyxis_and_slurm_says_so(desk):
    """There is no pyxis here: Slurm does not know the option, and its line is in the log."""
    site = f'{TASK}{SITE}[python]\nkind = "container"\nimage = "$STAGE_PATH/nemo.sqsh"\n'
    job = desk.submit(desk.compile("spec", gpus=2, site=site))
    assert desk.ended(job).state == "FAILED"
    assert f"unrecognized option '--container-image={desk.stage}/nemo.sqsh'" in desk.log(job)


@pytest.mark.parametrize("program", ["apptainer", "singularity"])
def test_an_image_is_run_by_the_program_of_the_site_with_its_words(desk, program):
    site = f'{TASK}{SITE}shared_paths = ["/data"]\n[python]\nkind = "{program}"\nimage = "$STAGE_PATH/nemo.sif"\n'
    site += f'mounts = ["/a:/b:ro"]\nwritable = true\n{ENVIRONMENT}'
    tools = stand_in(desk, program, f'{as_the_image_says()}\nexec "${{@:(-3)}}"')
    job = desk.submit(desk.compile("spec", gpus=2, site=site), PROGRAM_SHOW=SHOW, HOME=str(desk.folder), **tools)
    assert desk.ended(job).state == "COMPLETED", desk.everything()
    stage = desk.stage
    words = f"--writable-tmpfs --no-home --bind {stage}:{stage},/data:/data,/a:/b:ro {stage}/nemo.sif {desk.python}"
    assert all(line.startswith(f"{program} exec {words} {stage}/logs/") for line in lines(desk))
    assert len(lines(desk)) == 4  # check, convert, and a finetune of each task
    assert desk.shown(job, "PROGRAM_STARTED_WITH") == ["/opt/x/lib:/image/lib"] * 2
    assert "of-the-image" not in desk.log(job)


@pytest.mark.parametrize("program", ["apptainer", "singularity"])
def test_a_program_that_is_not_installed_is_named(desk, program):
    if shutil.which(program):
        pytest.skip(f"{program} is installed")
    job = desk.submit(desk.compile("spec", site=f'{TASK}{SITE}[python]\nkind = "{program}"\nimage = "/x/n.sif"\n'))
    assert desk.ended(job).exit_code == 1
    assert f"ftgen: error: {program} is not installed on node" in desk.log(job)
