"""What editors and shells are told: the published schemas, checked by a real TOML language tool; completion."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PUBLISHED = {"specs/spec.schema.json": [], "specs/sites/site.schema.json": ["--site"]}


@pytest.mark.parametrize(("file", "arguments"), PUBLISHED.items())
def test_the_published_schema_is_current(file, arguments, ftgen):
    """Else: ftgen schema > specs/spec.schema.json; ftgen schema --site > specs/sites/site.schema.json."""
    assert json.loads((ROOT / file).read_text()) == json.loads(ftgen("schema", *arguments).stdout)


@pytest.mark.parametrize(("file", "arguments"), PUBLISHED.items())
def test_every_key_is_documented(file, arguments):
    schema = json.loads((ROOT / file).read_text())
    for table in (schema, *schema["$defs"].values()):
        assert table["description"]
        assert not [key for key, each in table["properties"].items() if not each.get("description") and "$ref" not in each]


def taplo(*files: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"RUST_LOG": "warn"}
    return subprocess.run(["taplo", "lint", *files], capture_output=True, text=True, check=False, cwd=ROOT, env=environment)


def test_taplo_accepts_every_spec_by_its_schema_line():
    specs = [*(ROOT / "specs").glob("*.toml"), *(ROOT / "specs/sites").glob("*.toml")]
    assert all(spec.read_text().startswith("#:schema ") for spec in specs)
    assert taplo(*specs).returncode == 0


def test_taplo_finds_an_unknown_key(tmp_path):
    bad = f'#:schema {ROOT}/specs/spec.schema.json\nscheme = "sft"\nprecision = "bf16"\ngpus = 8\ntensor_paralel = 2\n'
    (tmp_path / "bad.toml").write_text(bad)
    done = taplo(tmp_path / "bad.toml")
    assert done.returncode != 0
    assert "tensor_paralel" in done.stderr + done.stdout


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("max_", {"max_steps="}),
        ("data.kind=s", {"data.kind=squad", "data.kind=synthetic"}),
        ("data.packed=", {"data.packed=true", "data.packed=false"}),
    ],
)
def test_a_shell_completes_keys_and_values_of_set(typed, offered):
    words = f"ftgen compile specs/lora_fp8_8.toml --set {typed}"
    environment = os.environ | {"_FTGEN_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": "4"}
    probe = "from ftgen.cli.main import ftgen; ftgen(prog_name='ftgen')"
    done = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, cwd=ROOT, env=environment, check=False
    )
    assert {line.partition(",")[2] for line in done.stdout.splitlines()} == offered


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_there_is_a_completion_script_for_each_shell(shell):
    environment = os.environ | {"_FTGEN_COMPLETE": f"{shell}_source"}
    command = [Path(sys.executable).parent / "ftgen"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert "_FTGEN_COMPLETE" in done.stdout
