"""Jobs of a real Slurm without a network or a token, and the token file in a container."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Desk, until
from hub_server import Hub

from runtime.weights import random_llama

TOKEN = "hf_MarkerThatMustNeverBeSeen"
MODEL = "models/org/gated"
SMALL = {"num_layers": 2, "hidden_size": 128, "ffn_hidden_size": 256, "num_attention_heads": 4, "num_query_groups": 2}
SMALL |= {"vocab_size": 512, "max_position_embeddings": 8192, "rope_theta": 500000.0}
CATALOGUE = f"""[models.gated]
title = "a gated model"
hf_id = "org/gated"
checkpoint = "hub"
gated = true
nemo_recipe = "llama3_8b"
{chr(10).join(f"{key} = {value}" for key, value in SMALL.items())}
source = "made for this test"
"""
OFFLINE = 'convert = "task"\nexclusive = false\nmem = "1000"\ngpu_request = "gres"\nmpi = "none"\n'
SITE = OFFLINE + '[environment]\nHF_HUB_OFFLINE = "1"\n'
CONTAINER = OFFLINE + '[python]\nkind = "container"\nimage = "$STAGE_PATH/nemo.sqsh"\n'
# srun with pyxis, as far as a home goes: the container sees of the home only what is mounted, and has another HOME.
PYXIS = """#!/usr/bin/env bash
options=() mounts=
while (($#)); do
    case $1 in
        --container-mounts=*) mounts=${1#*=} ;;
        --container-* | --no-container-*) ;;
        --*) options+=("$1") ;;
        *) break ;;
    esac
    shift
done
echo "${!#} has the mounts $mounts"
inside='
    IFS=, read -ra mounts <<<"$0"
    stash=$(mktemp -d) number=0
    for each in "${mounts[@]}"; do
        source=${each%%:*} number=$((number + 1))
        if [[ $source != "$HOME"/* ]]; then continue; fi
        if [[ -d $source ]]; then mkdir "$stash/$number"; else touch "$stash/$number"; fi
        mount --bind "$source" "$stash/$number"
    done
    mount -t tmpfs none "$HOME"
    number=0
    for each in "${mounts[@]}"; do
        source=${each%%:*} number=$((number + 1))
        if [[ $source != "$HOME"/* ]]; then continue; fi
        mkdir -p "$(dirname "$source")"
        if [[ -d $stash/$number ]]; then mkdir "$source"; else touch "$source"; fi
        mount --bind "$stash/$number" "$source"
    done
    export HOME=/root
    exec "$@"'
exec SRUN "${options[@]}" unshare --mount bash -c "$inside" "$mounts" "$@"
"""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """A hub with a small gated model."""
    model = {"name": "gated", "parameters": 1, "nemo_recipe": "llama3_8b", **SMALL}
    random_llama.write({"model": model, "seed": 1}, tmp_path / "weights")
    hub = Hub()
    hub.files[MODEL] = {path.name: path.read_bytes() for path in (tmp_path / "weights").iterdir()}
    hub.gated, hub.tokens = {MODEL}, {TOKEN: {MODEL}}
    yield hub
    hub.close()


@pytest.fixture
def home(desk: Desk) -> Path:
    home = desk.folder / "home"
    home.mkdir()
    return home


def compile_gated(desk: Desk, site: str) -> Path:
    (desk.folder / "mine.toml").write_text(CATALOGUE)
    extra = 'catalogue = "mine.toml"\nmax_steps = 3\nwindow = { last_steps = 1 }\nglobal_batch_size = 4\n'
    return desk.compile("gated", model="gated", site=site, extra=extra)


def files_with_the_token(desk: Desk) -> list[Path]:
    return [path for path in desk.folder.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]


def test_an_offline_job_names_what_is_missing_and_runs_after_a_download_without_a_token(desk, hub, home):
    script = compile_gated(desk, SITE)
    user = {"HOME": str(home), "HF_ENDPOINT": hub.url, "FTGEN_PYTHON": sys.executable}
    refused = desk.submit(script, **user)
    assert desk.ended(refused).exit_code == 1
    assert (
        f"ftgen: error: HF_HUB_OFFLINE is set, and org/gated is not on this machine: "
        f"{desk.stage}/HF_ckpt/downloads/models/org/gated@main-3d28c8 lacks config.json, tokenizer.*, model*.safetensors\n"
        "  hint: where there is a network: bash gated.sh --download\n"
    ) in desk.log(refused)
    assert hub.asked == []
    login = os.environ | user | {"STAGE_PATH": str(desk.stage), "HF_TOKEN": TOKEN}
    done = subprocess.run(["bash", script, "--download"], env=login, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    hub.asked.clear()
    job = desk.submit(script, **user)
    assert desk.ended(job, 400).state == "COMPLETED", desk.everything()
    assert "iteration 2/2" in desk.log(job)
    assert hub.asked == []
    assert files_with_the_token(desk) == []


def test_a_job_on_a_node_without_a_network_ends_soon_and_names_the_command(desk, home):
    begin = time.monotonic()
    script = compile_gated(desk, OFFLINE)
    job = desk.submit(script, HOME=str(home), HF_ENDPOINT="http://hub.invalid", HF_TOKEN=TOKEN, FTGEN_PYTHON=sys.executable)
    assert desk.ended(job, 60).exit_code == 1
    assert time.monotonic() - begin < 60
    assert (
        "ftgen: error: org/gated cannot be downloaded: the name hub.invalid cannot be resolved\n"
        "  hint: where there is a network: bash gated.sh --download\n"
    ) in desk.log(job)
    assert files_with_the_token(desk) == []


def test_the_token_file_is_read_in_a_container_that_has_another_home(desk, hub, home):
    token_file = home / ".cache/huggingface/token"
    token_file.parent.mkdir(parents=True)
    token_file.write_text(TOKEN)
    hub.files[MODEL]["config.json"] = b'{"hidden_size": 64}'  # the job ends after the download
    user = {"HOME": str(home), "HF_ENDPOINT": hub.url, "FTGEN_PYTHON": sys.executable}
    job = desk.submit(compile_gated(desk, CONTAINER), PATH=pyxis(desk), **user)
    seen: list[str] = []

    def over() -> bool:
        seen.extend(command_lines())
        return not desk.queue()

    until(over, 120, desk.everything)
    assert "has hidden_size = 64, but model gated has 128" in desk.log(job), desk.log(job)
    assert "downloading org/gated: " in desk.log(job)
    assert {asked.token for asked in hub.asked if asked.host.startswith("127.0.0.1")} == {TOKEN}
    assert f",{token_file}:{token_file}:ro" in "\n".join(seen)  # the look was in time
    assert TOKEN not in "\n".join(seen)
    assert files_with_the_token(desk) == [token_file]


def test_only_what_runs_once_gets_the_token_file(desk, home):
    token_file = home / ".cache/huggingface/token"
    token_file.parent.mkdir(parents=True)
    token_file.write_text(TOKEN)
    job = desk.submit(compile_gated(desk, CONTAINER), PATH=pyxis(desk), HOME=str(home))
    assert desk.ended(job).state == "COMPLETED", desk.everything()
    stage = f"{desk.stage}:{desk.stage}"
    for command in ("check", "convert"):
        assert f"{command} has the mounts {stage},{token_file}:{token_file}:ro\n" in desk.log(job)
    assert f"finetune has the mounts {stage}\n" in desk.log(job)


def pyxis(desk: Desk) -> str:
    """PATH with PYXIS for srun."""
    srun = subprocess.run(["which", "srun"], capture_output=True, text=True, check=True).stdout.strip()
    (desk.folder / "bin").mkdir()
    (desk.folder / "bin/srun").write_text(PYXIS.replace("SRUN", srun))
    (desk.folder / "bin/srun").chmod(0o755)
    return f"{desk.folder}/bin:{os.environ['PATH']}"


def command_lines() -> Iterator[str]:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            yield path.read_text(errors="replace").replace("\0", " ")
        except OSError:
            continue
