"""The variables of the recipe's own launcher become a spec and a site profile that do the same."""

import os
import subprocess
import sys

import pytest
import tomli

LAUNCHER = {"DTYPE": "fp8", "MODEL_SIZE": "8b", "SFT_SCHEME": "lora", "JOB_TOTAL_GPUS": "16", "RUN_CONF_GPUS_PER_NODE": "8"}
NAMES = {*LAUNCHER, "FT_TYPE", "RUN_CONF_IMAGE", "STAGE_PATH", "SBATCH_ACCOUNT", "SBATCH_PARTITION"}
CLEAN = {name: value for name, value in os.environ.items() if name not in NAMES}


def test_the_documented_command_line_becomes_the_documented_experiment(ftgen, tmp_path):
    more = {"STAGE_PATH": "/lustre/it's mine", "SBATCH_ACCOUNT": "acct", "SBATCH_PARTITION": "batch"}
    done = ftgen("import-env", "--spec", "s.toml", "--site", "site.toml", cwd=tmp_path, env=CLEAN | LAUNCHER | more)
    assert (done.returncode, done.stdout, done.stderr) == (0, "s.toml\nsite.toml\n", "")
    assert tomli.loads((tmp_path / "s.toml").read_text()) == {"scheme": "lora", "precision": "fp8", "gpus": 16}
    assert ftgen("compile", "s.toml", "--site", "site.toml", cwd=tmp_path).returncode == 0
    script = (tmp_path / "generated/s.sh").read_text()
    for line in (
        "#SBATCH --account=acct",
        "#SBATCH --partition=batch",
        "#SBATCH --nodes=2",
        '--container-image="${STAGE_PATH}/nvidia+nemo+24.12.sqsh"',
        '"${STAGE_PATH}/Megatron-LM:/opt/megatron-lm"',
        "readonly experiment=lora_nemo_llama3_8b_fp8_16",
    ):
        assert line in script


def test_stdout_is_a_spec_that_compiles(ftgen, tmp_path):
    with (tmp_path / "s.toml").open("w") as file:
        command = [sys.executable, "-m", "ftgen", "import-env"]
        done = subprocess.run(command, stdout=file, stderr=subprocess.PIPE, text=True, env=CLEAN | LAUNCHER, check=True)
    assert all(line.startswith("# ") for line in done.stderr.splitlines())
    assert "Save it with --site FILE" in done.stderr
    compiled = ftgen("compile", "s.toml", cwd=tmp_path)
    assert (compiled.returncode, compiled.stdout, compiled.stderr) == (0, "generated/s.sh\n", "")


def test_the_site_profile_is_in_comments_that_can_be_uncommented(ftgen):
    environment = {"DTYPE": "BF16", "FT_TYPE": "sft", "JOB_TOTAL_GPUS": "8", "RUN_CONF_IMAGE": "nvcr.io#nvidia/nemo:24.12"}
    done = ftgen("import-env", env=CLEAN | environment)
    assert tomli.loads(done.stdout) == {"scheme": "sft", "precision": "bf16", "gpus": 8}
    _, *site = (line.removeprefix("# ") for line in done.stderr.splitlines())
    assert tomli.loads("\n".join(site))["python"]["image"] == "nvcr.io#nvidia/nemo:24.12"


def test_a_site_file_leaves_stdout_to_the_spec(ftgen, tmp_path):
    done = ftgen("import-env", "--site", tmp_path / "site.toml", env=CLEAN | LAUNCHER)
    assert tomli.loads(done.stdout) == {"scheme": "lora", "precision": "fp8", "gpus": 16}
    assert done.stderr == f"{tmp_path}/site.toml\n"


@pytest.mark.parametrize(
    ("environment", "line"),
    [
        ({"DTYPE": ""}, "DTYPE: is not set"),
        ({"DTYPE": "fp4"}, "DTYPE: must be one of bf16, fp8, found 'fp4'"),
        ({"JOB_TOTAL_GPUS": "many"}, "JOB_TOTAL_GPUS: must be a number, found 'many'"),
        ({"MODEL_SIZE": "9b"}, "MODEL_SIZE: must be 8b or 70b, found '9b'"),
    ],
)
def test_what_cannot_be_translated_is_named(ftgen, environment, line):
    done = ftgen("import-env", env=CLEAN | LAUNCHER | environment)
    assert done.returncode == 1
    assert line in done.stderr.splitlines()
