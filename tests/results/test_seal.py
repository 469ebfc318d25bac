"""Sealed runs: they have all that the figures stand on, nothing private, and a changed one is refused."""

import dataclasses
import hashlib
import json
import os
import re
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

from ftgen.plan.again import chat_template, spec_again
from ftgen.plan.experiments import load
from ftgen.results.private import remover
from ftgen.results.sealed import LARGEST, MANIFEST, MOST_FILES

ROOT = Path(__file__).parents[2]
CASES = ROOT / "tests" / "logs"
FAST, STOCK = "1795387558", "1795387355"  # LoRA in FP8 on an H100


def folder_of(run_id):
    (found,) = (CASES / "h100").glob(f"logs/experiments/*/*_{run_id}")
    return found


@pytest.fixture(scope="module")
def sealed(tmp_path_factory):
    """A real run of an H100, sealed."""
    file = tmp_path_factory.mktemp("sealed") / "run.ftgen.zip"
    command = ["python3", "-m", "ftgen", "seal", folder_of(FAST), "-o", file]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    return file


def changed(sealed, target, change, rehash=False):
    """A copy of a sealed run with other files: `change` takes and gives a dictionary of names and bytes."""
    with zipfile.ZipFile(sealed) as archive:
        files = change({name: archive.read(name) for name in archive.namelist()})
    if rehash:  # by somebody who knows what a manifest is
        manifest = json.loads(files[MANIFEST])
        for name in manifest["files"]:
            manifest["files"][name] = {"sha256": hashlib.sha256(files[name]).hexdigest(), "bytes": len(files[name])}
        files[MANIFEST] = json.dumps(manifest).encode()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return target


def edited(name, old, new):
    def change(files):
        (found,) = [each for each in files if re.search(name, each)]
        assert old in files[found]
        return files | {found: files[found].replace(old, new, 1)}

    return change


def test_a_real_run_is_sealed_and_verified(ftgen, sealed):
    done = ftgen("verify", sealed)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "lora_nemo_llama3_8b_fp8_1, run 1795387558: 5 files" in done.stdout
    assert "all 56 results follow from the logs" in done.stdout
    with zipfile.ZipFile(sealed) as archive:
        (results,) = json.loads(archive.read("results.json"))["runs"]
    (shown,) = json.loads(ftgen("tabulate", folder_of(FAST), "--format", "json").stdout)["runs"]
    assert results | {"log": ""} == shown | {"log": ""}


@pytest.mark.parametrize("case", sorted(path.name for path in CASES.iterdir() if (path / "logs").is_dir()))
def test_every_log_can_be_sealed_and_gives_the_same_figures(ftgen, case, tmp_path):
    """Of each case the first three runs: formats, restarts, several runs in a file, compressed logs."""
    found = json.loads(ftgen("tabulate", CASES / case / "logs", "--format", "json").stdout)["runs"]
    for number, run in enumerate(found[:3]):
        file = tmp_path / f"{number}.zip"
        done = ftgen("seal", run["log"], "--run", run["run_id"], "-o", file)
        if "the log is cut off" in done.stderr or "damaged" in done.stderr:
            continue
        assert done.returncode == 0, done.stderr
        assert ftgen("verify", file).returncode == 0


def test_the_same_run_gives_the_same_bytes(ftgen, sealed, tmp_path):
    copy = tmp_path / "elsewhere"
    shutil.copytree(folder_of(FAST), copy / folder_of(FAST).name)
    for path in copy.rglob("*"):
        os.utime(path, (0, 0))
    ftgen("seal", copy, "-o", tmp_path / "again.zip")
    assert (tmp_path / "again.zip").read_bytes() == sealed.read_bytes()


def test_an_unzipped_run_is_read_as_any_other(ftgen, sealed, tmp_path):
    with zipfile.ZipFile(sealed) as archive:
        archive.extractall(tmp_path)
    (run,) = json.loads(ftgen("tabulate", tmp_path, "--format", "json").stdout)["runs"]
    assert (run["status"], run["run_id"]) == ("complete", FAST)


def test_a_changed_log_is_refused(ftgen, sealed, tmp_path):
    file = changed(sealed, tmp_path / "a.zip", edited("log-", b"timing in s: 0.5", b"timing in s: 0.4"))
    done = ftgen("verify", file)
    assert done.returncode == 1
    assert "is not the file that was sealed: its hash or its size differs" in done.stderr


@pytest.mark.parametrize("name", ["log-", "plan.json", "results.json", "spec.toml", "environment.json"])
def test_every_byte_counts(ftgen, sealed, tmp_path, name):
    def change(files):
        (found,) = [each for each in files if name in each]
        return files | {found: files[found] + b"\n"}

    assert ftgen("verify", changed(sealed, tmp_path / "a.zip", change)).returncode == 1


@pytest.mark.parametrize(
    ("name", "old", "new", "said"),
    [
        ("results", b'"step_time_s": 0.55', b'"step_time_s": 0.45', "step_time_s: 0.45"),
        ("results", b'"status": "complete"', b'"status": "failed"', "status: failed -> complete"),
        ("log-", b"global_step: 59 |", b"global_step: 60 |", "status: complete -> incomplete"),
    ],
)
def test_figures_that_do_not_follow_from_the_logs_are_named(ftgen, sealed, tmp_path, name, old, new, said):
    done = ftgen("verify", changed(sealed, tmp_path / "a.zip", edited(name, old, new), rehash=True))
    assert done.returncode == 1
    assert "these results do not follow from the logs (sealed -> computed):" in done.stdout
    assert said in done.stdout


def test_results_of_other_rules_are_computed_again(ftgen, sealed, tmp_path):
    def change(files):
        manifest = json.loads(files[MANIFEST])
        manifest["rules"] = {"ftgen": "0.0.1", "sha256": "0" * 64}
        return files | {MANIFEST: json.dumps(manifest).encode()}

    done = ftgen("verify", changed(sealed, tmp_path / "a.zip", change))
    assert done.returncode == 0
    assert "the results were made by other rules, those of ftgen 0.0.1" in done.stdout


# Private things

PLANTED = {
    "HF_TOKEN": "hf_" + "Zq7" * 10,
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "SITE_PASSWORD": "correct-horse-battery",
}
LINES = """\
export HF_TOKEN={HF_TOKEN}
{{"HF_TOKEN": "hf_anotherTokenThatNoVariableHas1"}}
Authorization: Bearer abcDEF123456.abc
wandb: Appending key for api.wandb.ai: 89abcdef0123456789abcdef0123456789abcdef
WANDB_API_KEY = {WANDB_API_KEY}
wandb_v1_AbCdEfGhIjKlMnOpQrStUvWxYz012345 in use
site password is {SITE_PASSWORD}.
MY_SECRET='s3cr3t-value' other=1
git clone https://alice:tok3nInUrl@git.example.org/x
-----BEGIN OPENSSH PRIVATE KEY-----
b3BlbnNzaC1rZXktdjEAAAAABG5vbmU
-----END OPENSSH PRIVATE KEY-----
/home/alice/venv/lib/x.py:7: UserWarning
File "/lustre/home/bob.smith/code/y.py", /Users/carol/z, file:///home/dave/w
text\\n/home/erin/v
HOME={HOME}/stage and {HOME}
/scratch/frankie/run
netrc {NETRC}
"""
PRIVATE = [
    "hf_another",
    "abcDEF123456",
    "89abcdef0123",
    "wandb_v1_Ab",
    "s3cr3t",
    "tok3nInUrl",
    "b3BlbnNz",
    "alice/",
    "bob.smith",
]
PRIVATE += ["carol", "dave", "erin", "frankie", "netrc-key-of-somebody", *PLANTED.values()]


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """A run whose files have every kind of private thing, of a user who has secrets."""
    home = tmp_path / "house" / "of" / "grace"
    home.mkdir(parents=True)
    (home / ".netrc").write_text("machine api.wandb.ai\n  login user\n  password netrc-key-of-somebody\n")
    for name, value in {**PLANTED, "HOME": str(home), "USER": "frankie"}.items():
        monkeypatch.setenv(name, value)
    run = home / "runs" / folder_of(FAST).name
    shutil.copytree(folder_of(FAST), run)
    (log,) = run.rglob("log-*.out")
    text = LINES.format(**PLANTED, HOME=home, NETRC="netrc-key-of-somebody")
    first, rest = log.read_text().split("\n", 1)
    log.write_text(f"{first}\n{text}{rest}")
    inside = log.parent
    (inside / "environment.json").write_text(json.dumps({"all_packages": {"torch": "2.11"}, "note": text}))
    (inside / "nodes").mkdir()
    (inside / "nodes" / "node1.json").write_text(json.dumps({"node": "node1", "note": text}))
    (inside / "telemetry.csv").write_text(text)
    return run


def test_nothing_private_is_sealed(ftgen, planted, tmp_path):
    file = tmp_path / "a.zip"
    done = ftgen("seal", planted, "-o", file)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(file) as archive:
        texts = {name: archive.read(name).decode() for name in archive.namelist()}
    assert {"run/environment.json", "run/nodes/node1.json", "run/telemetry.csv", "run/plan.json"} <= texts.keys()
    home = os.environ["HOME"]
    for name, text in texts.items():
        for marker in (*PRIVATE, home, os.path.realpath(home), "/home/"):
            assert marker not in text, f"{marker} in {name}"
    assert 'File "~/code/y.py"' in texts[next(name for name in texts if "log-" in name)]
    assert ftgen("verify", file).returncode == 0


def test_figures_are_the_same_without_what_is_private(ftgen, planted, tmp_path):
    ftgen("seal", planted, "-o", tmp_path / "a.zip")
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        (results,) = json.loads(archive.read("results.json"))["runs"]
    (shown,) = json.loads(ftgen("tabulate", planted, "--format", "json").stdout)["runs"]
    assert results | {"log": ""} == shown | {"log": ""}


@pytest.mark.parametrize(
    "text",
    [
        "TOKENIZERS_PARALLELISM: False, padding_token_id: 0, loss_tokens_only: true",
        '{"eos_token_id": 128001, "pad_token": null}',
        "commit 0123456789abcdef0123456789abcdef01234567",
        "[NeMo I 2026-11-22 22:46:13 nemo_logger:162] /stage/logs/homework/x https://host.example/homes/1",
    ],
)
def test_what_is_not_private_stays(text):
    assert remover({"HOME": "/nonexistent"})(text.encode()).decode() == text


# Signatures


@pytest.fixture
def keys(tmp_path):
    """Two SSH keys, and a file that allows the first one's owner."""
    for name in ("good", "other"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", tmp_path / name]
        subprocess.run(command, check=True)
    public = (tmp_path / "good.pub").read_text()
    (tmp_path / "signers").write_text(f'lab@example.org namespaces="ftgen" {public}')
    return tmp_path


def test_a_signature_is_checked(ftgen, keys):
    file = keys / "a.zip"
    assert "; signed" in ftgen("seal", folder_of(FAST), "-o", file, "--sign", keys / "good").stdout
    done = ftgen("verify", file, "--signers", keys / "signers")
    assert (done.returncode, "signed by lab@example.org" in done.stdout) == (0, True), done.stderr
    assert "SHA256:" in ftgen("verify", file).stdout


def test_a_signature_of_somebody_else_is_refused(ftgen, keys):
    file = keys / "a.zip"
    ftgen("seal", folder_of(FAST), "-o", file, "--sign", keys / "other")
    done = ftgen("verify", file, "--signers", keys / "signers")
    assert done.returncode == 1
    assert "the signature is of nobody in" in done.stderr


def test_a_signature_of_another_manifest_is_refused(ftgen, keys):
    file = keys / "a.zip"
    ftgen("seal", folder_of(FAST), "-o", file, "--sign", keys / "good")
    forged = changed(file, keys / "b.zip", edited("results", b'"step_time_s": 0.55', b'"step_time_s": 0.45'), rehash=True)
    for words in ([], ["--signers", keys / "signers"]):
        done = ftgen("verify", forged, *words)
        assert done.returncode == 1
        assert "the signature does not fit" in done.stderr


def test_a_missing_signature_is_refused(ftgen, sealed, keys):
    done = ftgen("verify", sealed, "--signers", keys / "signers")
    assert (done.returncode, "is not signed" in done.stderr) == (1, True)


def test_a_key_that_is_none_is_named(ftgen, tmp_path):
    done = ftgen("seal", folder_of(FAST), "-o", tmp_path / "a.zip", "--sign", tmp_path / "nokey")
    assert done.returncode == 1
    assert f"{tmp_path / 'nokey'} cannot sign" in done.stderr
    assert not (tmp_path / "a.zip").exists()


# Files of anybody


def evil(target, *entries):
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text, attributes in entries:
            entry = zipfile.ZipInfo(name)
            entry.external_attr, entry.compress_type = attributes << 16, zipfile.ZIP_DEFLATED
            archive.writestr(entry, text)
    return target


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ([], "has no manifest.json"),
        ([("a", b"", 0)], "has no manifest.json"),
        ([("../evil", b"x", 0)], "which leads out of a folder"),
        ([("run/../../evil", b"x", 0)], "which leads out of a folder"),
        ([("/etc/evil", b"x", 0)], "which leads out of a folder"),
        ([("C:\\evil", b"x", 0)], "which leads out of a folder"),
        ([("a\\..\\evil", b"x", 0)], "which leads out of a folder"),
        ([("link", b"/etc/passwd", 0o120777)], "is a link"),
        ([("pipe", b"", 0o010644)], "is a link or another thing that is no file"),
        ([("bomb", b"\0" * (64 << 20), 0)], "which no log does"),
        ([(MANIFEST, b"{", 0)], "manifest.json is no JSON"),
        ([(MANIFEST, b"[" * 100_000, 0)], "manifest.json is no JSON"),
        ([(MANIFEST, b"[]", 0)], "none of a format that this ftgen knows"),
        ([(MANIFEST, b'{"format": 2}', 0)], "none of a format that this ftgen knows"),
        ([(MANIFEST, b'{"format": 1, "files": 3}', 0)], "is required"),
        ([(f"f{number}", b"", 0) for number in range(MOST_FILES + 1)], f"has {MOST_FILES + 1} files"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_hostile_zip_gets_a_clear_error(ftgen, tmp_path, entries, said):
    file = evil(tmp_path / "a.zip", *entries)
    for command in ("verify", "rerun"):
        done = ftgen(command, file)
        assert done.returncode == 1
        assert said in done.stderr
        assert str(file) in done.stderr
        assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a.zip"]


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda files: files | {"run/more.out": b"x"}, "which the manifest does not list"),
        (lambda files: {name: text for name, text in files.items() if "log-" not in name}, "is missing"),
        (edited(MANIFEST, b'"format": 1', b'"format": 1.5'), "none of a format"),
        (edited(MANIFEST, b'"log": "run/', b'"log": "other/'), "the manifest lists no other/"),
        (edited(MANIFEST, b'"restart": 0', b'"restart": "0"'), "restart"),
        (edited(MANIFEST, b'"run_id": "1795387558"', b'"run_id": "1795387558#9"'), "this is run 9 of it"),
    ],
)
def test_a_manifest_that_does_not_fit_gets_a_clear_error(ftgen, sealed, tmp_path, change, said):
    done = ftgen("verify", changed(sealed, tmp_path / "a.zip", change))
    assert done.returncode == 1, done.stdout
    assert said in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("text", [b"", b"PK\x03\x04 and no more", b"no zip at all" * 100])
def test_what_is_no_zip_gets_a_clear_error(ftgen, tmp_path, text):
    (tmp_path / "a.zip").write_bytes(text)
    done = ftgen("verify", tmp_path / "a.zip")
    assert done.returncode == 1
    assert "is no zip that can be read" in done.stderr


def test_a_size_that_lies_is_found(ftgen, sealed, tmp_path):
    """The directory of the zip says that a file is short; what is packed goes on for 64 MiB."""
    file = evil(tmp_path / "a.zip", (MANIFEST, b"\0" * (64 << 20), 0))
    raw = file.read_bytes()
    size = (64 << 20).to_bytes(4, "little")
    file.write_bytes(raw.replace(size, (100).to_bytes(4, "little")))
    done = ftgen("verify", file)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert LARGEST > 64 << 20


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"parallelism": {', b'"parallelism": 5, "was": {'),
        (b'"optimizations": {', b'"optimizations": [1], "was": {'),
        (b'"sources": []', b'"sources": [7, {"folder": 3}]'),
        (b'"environment": {', b'"environment": {"A\\nB": "x",'),
        (b'"scheme": "lora"', b'"scheme": "x\\n[evil]"'),
        (b'"seed": 1234', b'"seed": [[1]]'),
    ],
)
def test_a_hostile_plan_gets_a_clear_error_or_a_spec(ftgen, sealed, tmp_path, old, new):
    def change(files):
        return {name: text.replace(old, new) if name.startswith("run/") else text for name, text in files.items()}

    done = ftgen("rerun", changed(sealed, tmp_path / "a.zip", change, rehash=True))
    assert done.returncode in {0, 1}
    assert "Traceback" not in done.stderr


# Again, and beside another


@pytest.mark.parametrize("spec", sorted((ROOT / "specs").glob("*.toml")), ids=lambda path: path.stem)
def test_the_spec_that_does_a_run_again_has_the_same_plan(spec, tmp_path):
    for overrides in ([], ["optimizations.preset=stock", "max_steps=33", "environment.NCCL_DEBUG=INFO", "seed=7"]):
        (experiment,) = load(spec, overrides=overrides)
        again = tmp_path / "again.toml"
        plan = json.loads(experiment.plan.to_json())
        again.write_text(spec_again(plan, template="chat.jinja"))
        (tmp_path / "chat.jinja").write_text(chat_template(plan) or "")
        first, second = (dataclasses.asdict(each.plan) for each in (experiment, *load(again)))
        differing = {key for key in first if first[key] != second[key]}
        assert differing <= {"name", "spec_file", "spec_sha256", "overrides"}


def test_a_run_of_the_other_engine_is_done_again_with_it(tmp_path):
    (experiment,) = load(ROOT / "specs" / "lora_fp8_8.toml", overrides=["engine=megatron_bridge", "fp8_scaling=delayed"])
    again = tmp_path / "again.toml"
    again.write_text(spec_again(json.loads(experiment.plan.to_json())))
    (second,) = load(again)
    assert (second.plan.engine, second.plan.fp8_scaling) == ("megatron_bridge", "delayed")


def test_a_sealed_run_can_be_done_again(ftgen, sealed, tmp_path):
    spec = tmp_path / "again.toml"
    assert ftgen("rerun", sealed, "-o", spec).returncode == 0
    assert spec.read_text().startswith("# Does again: lora_nemo_llama3_8b_fp8_1, run 1795387558.")
    assert "transformer-engine 2.9.0" in spec.read_text()
    done = ftgen("compile", spec, "--out", tmp_path / "generated")
    assert done.returncode == 0, done.stderr
    plan = json.loads(
        re.search(r"PLAN = json.loads\(r\"\"\"\n(.*?)\n\"\"\"", (tmp_path / "generated/again.py").read_text(), re.S)[1]
    )
    assert (plan["max_steps"], plan["data"]["kind"], plan["optimizations"]["op_fuser"]) == (60, "synthetic", False)


def test_a_run_without_a_plan_cannot_be_done_again(ftgen, tmp_path):
    (log, *_) = sorted((CASES / "launcher").rglob("log-*.out"))
    assert ftgen("seal", log, "-o", tmp_path / "a.zip").returncode == 0
    done = ftgen("rerun", tmp_path / "a.zip")
    assert (done.returncode, "the run has no plan" in done.stderr) == (1, True)


def test_the_differences_of_two_runs_are_told_by_part(ftgen, sealed):
    done = ftgen("diff", sealed, folder_of(STOCK))
    assert done.returncode == 0, done.stderr
    assert "  optimizations.cuda_graphs: True -> False\n" in done.stdout
    assert "software: no difference\nhardware: no difference\n" in done.stdout
    assert re.search(r"step_time_s: 0.558\d+ -> 1.087\d+ \(1.947x\)", done.stdout)
    found = json.loads(ftgen("diff", sealed, folder_of(STOCK), "--json").stdout)
    assert list(found) == ["plan", "software", "hardware", "results"]
    assert {"key": "optimizations.cuda_graphs", "first": True, "second": False} in found["plan"]


def test_another_software_and_machine_are_told(ftgen, sealed, tmp_path):
    def change(files):
        (log,) = [name for name in files if "log-" in name]
        text = files[log].replace(b'"torch": "2.11.0"', b'"torch": "2.9.0"').replace(b"H100 80GB HBM3", b"H200")
        return files | {log: text, "run/environment.json": b'{"all_packages": {"flash-attn": "2.8"}, "vbios": "96.00"}'}

    done = ftgen("diff", sealed, changed(sealed, tmp_path / "b.zip", change, rehash=True))
    assert "  packages.torch: 2.11.0 -> 2.9.0\n" in done.stdout
    assert "  all_packages.flash-attn: – -> 2.8\n" in done.stdout
    assert "  gpu: NVIDIA H100 80GB HBM3 -> NVIDIA H200\n" in done.stdout
    assert "  vbios: – -> 96.00\n" in done.stdout


def test_one_run_does_not_differ_from_itself(ftgen, sealed):
    lines = ftgen("diff", sealed, folder_of(FAST)).stdout.splitlines()[1:]
    assert lines == [f"{part}: no difference" for part in ("plan", "software", "hardware", "results")]


def test_several_runs_are_told_apart_by_their_ids(ftgen, tmp_path):
    done = ftgen("seal", CASES / "h100", "-o", tmp_path / "a.zip")
    assert done.returncode == 1
    assert "has 4 runs, one is needed" in done.stderr
    assert FAST in done.stderr
    assert ftgen("seal", CASES / "h100", "-o", tmp_path / "a.zip", "--run", FAST).returncode == 0
    done = ftgen("seal", CASES / "h100", "-o", tmp_path / "a.zip", "--run", "7")
    assert "has no run 7" in done.stderr
