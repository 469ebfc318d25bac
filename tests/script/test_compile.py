"""Specs to scripts: what is written, and that bash reads it as it was meant."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tomli

ROOT = Path(__file__).parents[2]

CASES = Path(__file__).parents[1] / "golden"
CARRIED = (
    "# unpack FOLDER: writes the entrypoint and the runtime files.\n"  # what comes from here on is as long as the runtime
)
SPECS = sorted((ROOT / "specs").glob("*.toml"))
DOCUMENTED = {
    f"{scheme}_{precision}_{gpus}" for scheme in ("sft", "lora") for precision in ("bf16", "fp8") for gpus in (8, 16, 32)
}


def compile_case(ftgen, case: Path, out: Path) -> str:
    """The script of a case: spec.toml, perhaps site.toml, perhaps further arguments, one a line."""
    site = ["--site", case / "site.toml"] if (case / "site.toml").exists() else []
    more = (case / "arguments").read_text().splitlines() if (case / "arguments").exists() else []
    done = ftgen("compile", case / "spec.toml", *site, *more, "--out", out)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{out}/spec.sh\n"
    return (out / "spec.sh").read_text()


def texts(folder: Path) -> dict[str, bytes]:
    """The Python files below a folder, by their path in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.py")}


def shellcheck(*scripts: Path) -> None:
    done = subprocess.run(["shellcheck", *scripts], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("case", sorted(CASES.iterdir()), ids=lambda case: case.name)
def test_a_spec_compiles_to_the_expected_script(case, ftgen, tmp_path, matches_golden):
    script = compile_case(ftgen, case, tmp_path)
    own, carried = script.split(CARRIED)
    matches_golden(case / "expected.sh", own)
    assert carried.endswith('\nmain "$@"\n')


@pytest.mark.parametrize("case", sorted(CASES.iterdir()), ids=lambda case: case.name)
def test_bash_and_shellcheck_have_nothing_to_say(case, ftgen, tmp_path):
    """`make check` reads whole scripts; the runtime files that they carry take longer than what they do."""
    script = compile_case(ftgen, case, tmp_path)
    subprocess.run(["bash", "-n", tmp_path / "spec.sh"], check=True)
    own = script.split(CARRIED)[0]
    (tmp_path / "own.sh").write_text(f'{own}main "$@"\n')
    shellcheck(tmp_path / "own.sh")


def test_the_script_carries_the_entrypoint_and_the_runtime_unchanged(ftgen, tmp_path):
    compile_case(ftgen, CASES / "recipe", tmp_path)
    subprocess.run(["bash", tmp_path / "spec.sh", "--unpack", tmp_path / "unpacked"], check=True)
    assert (tmp_path / "unpacked/spec.py").read_bytes() == (tmp_path / "spec.py").read_bytes()
    ours, other = texts(ROOT / "runtime"), "engines/megatron_bridge/"
    assert texts(tmp_path / "unpacked/runtime") == {path: text for path, text in ours.items() if not path.startswith(other)}


def test_a_script_carries_only_the_files_of_its_engine(ftgen, tmp_path):
    """The spec has conversations, epochs and all tables of a fine-tune that delivers a model."""
    sets = ("--set", "engine=megatron_bridge", "--set", "log.tensorboard=true")
    done = ftgen("compile", "specs/quickstart_finetune.toml", *sets, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    subprocess.run(["bash", tmp_path / "quickstart_finetune.sh", "--unpack", tmp_path / "unpacked"], check=True)
    engines = {path.name for path in (tmp_path / "unpacked/runtime/engines").iterdir() if path.is_dir()}
    assert engines == {"megatron_bridge"}


def test_values_come_back_unchanged_from_bash(ftgen, tmp_path):
    script = compile_case(ftgen, CASES / "hostile_values", tmp_path)
    spec = tomli.loads((CASES / "hostile_values/spec.toml").read_text())
    functions = script.rpartition('main "$@"')[0]
    probe = tmp_path / "probe.sh"  # longer than a word of a command line may be
    probe.write_text(functions + "load_environment convert\nfind_python() { :; }\nenv -0\n")
    printed = subprocess.run(["bash", probe], capture_output=True, check=True, cwd=tmp_path).stdout
    seen = dict(line.split("=", 1) for line in printed.decode().split("\0") if "=" in line)
    dollar = f"{os.environ['HOME']} {os.environ['PATH']} $(id) `id` ${{}} $1 $"
    assert {name: seen[name] for name in spec["environment"]} == spec["environment"] | {"DOLLAR": dollar}
    subprocess.run(["bash", tmp_path / "spec.sh", "--unpack", tmp_path / "unpacked"], check=True, cwd=tmp_path)
    assert plan_in(tmp_path / "unpacked/spec.py")["data"]["path"] == spec["data"]["path"]
    assert not (tmp_path / "pwned").exists()


def plan_in(entrypoint: Path) -> dict:
    """The plan that an entrypoint carries."""
    scope: dict = {"__name__": "read", "__file__": str(entrypoint)}
    exec(compile(entrypoint.read_text(), entrypoint, "exec"), scope)  # noqa: S102 - our own file
    return scope["PLAN"]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.stem)
def test_every_spec_compiles_to_the_same_bytes_each_time(spec, ftgen, ftgen_process, tmp_path):
    assert ftgen("compile", spec, "--out", tmp_path / "first").returncode == 0
    assert ftgen_process("compile", spec, "--out", tmp_path / "second").returncode == 0
    first, second = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("first", "second"))
    assert first == second
    assert set(first) == {f"{spec.stem}.sh", f"{spec.stem}.py"}
    subprocess.run(["bash", "-n", tmp_path / "first" / f"{spec.stem}.sh"], check=True)


def test_shellcheck_has_nothing_to_say_of_a_whole_script_for_either_engine(ftgen, tmp_path):
    """`make check` reads those of the documented experiments."""
    for engine in ("nemo", "megatron_bridge"):
        assert (
            ftgen("compile", "specs/quickstart.toml", "--set", f"engine={engine}", "--out", tmp_path / engine).returncode
            == 0
        )
        shellcheck(tmp_path / engine / "quickstart.sh")


def test_the_documented_experiments_are_there_and_short():
    named = {spec.stem: spec for spec in SPECS if not spec.stem.startswith("quickstart")}
    assert set(named) == DOCUMENTED
    assert all(len(spec.read_text().splitlines()) < 10 for spec in named.values())


def test_the_committed_scripts_are_current(ftgen):
    specs = [spec for spec in SPECS if not spec.stem.startswith("quickstart")]
    done = ftgen("compile", *specs, "--check")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    committed = subprocess.run(["git", "ls-files", "generated"], capture_output=True, text=True, check=True, cwd=ROOT)
    assert {Path(path).name for path in committed.stdout.split()} == {f"{n}.{x}" for n in DOCUMENTED for x in ("sh", "py")}


def test_check_writes_nothing_and_shows_what_is_stale(ftgen, tmp_path):
    spec = ROOT / "specs/lora_fp8_16.toml"
    ftgen("compile", spec, "--out", tmp_path)
    assert ftgen("compile", spec, "--out", tmp_path, "--check").returncode == 0
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    stale = ftgen("compile", spec, "--out", tmp_path, "--check", "--set", "max_steps=60")
    assert stale.returncode == 1
    assert '-  "max_steps": 100,\n+  "max_steps": 60,\n' in stale.stdout
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}
    missing = ftgen("compile", spec, "--out", tmp_path / "nowhere", "--check")
    assert missing.returncode == 1
    assert not (tmp_path / "nowhere").exists()


def test_an_override_is_in_the_plan_and_in_the_header(ftgen, tmp_path):
    done = ftgen("compile", "specs/lora_fp8_16.toml", "--set", "max_steps=60", "--out", tmp_path)
    assert done.returncode == 0
    assert "# Overrides: --set max_steps=60.\n" in (tmp_path / "lora_fp8_16.sh").read_text()
    plan = plan_in(tmp_path / "lora_fp8_16.py")
    assert (plan["max_steps"], plan["overrides"]) == (60, {"max_steps": 60})


def test_the_plan_shows_where_each_number_comes_from(ftgen):
    shown = ftgen("plan", "specs/lora_fp8_16.toml", "--set", "max_steps=60", "--all").stdout
    rows = {line.split()[0]: line.split(maxsplit=1)[1] for line in shown.splitlines()}
    assert rows["gpus"].split() == ["16", "specs/lora_fp8_16.toml:5"]
    assert rows["max_steps"].split() == ["60", "--set"]
    assert rows["global_batch_size"].endswith("4 x gpus, as in the recipe")
    assert rows["gpu.peak_flops"].startswith("1.979e+15")
    assert json.loads(ftgen("plan", "specs/lora_fp8_16.toml", "--json").stdout)["nodes"] == 2


def test_the_plan_fits_one_screen_and_names_who_changed_a_default(ftgen):
    lines = ftgen("plan", "specs/lora_fp8_16.toml", "--set", "max_steps=60", "--set", "seed=1234").stdout.splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 100
    rows = [line.split(maxsplit=1) for line in lines]
    assert ["total", "35.0 of 80 GiB (44%)"] in rows
    assert ["split", "TP 1, PP 1, CP 1, DP 16"] in rows
    assert rows[-4:] == [
        ["scheme", "lora  (specs/lora_fp8_16.toml:3)"],
        ["precision", "fp8  (specs/lora_fp8_16.toml:4)"],
        ["gpus", "16  (specs/lora_fp8_16.toml:5)"],
        ["max_steps", "60  (--set)"],  # a seed that is the default is no difference
    ]


def test_the_plan_fits_one_screen_however_much_is_changed(ftgen):
    changes = [word for n in range(60) for word in ("--set", f"environment.X_{n}={'long ' * 60}")]
    lines = ftgen("plan", "specs/lora_fp8_16.toml", *changes).stdout.splitlines()
    assert len(lines) == 40
    assert max(map(len, lines)) <= 100
    assert lines[-1].endswith("more lines: see ftgen plan --all")


def test_the_schema_accepts_every_spec_and_refuses_unknown_keys(ftgen):
    import jsonschema

    schema = json.loads(ftgen("schema").stdout)
    for spec in SPECS:
        jsonschema.validate(tomli.loads(spec.read_text()), schema)
    with pytest.raises(jsonschema.ValidationError, match="tensor_paralel"):
        jsonschema.validate({"scheme": "sft", "precision": "bf16", "gpus": 8, "tensor_paralel": 2}, schema)


def test_compiling_is_quick_and_loads_nothing_heavy(ftgen, tmp_path):
    took: list[float] = []
    while len(took) < 20 and min(took, default=1) >= 0.3:  # a machine that is busy makes every instruction slower
        before = os.times()
        assert ftgen("compile", "specs/lora_fp8_16.toml", "--out", tmp_path).returncode == 0
        after = os.times()  # the process's own time: what it would take on an idle machine, whatever else runs on this one
        took.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert min(took) < 0.3, took
    modules = "ftgen.cli.main, ftgen.script.render, ftgen.plan.experiments, ftgen.plan.overview, ftgen.show.formats"
    probe = f"import sys, {modules}; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout.split()
    assert not {"torch", "nemo", "megatron", "transformers", "huggingface_hub", "lightning", "numpy"} & set(loaded)
