"""`ftgen doctor` against a real Slurm and a hub of our own: its findings and its hints."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from cluster import ROOT, Desk

TOKEN = "hf_MarkerThatMustNeverBeSeen"
BARE = {"HF_TOKEN": "", "HF_HOME": "/nonexistent"}


@pytest.fixture
def hub() -> Iterator[str]:
    """A hub where "granted" may be read with the token, all else is gated."""

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            granted = self.headers.get("Authorization") == f"Bearer {TOKEN}" and not self.path.startswith("/meta-llama/")
            self.send_response(200 if granted else 403)
            if not granted:
                self.send_header("X-Error-Code", "GatedRepo")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def doctor(desk: Desk, profile: str, *specs: str, cwd: Path = ROOT, **environment: str) -> tuple[int, str]:
    (desk.folder / "site.toml").write_text(profile)
    env = desk.cluster.environment | {"STAGE_PATH": str(desk.stage), "FTGEN_PYTHON": sys.executable} | BARE | environment
    command = [sys.executable, "-m", "ftgen", "doctor", "--site", str(desk.folder / "site.toml"), *specs]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env, cwd=cwd)
    assert TOKEN not in done.stdout + done.stderr
    return done.returncode, done.stdout


def test_a_healthy_site_passes(desk, hub):
    desk.compile("spec", gpus=16)
    spec = str(desk.folder / "spec.toml")
    status, said = doctor(desk, 'gpu_request = "gres"\n', spec, HF_TOKEN=TOKEN, HF_ENDPOINT=hub)
    assert status == 0, said
    assert "ok     Slurm answers: slurm-wlm" in said
    assert "ok     spec: 2 x 8 GPUs: Slurm accepts the job" in said
    assert "has the packages that the job needs" in said
    assert "ok     the hub gives access to ftgen/tiny-llama with your token" in said
    assert not desk.queue()  # nothing was queued


@pytest.mark.parametrize(
    ("profile", "refusal", "hint"),
    [
        ('partition = "nowhere"\n', "invalid partition specified: nowhere", "sinfo -s shows the partitions"),
        ('gpu_request = "gres"\ngpu_type = "a100"\n', "Requested node configuration is not available", "sinfo -o"),
        ("gpus_per_node = 2\n", "", "gpus in the spec"),
        ('reservation = "none"\n', "Requested reservation is invalid", "scontrol show reservation"),
        ('constraint = "blue"\n', "Invalid feature specification", ""),
    ],
)
def test_a_request_that_slurm_refuses_is_told_before_it_is_queued(desk, profile, refusal, hint):
    status, said = doctor(desk, profile, "specs/lora_bf16_16.toml")
    assert status == 1
    assert "FAIL   lora_bf16_16: " in said
    assert refusal in said
    assert hint in said


def test_a_share_of_a_node_without_its_cpus_and_a_missing_output_folder_are_told(desk):
    status, said = doctor(desk, 'exclusive = false\noutput_folder = "/no/such folder"\n')
    assert status == 1
    assert "warn   exclusive = false without cpus_per_gpu: " in said
    assert "FAIL   output_folder: /no/such folder is not a folder that you can write to\n       hint: create it" in said
    said = doctor(desk, f'exclusive = false\ncpus_per_gpu = 2\noutput_folder = "{desk.folder}"\n')[1]
    assert "cpus_per_gpu" not in said
    assert "output_folder" not in said


def test_a_gated_model_is_explained(desk, hub):
    status, said = doctor(desk, "", HF_TOKEN=TOKEN, HF_ENDPOINT=hub)
    assert status == 1
    assert "meta-llama/Meta-Llama-3-8B is gated, and the account of this token has no access (403)" in said
    assert "request access on https://huggingface.co/meta-llama/Meta-Llama-3-8B" in said
    status, said = doctor(desk, "", HF_ENDPOINT=hub)
    assert "meta-llama/Meta-Llama-3-8B is gated, and there is no Hugging Face token\n       hint: export HF_TOKEN=" in said


def test_what_a_job_has_to_download_is_asked_of_its_entrypoint(desk, hub):
    offline = '[environment]\nHF_HUB_OFFLINE = "1"\n'
    status, said = doctor(desk, offline, "specs/lora_bf16_8.toml", HF_ENDPOINT=hub)
    assert status == 1
    for repository in ("model meta-llama/Meta-Llama-3-8B", "dataset rajpurkar/squad"):
        assert (
            f"FAIL   lora_bf16_8: HF_HUB_OFFLINE is set, and this is missing: {repository} main: {desk.stage}/HF_ckpt/"
            in said
        )
    assert said.count("hint: where there is a network: bash lora_bf16_8.sh --download") == 2
    status, said = doctor(desk, "", "specs/lora_bf16_8.toml", HF_TOKEN=TOKEN, HF_ENDPOINT=hub)
    assert "ok     the hub gives access to rajpurkar/squad with your token" in said
    status, said = doctor(desk, "", "specs/lora_bf16_8.toml", HF_TOKEN=TOKEN, HF_ENDPOINT="http://127.0.0.1:9")
    assert "warn   http://127.0.0.1:9 cannot be reached from this machine" in said
    assert "hint: where there is a network: bash lora_bf16_8.sh --download" in said
    desk.compile("here", source="random")
    assert "ok     here: weights and data are here" in doctor(desk, "", str(desk.folder / "here.toml"), HF_ENDPOINT=hub)[1]


def test_what_is_missing_has_a_line_and_a_hint_each(desk):
    profile = 'shared_paths = ["/no/data"]\n[python]\nkind = "venv"\npath = "$STAGE_PATH/venv"\n'
    status, said = doctor(desk, profile, STAGE_PATH="/no/stage", FTGEN_PYTHON="", PATH="/nonexistent")
    assert status == 1
    assert "FAIL   Slurm does not answer" in said
    assert "FAIL   STAGE_PATH: /no/stage is not a folder that you can write to\n       hint: create it with mkdir -p" in said
    assert "FAIL   /no/stage/venv/bin/python: " in said
    status, said = doctor(desk, profile, FTGEN_PYTHON="/usr/bin/python3")
    assert "shared_paths: /no/data does not exist here" in said
    assert "the package nemo_toolkit is not installed" in said
    image = '[python]\nkind = "container"\nimage = "$STAGE_PATH/nemo.sqsh"\n'
    assert f"FAIL   the image {desk.stage}/nemo.sqsh does not exist" in doctor(desk, image)[1]
    image = '[python]\nkind = "container"\nimage = "~/nemo.sqsh"\n'
    assert "FAIL   the image /home/of-me/nemo.sqsh does not exist" in doctor(desk, image, HOME="/home/of-me")[1]
    image = '[python]\nkind = "container"\nimage = "docker://nvcr.io/nvidia/nemo:24.12"\n'
    assert "warn   the image nvcr.io#nvidia/nemo:24.12 is in a registry: only a job can check it" in doctor(desk, image)[1]


def test_a_folder_that_slurm_cannot_write_output_to_fails(desk):
    """Root may write anywhere, but not to a file system that is read-only."""
    closed = desk.folder / "closed"
    closed.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", closed], check=True)
    try:
        status, said = doctor(desk, "", cwd=closed, PYTHONPATH=str(ROOT))
    finally:
        subprocess.run(["umount", closed], check=True)
    assert status == 1
    assert f"FAIL   you cannot write to {closed}: jobs submitted here end with JobLaunchFailure, and without any out" in said
    assert "hint: call sbatch in a folder that all nodes share" in said


def test_a_group_s_folder_without_setgid_is_warned_of(desk):
    desk.stage.chmod(0o775)
    subprocess.run(["chgrp", "games", desk.stage], check=True)
    warning = "warn   STAGE_PATH: what jobs make in"
    assert warning in doctor(desk, "")[1]
    desk.stage.chmod(0o2775)
    assert warning not in doctor(desk, "")[1]


IMAGE = '[python]\nkind = "{kind}"\nimage = "$STAGE_PATH/nemo.img"\nmounts = ["$STAGE_PATH/Megatron-LM:/opt/megatron-lm"]\n'
# Neither program is here. This one writes its words into a file, and runs those after the image, or after --export=ALL.
PROGRAM = """#!/bin/bash
if [[ $1 == --help ]]; then
    echo "      --container-image=PATH"
    exit
fi
printf '%s\\n' "$@" >{words}
while [[ $1 != *python* || $1 == *=* ]]; do shift; done
exec "$@"
"""


@pytest.mark.parametrize("kind", ["container", "apptainer"])
def test_the_packages_of_an_image_are_checked_inside_of_it(desk, kind):
    image, tools, words = desk.stage / "nemo.img", desk.folder / "tools", desk.folder / "words"
    image.touch()
    tools.mkdir()
    for name in ("apptainer", "srun"):
        (tools / name).write_text(PROGRAM.replace("{words}", str(words)))
        (tools / name).chmod(0o755)
    path = {"PATH": f"{tools}:{desk.cluster.environment['PATH']}", "SBATCH_PARTITION": "gpu"}
    desk.compile("spec")
    spec, profile = str(desk.folder / "spec.toml"), 'gpu_request = "gres"\n' + IMAGE.format(kind=kind)
    _, said = doctor(desk, profile, spec, **path)
    assert f"ok     the image {image} has the packages that the job needs" in said
    asked = words.read_text().splitlines()
    mounts = f"{desk.stage}:{desk.stage},{desk.stage}/Megatron-LM:/opt/megatron-lm"
    if kind == "container":
        request = ["--partition=gpu", "--nodes=1", "--ntasks=1", "--gres=gpu:1", "--time=10", "--immediate=60"]
        container = [f"--container-image={image}", f"--container-mounts={mounts}", "--no-container-mount-home"]
        assert asked[:-3] == [*request, "--job-name=ftgen_doctor", "--export=ALL", *container]
    else:
        assert asked[:-3] == ["exec", "--no-home", "--bind", mounts, str(image)]
    interpreter, entrypoint, command = asked[-3:]
    assert (interpreter, command) == (sys.executable, "packages")
    assert entrypoint.startswith(f"{desk.stage}/.ftgen-doctor-")
    assert not list(desk.stage.glob(".ftgen-doctor-*"))
    _, said = doctor(desk, profile, spec, **path, FTGEN_PYTHON="/usr/bin/python3")
    assert f"FAIL   the image {image}: the package torch is not installed; " in said
    assert "hint: `ftgen list --images` says which images fit" in said
    assert not desk.queue()


@pytest.mark.parametrize(
    ("kind", "why"), [("container", "this srun has no pyxis"), ("apptainer", "apptainer: No such file")]
)
def test_an_image_that_cannot_be_run_here_is_left_to_the_job(desk, kind, why):
    (desk.stage / "nemo.img").touch()
    _, said = doctor(desk, IMAGE.format(kind=kind))
    assert f"warn   the image {desk.stage}/nemo.img exists; its packages could not be checked from here: {why}" in said
