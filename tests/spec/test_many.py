"""Many experiments from few files: what a spec extends, the points of its matrix, folders, and what is stale."""

import json
import re
import shlex
from pathlib import Path

import pytest

BASE = 'scheme = "lora"\nmax_steps = 60\n[data]\nkind = "synthetic"\nexamples = 900\n'
SWEEP = """extends = "base.toml"
data.examples = 400
[matrix.product]
precision = ["bf16", "fp8"]
gpus = [8, 16]
"""


@pytest.fixture
def specs(tmp_path: Path) -> Path:
    folder = tmp_path / "specs"
    folder.mkdir()
    (folder / "base.toml").write_text(BASE)
    (folder / "sweep.toml").write_text(SWEEP)
    return folder


def plans(out: Path) -> dict[str, dict]:
    """The plans of every script in a folder, by the script's name."""
    texts = {path.stem: path.read_text() for path in out.glob("*.py")}
    return {name: json.loads(text.split('r"""\n')[1].split('\n"""')[0]) for name, text in texts.items()}


def compiled(ftgen, folder: Path, *arguments: object) -> dict[str, dict]:
    done = ftgen("compile", folder, *arguments, "--out", folder.parent / "out")
    assert done.returncode == 0, done.stderr
    return plans(folder.parent / "out")


def test_a_spec_says_only_what_differs_from_the_one_it_extends(ftgen, specs):
    (specs / "one.toml").write_text('extends = "base.toml"\nprecision = "bf16"\ngpus = 8\ndata.examples = 400\n')
    plan = compiled(ftgen, specs / "one.toml")["one"]
    assert (plan["scheme"], plan["max_steps"], plan["gpus"]) == ("lora", 60, 8)
    expected = {"kind": "synthetic", "path": None, "examples": 400, "packed": True}
    assert {key: plan["data"][key] for key in expected} == expected


def test_the_plan_names_the_file_that_said_each_key(ftgen, specs):
    shown = ftgen("plan", "specs/sweep.toml", "--name", "sweep_fp8_16", "--set", "seed=7", "--all", cwd=specs.parent).stdout
    origin = {line.split()[0]: line.split()[2:] for line in shown.splitlines()}
    assert origin["max_steps"] == ["specs/base.toml:2"]
    assert origin["data.examples"] == ["specs/sweep.toml:2"]
    assert origin["precision"] == ["specs/sweep.toml:4"]
    assert origin["gpus"] == ["specs/sweep.toml:5"]
    assert origin["seed"] == ["--set"]


@pytest.mark.parametrize(
    ("matrix", "names"),
    [
        ("product = { gpus = [8, 16], precision = ['bf16', 'fp8'] }", "s_8_bf16 s_8_fp8 s_16_bf16 s_16_fp8"),
        ("zip = { gpus = [8, 16], precision = ['bf16', 'fp8'] }", "s_8_bf16 s_16_fp8"),
        ("zip = { gpus = [8, 16], max_steps = [40, 50] }\nproduct.seq_length = [2048]", None),
        ("product.gpus = [8, 16]\nexclude = [{ gpus = 8 }]", "s_16"),
        ("product.gpus = [8]\ninclude = [{ gpus = 64, precision = 'fp8' }]", "s_8 s_64_fp8"),
        ("product.data.packed = [true, false]", "s_packed-true s_packed-false"),
        ("product.lora.targets = [['linear_qkv'], ['linear_qkv', 'linear_proj']]", None),
        ("product.data = [{ kind = 'squad' }, { kind = 'jsonl', path = '/a b' }]", "s_squad s_jsonl-a-b"),
        ("product.gpus = [8, 16]\nname = 'x{gpus}.{data.kind}'", "x8.synthetic x16.synthetic"),
    ],
)
def test_a_matrix_names_each_of_its_points(ftgen, specs, matrix, names):
    (specs / "s.toml").write_text(f'extends = "base.toml"\nprecision = "bf16"\ngpus = 8\n[matrix]\n{matrix}\n')
    found = compiled(ftgen, specs / "s.toml")
    if names is None:
        names = {
            "product.lora": "s_targets-linear-qkv s_targets-linear-qkv-linear-proj",
            "zip = { gpus": "s_seq_length-2048_8_max_steps-40 s_seq_length-2048_16_max_steps-50",
        }[matrix[:12]]
    assert set(found) == set(names.split())
    assert all(re.fullmatch("[A-Za-z0-9._+-]+", name) for name in found)


def test_a_script_says_which_point_it_is(ftgen, specs):
    found = compiled(ftgen, specs / "sweep.toml", "--set", "walltime=01:00:00", "--set", "data.packed=false")
    assert found["sweep_fp8_16"]["point"] == {"precision": "fp8", "gpus": 16}
    assert found["sweep_fp8_16"]["overrides"] == {"walltime": "01:00:00", "data.packed": False}
    header = (specs / "out/sweep_fp8_16.sh").read_text().split("\n#SBATCH")[0]
    assert " from sweep.toml (sha256 " in header
    assert "\n# Point of the spec's matrix: precision=fp8, gpus=16.\n" in header
    assert "\n# Overrides: --set walltime=01:00:00 --set data.packed=false.\n" in header


def test_overrides_can_be_given_again_as_the_header_says_them(ftgen, specs):
    said = ["environment.A=it's $x", "data.packed=false", 'lora.targets=["linear_qkv"]', "max_steps=60"]
    given = [word for text in said for word in ("--set", text)]
    (specs / "one.toml").write_text('extends = "base.toml"\nprecision = "bf16"\ngpus = 8\n')
    compiled(ftgen, specs / "one.toml", *given)
    (line,) = re.findall("^# Overrides: (.*)\\.$", (specs / "out/one.sh").read_text(), flags=re.MULTILINE)
    before = (specs / "out/one.sh").read_text()
    compiled(ftgen, specs / "one.toml", *shlex.split(line))
    assert (specs / "out/one.sh").read_text() == before


def test_a_folder_compiles_all_that_is_whole(ftgen, specs):
    (specs / "whole.toml").write_text('scheme = "sft"\nprecision = "bf16"\ngpus = 8\n')
    (specs / "more.toml").write_text('extends = "whole.toml"\ngpus = 16\n')
    assert set(compiled(ftgen, specs)) == {f"sweep_{p}_{n}" for p in ("bf16", "fp8") for n in (8, 16)} | {"whole", "more"}


def test_two_specs_cannot_write_the_same_script(ftgen, specs, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other/sweep_bf16_8.toml").write_text('scheme = "sft"\nprecision = "bf16"\ngpus = 8\n')
    done = ftgen("compile", specs, tmp_path / "other", "--out", tmp_path / "out")
    assert done.returncode == 1
    assert "the name of an experiment must be unique" in done.stderr
    assert not (tmp_path / "out").exists()


def test_list_shows_what_there_is_and_what_is_stale(ftgen, specs):
    def states() -> dict[str, str]:
        lines = ftgen("list", cwd=specs.parent).stdout.splitlines()
        return {line.split()[0]: re.split(r"  +", line)[-1] for line in lines}

    assert set(states().values()) == {"not compiled"}
    assert ftgen("compile", "specs", cwd=specs.parent).returncode == 0
    assert set(states().values()) == {"current"}
    (specs / "base.toml").write_text(BASE.replace("60", "70"))
    ftgen("compile", "specs/sweep.toml", "--set", "matrix.product.gpus=[8]", "--set", "seed=3", cwd=specs.parent)
    (specs / "bad.toml").write_text('scheme = "lora"\n')
    found = states()
    assert found["sweep_bf16_8"].startswith("stale: compiled with --set")
    assert found["sweep_bf16_16"] == "stale"
    assert found["bad"].startswith("refused: specs/bad.toml: gpus: is required")
    (specs / "sweep.toml").write_text(SWEEP.replace("[8, 16]", "[8]"))
    assert states()["sweep_fp8_16"] == "no spec compiles to this script"


def test_a_spec_with_many_points_must_be_told_which_one_is_meant(ftgen, specs):
    done = ftgen("plan", specs / "sweep.toml")
    assert done.returncode == 1
    assert (
        "has 4 experiments\n  hint: use --name with one of sweep_bf16_8, sweep_bf16_16, sweep_fp8_8, sweep_fp8_16"
        in done.stderr
    )


@pytest.mark.parametrize(
    ("base", "own", "steps"), [("max_steps = 60", "epochs = 2", (None, 2)), ("epochs = 2", "", (None, 2))]
)
def test_epochs_replace_the_steps_of_a_base_and_the_other_way_round(ftgen, tmp_path, base, own, steps):
    (tmp_path / "base.toml").write_text(f'scheme = "lora"\nprecision = "bf16"\ngpus = 8\n{base}\n')
    (tmp_path / "one.toml").write_text(f'extends = "base.toml"\n{own}\n')
    plan = json.loads(ftgen("plan", tmp_path / "one.toml", "--json").stdout)
    assert (plan["max_steps"], plan["epochs"]) == (None, 2)
    plan = json.loads(ftgen("plan", tmp_path / "one.toml", "--json", "--set", "max_steps=70").stdout)
    assert (plan["max_steps"], plan["epochs"]) == (70, None)
