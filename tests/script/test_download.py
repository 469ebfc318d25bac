"""`bash SCRIPT --download` and jobs that run without a network, with a real huggingface_hub and a hub of our own.

FTGEN_TEST_PYTHON is another interpreter for the download, to see another version of huggingface_hub.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import COMMIT, Hub, Proxy

pytestmark = pytest.mark.slow
TOKEN, OTHER = "hf_MarkerThatMustNeverBeSeen", "hf_OtherMarkerWithoutAccess"
MODEL, DATA = "models/meta-llama/Meta-Llama-3-8B", "datasets/rajpurkar/squad"
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
PYTHON = os.environ.get("FTGEN_TEST_PYTHON", sys.executable)
GATED = 'scheme = "lora"\nprecision = "bf16"\ngpus = 8\n'
TINY = 'scheme = "sft"\nprecision = "fp32"\ngpus = 1\ngpu = "cpu"\nmodel = "tiny_llama"\n'


def made_up(size: int, seed: int) -> bytes:
    return random.Random(seed).randbytes(size)


def files_of_a_model() -> dict[str, bytes]:
    index = {"weight_map": {"a": SHARDS[0], "b": SHARDS[1]}}
    return {
        "README.md": b"not wanted",
        "config.json": b'{"model_type": "llama"}',
        "model.safetensors.index.json": json.dumps(index).encode(),
        "original/consolidated.00.pth": made_up(10_000, 1),
        "original/tokenizer.model": b"not wanted",
        "tokenizer.json": b'{"version": "1.0"}',
        "tokenizer_config.json": b"{}",
        SHARDS[0]: made_up(600_000, 2),
        SHARDS[1]: made_up(500_000, 3),
    }


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A hub with the gated model of the recipe, and SQuAD."""
    hub = Hub()
    hub.files[MODEL] = files_of_a_model()
    hub.files[DATA] = {
        "README.md": b"not wanted",
        "plain_text/train-00000-of-00001.parquet": made_up(70_000, 4),
        "plain_text/validation-00000-of-00001.parquet": made_up(30_000, 5),
    }
    hub.gated.add(MODEL)
    hub.tokens = {TOKEN: {MODEL}, OTHER: set()}
    yield hub
    hub.close()


class Desk:
    """A folder with a home, a STAGE_PATH and compiled scripts."""

    def __init__(self, folder: Path, ftgen: Any, hub: Hub) -> None:
        self.folder, self.ftgen, self.hub = folder, ftgen, hub
        self.stage, self.home = folder / "stage", folder / "home"
        self.stage.mkdir()
        self.home.mkdir()

    def compile(self, text: str = GATED, name: str = "lora", site: str = "") -> Path:
        (self.folder / f"{name}.toml").write_text(text)
        (self.folder / "site.toml").write_text(site)
        done = self.ftgen(
            "compile", self.folder / f"{name}.toml", "--site", self.folder / "site.toml", "--out", self.folder / "out"
        )
        assert done.returncode == 0, done.stderr
        return self.folder / "out" / f"{name}.sh"

    def environment(self, **more: str) -> dict[str, str]:
        own = {"STAGE_PATH": str(self.stage), "HOME": str(self.home), "HF_ENDPOINT": self.hub.url, "FTGEN_PYTHON": PYTHON}
        return {"PATH": os.environ["PATH"], **own, **more}

    def start(self, script: Path, *arguments: object, **more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            # a shell cannot trap SIGINT if it is ignored, as it is where these tests run in the background
            ["env", "--default-signal=INT", "bash", str(script), *map(str, arguments)],
            env=self.environment(**more),
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def download(self, script: Path, *more_scripts: Path, **more: str) -> tuple[int, str]:
        process = self.start(script, "--download", *more_scripts, **more)
        output, _ = process.communicate(timeout=120)
        return process.returncode, output

    def python(self, script: Path, command: str, **more: str) -> tuple[int, str]:
        """A command of the entrypoint, with the Python of these tests."""
        run = self.folder / "code"
        subprocess.run(["bash", script, "--unpack", run], check=True)
        words = [sys.executable, run / f"{script.stem}.py", command]
        done = subprocess.run(words, env=self.environment(**more), capture_output=True, text=True, check=False, timeout=60)
        return done.returncode, done.stdout + done.stderr

    @property
    def model(self) -> Path:
        return self.stage / "HF_ckpt/downloads/models/meta-llama/Meta-Llama-3-8B@main-3d28c8"

    @property
    def data(self) -> Path:
        return self.stage / "HF_ckpt/downloads/datasets/rajpurkar/squad@main-59758f"

    def files(self) -> list[Path]:
        return [path for path in self.folder.rglob("*") if path.is_file()]


@pytest.fixture
def desk(tmp_path: Path, ftgen: Any, hub: Hub) -> Desk:
    return Desk(tmp_path, ftgen, hub)


def errors(output: str) -> list[str]:
    """The error lines and their hints, one text each."""
    lines = output.splitlines()
    return ["\n".join(lines[n : n + 2]) for n, line in enumerate(lines) if line.startswith("ftgen: error: ")]


# --- what is downloaded


def test_a_download_has_the_files_that_jobs_read_and_says_where_they_are(desk: Desk) -> None:
    status, output = desk.download(desk.compile(), HF_TOKEN=TOKEN)
    assert status == 0, output
    wanted = {name: content for name, content in files_of_a_model().items() if "/" not in name and name != "README.md"}
    assert {path.name: path.read_bytes() for path in desk.model.iterdir() if path.name != "manifest.json"} == wanted
    assert json.loads((desk.model / "manifest.json").read_text())["origin"]["commit"] == COMMIT
    size = sum(map(len, wanted.values())) / 1e9
    assert output.splitlines()[-3:] == [
        f"ftgen: weights: meta-llama/Meta-Llama-3-8B ({COMMIT[:12]}): downloaded: 6 files, {size:.3f} GB in {desk.model}",
        f"ftgen: data: rajpurkar/squad ({COMMIT[:12]}): downloaded: 2 files, 0.000 GB in {desk.data}",
        "ftgen: jobs of lora.sh need neither a token nor a network for weights and data",
    ]
    assert not list((desk.stage / "HF_ckpt").rglob("*.part"))
    assert not (desk.stage / "logs").exists()


def test_a_second_download_asks_the_hub_nothing(desk: Desk) -> None:
    script = desk.compile()
    desk.download(script, HF_TOKEN=TOKEN)
    asked = len(desk.hub.asked)
    status, output = desk.download(script)
    assert status == 0
    assert output.count("was there") == 2
    assert len(desk.hub.asked) == asked


def test_the_scripts_that_are_named_after_it_are_downloaded_too(desk: Desk) -> None:
    desk.hub.files["models/ftgen/tiny-llama"] = files_of_a_model()
    script, other = desk.compile(), desk.compile(TINY + 'checkpoint = { source = "hub" }\n', "tiny")
    status, output = desk.download(script, other, HF_TOKEN=TOKEN)
    assert status == 0, output
    assert "jobs of lora.sh need neither" in output
    assert "jobs of tiny.sh need neither" in output
    assert (desk.stage / "HF_ckpt/downloads/models/ftgen/tiny-llama@main-3d28c8/config.json").is_file()


MADE = 'checkpoint = { source = "random" }\ndata = { kind = "synthetic" }\n'
OWN = 'checkpoint = { source = "directory", path = "/mine" }\ndata = { kind = "jsonl", path = "a.jsonl" }\n'


@pytest.mark.parametrize(
    ("extra", "weights", "data"),
    [
        (MADE, "weights: random, the job makes them: nothing to download", "data: synthetic: nothing to download"),
        (
            OWN,
            "weights: the directory /mine, which does not exist on this machine: nothing to download",
            "data: jsonl: nothing to download",
        ),
    ],
)
def test_what_needs_no_hub_is_said(extra: str, weights: str, data: str, desk: Desk) -> None:
    status, output = desk.download(desk.compile(TINY + extra), HF_ENDPOINT="http://127.0.0.1:9")
    assert status == 0, output
    assert output.splitlines()[:2] == [f"ftgen: {weights}", f"ftgen: {data}"]


def test_it_downloads_although_jobs_are_offline(desk: Desk) -> None:
    script = desk.compile(site='[environment]\nHF_HUB_OFFLINE = "1"\n')
    status, output = desk.download(script, HF_TOKEN=TOKEN, TRANSFORMERS_OFFLINE="1")
    assert status == 0, output
    assert "HF_HUB_OFFLINE is set: that holds for jobs, not for a download" in output


def test_a_revision_has_its_own_folder(desk: Desk) -> None:
    script = desk.compile(GATED + f'checkpoint = {{ revision = "{COMMIT}" }}\n')
    status, output = desk.download(script, HF_TOKEN=TOKEN)
    assert status == 0, output
    assert (desk.model.parent / f"Meta-Llama-3-8B@{COMMIT}-3d28c8" / "config.json").is_file()


def test_a_mirror_that_lists_only_names_is_enough(desk: Desk) -> None:
    desk.hub.bare = True
    status, output = desk.download(desk.compile(), HF_TOKEN=TOKEN)
    assert status == 0, output
    assert (desk.model / SHARDS[0]).read_bytes() == files_of_a_model()[SHARDS[0]]


def test_the_doctor_downloads_for_specs_and_wants_one(desk: Desk, ftgen_process: Any) -> None:
    desk.compile()
    environment = os.environ | desk.environment(HF_TOKEN=TOKEN)
    done = ftgen_process("doctor", "--download", desk.folder / "lora.toml", env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (desk.model / SHARDS[1]).is_file()
    assert (desk.data / "manifest.json").is_file()
    done = ftgen_process("doctor", "--download", env=environment)
    assert done.returncode == 2
    assert "--download needs a SPEC" in done.stderr


# --- interrupted, repeated, at the same time


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_download_goes_on_where_it_stopped(number: signal.Signals, desk: Desk) -> None:
    script, large = desk.compile(), made_up(24 << 20, 6)
    desk.hub.files[MODEL][SHARDS[0]] = large
    desk.hub.bytes_per_s = 4e6
    process = desk.start(script, "--download", HF_TOKEN=TOKEN, FTGEN_STALE_S="2")
    # huggingface_hub writes blocks of 10 MB
    partial = wait_for(lambda: [path for path in desk.stage.rglob(f"{SHARDS[0]}.part") if path.stat().st_size >= 10 << 20])[
        0
    ]
    python = [int(p.parent.name) for p in Path("/proc").glob("[0-9]*/cmdline") if is_download(p, desk)]
    begin = time.monotonic()
    for pid in [process.pid, *(python if number == signal.SIGKILL else [])]:
        os.kill(pid, number)
    output, _ = process.communicate(timeout=30)
    assert time.monotonic() - begin < 5
    assert process.returncode == {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGKILL: -9}[number]
    assert ("the same command continues the download" in output) == (number != signal.SIGKILL)
    there = partial.stat().st_size
    desk.hub.bytes_per_s = 0
    status, output = desk.download(script, HF_TOKEN=TOKEN, FTGEN_STALE_S="2")
    assert status == 0, output
    assert desk.hub.sent(SHARDS[0]) == ["", f"bytes={there}-"]
    assert (desk.model / SHARDS[0]).read_bytes() == large
    assert {path.name for path in desk.model.parent.iterdir()} == {desk.model.name, f".{desk.model.name}.claims"}


def is_download(cmdline: Path, desk: Desk) -> bool:
    try:
        words = cmdline.read_text().split("\0")
        return "download" in words and f"STAGE_PATH={desk.stage}" in (cmdline.parent / "environ").read_text().split("\0")
    except OSError:
        return False


def wait_for(found: Any, seconds: float = 20) -> Any:
    end = time.monotonic() + seconds
    while not (answer := found()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return answer


def test_of_two_at_once_one_downloads_and_the_other_waits_and_says_so(desk: Desk) -> None:
    script = desk.compile()
    desk.hub.bytes_per_s = 200_000
    both = [desk.start(script, "--download", HF_TOKEN=TOKEN) for _ in range(2)]
    outputs = [process.communicate(timeout=60)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert desk.hub.sent(SHARDS[0]) == [""]
    assert sum("waiting for" in output and "is building it" in output for output in outputs) == 1


def test_a_connection_that_breaks_is_taken_up_again(desk: Desk) -> None:
    script = desk.compile()
    desk.hub.files[MODEL][SHARDS[0]] = made_up(24 << 20, 6)
    desk.hub.cut[SHARDS[0]] = 11 << 20
    status, output = desk.download(script, HF_TOKEN=TOKEN)
    assert status == 0, output
    assert desk.hub.sent(SHARDS[0])[0] == ""
    assert desk.hub.sent(SHARDS[0])[1].startswith("bytes=")
    assert "Signature" not in output


# --- what is there already


def test_a_model_in_the_users_hub_cache_is_used_and_not_downloaded_again(desk: Desk) -> None:
    cache = hub_cache(desk.home / ".cache/huggingface/hub")
    script = desk.compile()
    desk.hub.files.pop(MODEL)
    assert "meta-llama" not in desk.python(script, "missing")[1]
    status, output = desk.download(script)
    assert status == 0, output
    assert f"weights: meta-llama/Meta-Llama-3-8B ({COMMIT[:12]}): copied from your hub cache: 6 files" in output
    assert (desk.model / SHARDS[1]).read_bytes() == files_of_a_model()[SHARDS[1]]
    assert not (desk.model / SHARDS[1]).is_symlink()
    (cache / "snapshots" / COMMIT / SHARDS[1]).unlink()
    assert "meta-llama" not in desk.python(script, "missing")[1]  # it is in STAGE_PATH now


@pytest.mark.parametrize("variable", ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"])
def test_a_hub_cache_elsewhere_is_found_by_each_variable(variable: str, desk: Desk) -> None:
    below = {"HF_HOME": "hub", "XDG_CACHE_HOME": "huggingface/hub"}.get(variable, ".")
    hub_cache(desk.folder / "elsewhere" / below)
    environment = {variable: str(desk.folder / "elsewhere")}
    assert "meta-llama" not in desk.python(desk.compile(), "missing", **environment)[1]


def test_a_hub_cache_with_half_a_model_is_named_and_not_used(desk: Desk) -> None:
    cache = hub_cache(desk.home / ".cache/huggingface/hub")
    (cache / "snapshots" / COMMIT / SHARDS[1]).unlink()
    status, output = desk.python(desk.compile(), "missing")
    assert status == 1
    assert f"model meta-llama/Meta-Llama-3-8B main: {cache / 'snapshots' / COMMIT} lacks {SHARDS[1]}\n" in output


def hub_cache(cache: Path) -> Path:
    """A hub cache with the model, as huggingface_hub lays it out: snapshots are links to blobs."""
    folder = cache / "models--meta-llama--Meta-Llama-3-8B"
    for name in ("blobs", "refs", f"snapshots/{COMMIT}/original"):
        (folder / name).mkdir(parents=True)
    (folder / "refs/main").write_text(COMMIT)
    for name, content in files_of_a_model().items():
        if name != "original/consolidated.00.pth":
            (folder / "blobs" / name.replace("/", "-")).write_bytes(content)
            link = folder / "snapshots" / COMMIT / name
            link.symlink_to(os.path.relpath(folder / "blobs" / name.replace("/", "-"), link.parent))
    return folder


# --- jobs without a network


def test_offline_the_check_names_what_is_missing_and_the_command(desk: Desk) -> None:
    script = desk.compile(site='[environment]\nHF_HUB_OFFLINE = "1"\n')
    status, output = desk.python(script, "check", CUDA_VISIBLE_DEVICES="0,1,2,3,4,5,6,7")
    assert status == 1
    start, hint = "ftgen: error: HF_HUB_OFFLINE is set, and", "  hint: where there is a network: bash lora.sh --download"
    assert [error for error in errors(output) if "HF_HUB_OFFLINE" in error] == [
        f"{start} meta-llama/Meta-Llama-3-8B is not on this machine: {desk.model} lacks "
        f"config.json, tokenizer.*, model*.safetensors\n{hint}",
        f"{start} rajpurkar/squad is not on this machine: {desk.data} lacks "
        f"plain_text/train-*.parquet, plain_text/validation-*.parquet\n{hint}",
    ]
    assert "no Hugging Face token" not in output
    desk.download(script, HF_TOKEN=TOKEN)
    _, output = desk.python(script, "check", CUDA_VISIBLE_DEVICES="0,1,2,3,4,5,6,7")
    assert "HF_HUB_OFFLINE" not in output
    assert "gated" not in output


def test_with_everything_there_no_token_is_asked_for_and_the_hub_is_not_either(desk: Desk) -> None:
    script = desk.compile()
    gpus = {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}
    assert "is gated, and there is no Hugging Face token" in desk.python(script, "check", **gpus)[1]
    desk.download(script, HF_TOKEN=TOKEN)
    desk.hub.asked.clear()
    assert "gated" not in desk.python(script, "check", **gpus)[1]
    status, output = desk.python(script, "missing")
    assert (status, output) == (0, "")
    assert not desk.hub.asked


# --- errors: one line and a hint each, at once, without a secret


def refusing(hub: Hub, name: str, status: int) -> None:
    hub.status[name] = status


ME = "meta-llama/Meta-Llama-3-8B"
# What the environment and the hub are like, then the error and its hint.
CASES: dict[str, tuple[dict[str, str], Any, str, str]] = {
    "no token": ({}, None, f"{ME} is gated, and there is no Hugging Face token (401)", "request access on"),
    "a token without access": (
        {"HF_TOKEN": OTHER},
        None,
        f"{ME} is gated, and the account of this token has no access to it (403)",
        f"request access on https://huggingface.co/{ME} and wait until you have it",
    ),
    "a wrong token": (
        {"HF_TOKEN": "hf_Wrong"},
        None,
        f"{ME}: the hub does not accept the token of HF_TOKEN (401)",
        "create a token on https://huggingface.co/settings/tokens",
    ),
    "no such repository": (
        {},
        lambda hub: hub.files.pop(MODEL),
        f"{ME} is not public or does not exist, and there is no Hugging Face token (401)",
        f"look at https://huggingface.co/{ME}",
    ),
    "no such repository for this token": (
        {"HF_TOKEN": TOKEN},
        lambda hub: hub.files.pop(MODEL),
        f"{ME} is not on the hub, or this token has no access to it (404)",
        f"look at https://huggingface.co/{ME}",
    ),
    "forbidden": ({}, lambda hub: refusing(hub, "main", 403), f"{ME}: the hub refuses this token (403)", "see its"),
    "a mirror without it": ({}, lambda hub: refusing(hub, "main", 404), "does not have it (404)", "correct HF_ENDPOINT"),
    "too many requests": ({}, lambda hub: refusing(hub, "main", 429), "too many requests to the hub (429)", "wait some"),
    "a broken hub": ({}, lambda hub: refusing(hub, "main", 500), "the hub answers 500", "try again"),
    "a broken hub later": (
        {"HF_TOKEN": TOKEN},
        lambda hub: refusing(hub, SHARDS[0], 500),
        "the hub answers 500",
        "try again",
    ),
    "no hub at all": (
        {"HF_ENDPOINT": "http://127.0.0.1:9"},
        None,
        f"{ME} cannot be downloaded: 127.0.0.1:9 refuses the connection",
        "where there is a network: bash lora.sh --download",
    ),
    "no such name": (
        {"HF_ENDPOINT": "http://hub.invalid"},
        None,
        f"{ME} cannot be downloaded: the name hub.invalid cannot be resolved",
        "where there is a network: bash lora.sh --download",
    ),
    "no such proxy": (
        {"HTTP_PROXY": "http://me:hf_Password@127.0.0.1:9"},
        None,
        f"{ME} cannot be downloaded: the proxy 127.0.0.1:9 gives no way to 127.0.0.1",
        "where there is a network: bash lora.sh --download",
    ),
    "a silent hub": ({}, lambda hub: setattr(hub, "silent", True), "does not answer", "where there is a network"),
    "a damaged file": (
        {"HF_TOKEN": TOKEN},
        lambda hub: hub.damaged.add(SHARDS[1]),
        f"{ME}: {SHARDS[1]} has arrived damaged: its SHA-256 is ",
        "try again: this file is downloaded again",
    ),
    "a damaged small file": (
        {"HF_TOKEN": TOKEN},
        lambda hub: hub.damaged.add("tokenizer.json"),
        f"{ME}: tokenizer.json has arrived damaged: its Git hash is ",
        "try again: this file is downloaded again",
    ),
    "a missing shard": (
        {"HF_TOKEN": TOKEN},
        lambda hub: hub.files[MODEL].pop(SHARDS[0]),
        f"{ME} has no {SHARDS[0]}",
        "use another repository or revision",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_each_failure_is_one_line_and_a_hint_soon_and_without_a_secret(case: str, desk: Desk) -> None:
    environment, prepare, error, hint = CASES[case]
    if prepare:
        prepare(desk.hub)
    begin = time.monotonic()
    status, output = desk.download(desk.compile(), **environment)
    assert time.monotonic() - begin < 30
    assert status == 1, output
    (said,) = errors(output)
    what, _, then = said.partition("\n")
    assert error in what
    assert then.startswith(f"  hint: {hint}")
    assert "Traceback" not in output
    assert len(output.splitlines()) <= 4, output
    assert not desk.model.exists()
    for secret in ("hf_", "Signature"):
        assert secret not in output
        assert not [path for path in desk.stage.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]


def test_a_revision_that_does_not_exist_is_named(desk: Desk) -> None:
    status, output = desk.download(desk.compile(GATED + 'checkpoint = { revision = "v9" }\n'), HF_TOKEN=TOKEN)
    assert status == 1
    assert "meta-llama/Meta-Llama-3-8B has no revision 'v9'\n  hint: see https://huggingface.co/meta-llama" in output


def test_a_proxy_that_wants_a_password_is_named_without_it(desk: Desk) -> None:
    proxy = Proxy(password="yes")
    status, output = desk.download(desk.compile(), HF_TOKEN=TOKEN, HTTP_PROXY=proxy.url)
    proxy.close()
    assert status == 1
    assert f"the proxy {proxy.url.removeprefix('http://')} wants a password (407)" in output


def test_a_proxy_is_used_for_everything(desk: Desk) -> None:
    proxy = Proxy()
    status, output = desk.download(desk.compile(), HF_TOKEN=TOKEN, HTTP_PROXY=proxy.url)
    proxy.close()
    assert status == 0, output
    assert len(proxy.asked) == len(desk.hub.asked) >= 10
    direct = len(proxy.asked)
    shutil.rmtree(desk.stage / "HF_ckpt")
    status, output = desk.download(desk.compile(), HF_TOKEN=TOKEN, HTTP_PROXY=proxy.url, NO_PROXY="127.0.0.1,localhost")
    assert status == 0, output
    assert len(proxy.asked) == direct


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A certificate for this machine that no list has, with its key."""
    file, names = tmp_path / "certificate.pem", "subjectAltName=DNS:localhost,IP:127.0.0.1"
    words = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=hub", "-addext", names]
    subprocess.run([*words, "-keyout", tmp_path / "key.pem", "-out", file], check=True, capture_output=True)
    file.write_text((tmp_path / "key.pem").read_text() + file.read_text())
    return file


def test_https_through_a_proxy_with_a_certificate_of_ones_own(desk: Desk, certificate: Path) -> None:
    hub, proxy = Hub(certificate), Proxy()
    hub.files, hub.tokens, hub.gated = desk.hub.files, desk.hub.tokens, desk.hub.gated
    environment = {"HF_ENDPOINT": hub.url, "HTTPS_PROXY": proxy.url, "HF_TOKEN": TOKEN}
    status, output = desk.download(desk.compile(), **environment)
    assert status == 1
    host = hub.url.removeprefix("https://")
    assert f"cannot be downloaded: the certificate of {host} is not accepted; for a proxy's own, see SSL_CERT_FILE" in output
    trusted = {"SSL_CERT_FILE": str(certificate), "REQUESTS_CA_BUNDLE": str(certificate)}
    status, output = desk.download(desk.compile(), **environment, **trusted)
    assert status == 0, output
    assert {asked.method for asked in proxy.asked} == {"CONNECT"}
    assert TOKEN not in str(proxy.asked)
    hub.close()
    proxy.close()


@pytest.mark.parametrize("bare", [False, True])  # without the sizes, the disk is full in the middle of a file
def test_a_full_disk_is_one_line(bare: bool, desk: Desk) -> None:
    desk.hub.bare = bare
    own_mounts = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--mount"]
    inside = f'mount -t tmpfs -o size=900k none "{desk.stage}" && bash "{desk.compile()}" --download'
    done = subprocess.run(
        [*own_mounts, "sh", "-c", inside], env=desk.environment(HF_TOKEN=TOKEN), capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    (said,) = errors(done.stdout + done.stderr)
    folder = desk.model.parent
    room = (
        f"the disk of {folder} is full, or your quota" if bare else f"needs 0.0 GiB in {folder}, but only 0.0 GiB are free"
    )
    assert room in said
    assert "  hint: free some space there, or set STAGE_PATH to a directory on a larger file system" in said


def test_a_python_without_huggingface_hub_says_what_it_needs(desk: Desk, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    status, output = desk.download(desk.compile(), HF_TOKEN=TOKEN, FTGEN_PYTHON=str(tmp_path / "bare/bin/python"))
    assert status == 1
    assert (
        "bare/bin/python has no huggingface_hub\n  hint: python3 -m venv FOLDER && FOLDER/bin/pip install huggingface_hub"
        in output
    )


# --- the token


@pytest.mark.parametrize("how", ["variable", "file", "file elsewhere"])
def test_the_token_goes_to_the_hub_alone(how: str, desk: Desk) -> None:
    token_file = {"file": desk.home / ".cache/huggingface/token"}.get(how, desk.folder / "secret")
    environment = {"variable": {"HF_TOKEN": TOKEN}, "file": {}, "file elsewhere": {"HF_TOKEN_PATH": str(token_file)}}[how]
    if how != "variable":
        token_file.parent.mkdir(parents=True, exist_ok=True)
        token_file.write_text(f"{TOKEN}\n")
    desk.hub.bytes_per_s = 300_000
    process = desk.start(desk.compile(), "--download", **environment)
    seen = ""
    while process.poll() is None:
        seen += "\n".join(command_lines())
        time.sleep(0.02)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    assert "download" in seen
    assert TOKEN not in seen + output
    assert [path for path in desk.files() if TOKEN.encode() in path.read_bytes()] == (
        [] if how == "variable" else [token_file]
    )
    by_host: dict[str, set[str]] = {}
    for asked in desk.hub.asked:
        if not asked.path.startswith("/api/agent"):  # newer versions of huggingface_hub ask for this, without the token
            by_host.setdefault(asked.host.split(":")[0], set()).add(asked.token)
    assert by_host == {"127.0.0.1": {TOKEN}, "localhost": {""}}  # the host of large files gets no token


def command_lines() -> Iterator[str]:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            yield path.read_text(errors="replace")
        except OSError:
            continue
