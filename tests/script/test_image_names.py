"""Images as people write them, and as each program gets them."""

import re
import subprocess

import pytest

SPEC = 'scheme = "lora"\nprecision = "bf16"\ngpus = 8\n'
HERE = {"STAGE_PATH": "/stage", "HOME": "/home/me", "SCRATCH": "/scratch", "PATH": "/usr/bin:/bin"}


def compiled(ftgen, folder, kind: str, image: str) -> str:
    (folder / "spec.toml").write_text(SPEC)
    (folder / "site.toml").write_text(f'[python]\nkind = "{kind}"\nimage = "{image}"\n')
    done = ftgen("compile", "spec.toml", "--site", "site.toml", cwd=folder)
    assert done.returncode == 0, done.stderr
    return (folder / "generated/spec.sh").read_text()


def in_bash(word: str) -> str:
    """A word of the script, as bash reads it on the node."""
    return subprocess.run(["bash", "-uc", f"printf %s {word}"], capture_output=True, text=True, check=True, env=HERE).stdout


@pytest.mark.parametrize(
    ("image", "word"),
    [
        ("/images/nemo.sqsh", "/images/nemo.sqsh"),
        ("$STAGE_PATH/nemo.sqsh", "/stage/nemo.sqsh"),
        ("${SCRATCH}/a $(id).sqsh", "/scratch/a $(id).sqsh"),
        ("~/it's mine.sqsh", "/home/me/it's mine.sqsh"),
        ("nvcr.io/nvidia/nemo:24.12", "nvcr.io#nvidia/nemo:24.12"),
        ("nvcr.io#nvidia/nemo:24.12", "nvcr.io#nvidia/nemo:24.12"),
        ("docker://nvcr.io/nvidia/nemo:24.12", "nvcr.io#nvidia/nemo:24.12"),
        ("docker://nvcr.io#nvidia/nemo:24.12", "nvcr.io#nvidia/nemo:24.12"),
        ("nvidia/cuda:12.6.0-base", "nvidia/cuda:12.6.0-base"),
        ("localhost:5000/nemo", "localhost:5000#nemo"),
        ("dockerd://nemo:latest", "dockerd://nemo:latest"),
    ],
)
def test_pyxis_gets_the_image_as_it_wants_it(ftgen, tmp_path, image, word):
    (found,) = re.findall(r"--container-image=(.*)", compiled(ftgen, tmp_path, "container", image))
    assert in_bash(found) == word


@pytest.mark.parametrize("kind", ["apptainer", "singularity"])
@pytest.mark.parametrize(
    ("image", "word"),
    [
        ("/images/nemo.sif", "/images/nemo.sif"),
        ("$STAGE_PATH/sandbox", "/stage/sandbox"),
        ("nvcr.io/nvidia/nemo:24.12", "docker://nvcr.io/nvidia/nemo:24.12"),
        ("nvcr.io#nvidia/nemo:24.12", "docker://nvcr.io/nvidia/nemo:24.12"),
        ("docker://nvcr.io#nvidia/nemo:24.12", "docker://nvcr.io/nvidia/nemo:24.12"),
        ("oras://registry.example/nemo:1", "oras://registry.example/nemo:1"),
        ("docker-archive:/x/nemo.tar", "docker-archive:/x/nemo.tar"),
    ],
)
def test_apptainer_gets_the_image_as_it_wants_it(ftgen, tmp_path, kind, image, word):
    script = compiled(ftgen, tmp_path, kind, image)
    assert re.findall(r"\n        (apptainer|singularity) exec\n", script) == [kind]
    (found,) = re.findall(r'--bind .*\n +(.*)\n +"\$\{FTGEN_PYTHON', script)
    assert in_bash(found) == word
