"""Images: which are known by their names, which are refused, and that the catalogue says what was tested."""

import re
from pathlib import Path

import pytest
import tomli

from ftgen import catalogue

ROOT = Path(__file__).parent.parent.parent
SETS = ROOT / "tests" / "runtime" / "sets"
# The version of each image that the package index has and the tests install, where it is another than the image's.
INSTEAD = {("25.02", "nemo"): "2.2.1", ("25.07", "megatron_core"): "0.13.0"}
SPEC = 'scheme = "lora"\nprecision = "fp8"\ngpus = 8\ncheckpoint = { source = "random" }\ndata = { kind = "synthetic" }\n'
TAGGED = [name for name in catalogue.images() if name != "ftgen"]


@pytest.mark.parametrize(
    ("name", "tag"),
    [
        ("nvcr.io/nvidia/nemo:24.12", "24.12"),
        ("nvcr.io#nvidia/nemo:26.04", "26.04"),
        ("docker://nvcr.io/nvidia/nemo:25.04.02", "25.04"),
        ("docker://nvcr.io#nvidia/nemo:24.12", "24.12"),
        ("$STAGE_PATH/nvidia+nemo+24.12.sqsh", "24.12"),
        ("/images/nemo-24.12.sif", "24.12"),
        ("/images/nvidia_nemo_26.06.01.sqsh", "26.06"),
        ("/images/NeMo-v26.02.sif", "26.02"),
        ("/images/nemo-26.04/mine.sqsh", None),
        ("/images/nemo.sqsh", None),
        ("/images/nemo-rl-26.04.sqsh", None),
        ("/images/nemo-26.041.sif", None),
        ("nvcr.io/nvidia/nemo:24.01.framework", None),
        ("nvcr.io/nvidia/pytorch:26.04-py3", None),
    ],
)
def test_an_image_is_known_by_its_name(name: str, tag: str | None) -> None:
    image = catalogue.image_named(name)
    assert (image.name if image else None) == tag


def compiled(ftgen, folder: Path, python: str, command: str = "compile"):
    (folder / "spec.toml").write_text(SPEC)
    (folder / "site.toml").write_text(f"gpus_per_node = 8\n[python]\n{python}")
    specs = [folder / "spec.toml"] if command == "compile" else []
    return ftgen(command, *specs, "--site", folder / "site.toml", "--out", folder / "out")


def test_the_recipes_own_image_compiles(tmp_path: Path, ftgen) -> None:
    """As the recipe's launcher names it, and as people have it from the registry."""
    launcher = 'kind = "container"\nimage = "$STAGE_PATH/nvidia+nemo+24.12.sqsh"\n'
    launcher += 'mounts = ["$STAGE_PATH/Megatron-LM:/opt/megatron-lm"]\n'
    from_registry = 'kind = "container"\nimage = "$STAGE_PATH/nvidia+nemo+24.12.sqsh"\n'
    from_registry += 'image_from = "docker://nvcr.io#nvidia/nemo:24.12"\n'
    for python in (launcher, from_registry):
        done = compiled(ftgen, tmp_path, python)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", ["container", "apptainer"])
@pytest.mark.parametrize("command", ["compile", "setup", "list", "doctor"])
def test_an_image_without_nemo_is_refused_before_anything_is_queued(command: str, kind: str, tmp_path: Path, ftgen) -> None:
    python = f'kind = "{kind}"\nimage = "$STAGE_PATH/nvidia+nemo+26.04.sqsh"\n'
    done = compiled(ftgen, tmp_path, python, command) if command in {"compile", "setup"} else None
    if not done:
        compiled(ftgen, tmp_path, python)
        done = ftgen(command, tmp_path / "spec.toml", "--site", tmp_path / "site.toml")
    said = done.stdout + done.stderr
    rule = "python.image: must have the packages that a job needs: nvcr.io/nvidia/nemo:26.04 lacks NeMo"
    assert rule in said
    if command != "list":  # which prints the first line for each spec, and goes on
        assert done.returncode == 1
        assert (
            "hint: use nvcr.io/nvidia/nemo:26.02; if this is an image of your own that has them, set python.image_fits"
            in said
        )


def test_the_user_has_the_last_word(tmp_path: Path, ftgen) -> None:
    python = 'kind = "container"\nimage = "$STAGE_PATH/nvidia+nemo+26.04.sqsh"\nimage_fits = true\n'
    done = compiled(ftgen, tmp_path, python)
    assert done.returncode == 0, done.stderr


def test_the_launchers_variables_name_an_image_that_fits(ftgen) -> None:
    variables = {"DTYPE": "fp8", "SFT_SCHEME": "lora", "JOB_TOTAL_GPUS": "16"}
    assert "nvidia+nemo+24.12.sqsh" in ftgen("import-env", env=variables).stderr
    refused = ftgen("import-env", env=variables | {"RUN_CONF_IMAGE": "/images/nvidia+nemo+26.06.sqsh"})
    assert refused.returncode == 1
    assert "RUN_CONF_IMAGE: must have the packages that a job needs: nvcr.io/nvidia/nemo:26.06 lacks NeMo" in refused.stderr
    assert "hint: use nvcr.io/nvidia/nemo:26.02; " in refused.stderr


def test_list_shows_every_image(ftgen) -> None:
    lines = ftgen("list", "--images").stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["image", "ftgen", *(f"nvcr.io/nvidia/nemo:{tag}" for tag in TAGGED)]


@pytest.mark.parametrize("tag", [tag for tag in TAGGED if "nemo" in catalogue.images()[tag].fits])
def test_an_image_that_fits_has_a_set_in_the_tests(tag: str) -> None:
    image = catalogue.images()[tag]
    nemo = INSTEAD.get((tag, "nemo"), image.nemo)
    megatron_core = INSTEAD.get((tag, "megatron_core"), image.megatron_core)
    lines = (SETS / f"{nemo}.txt").read_text().splitlines()
    assert f"nemo_toolkit=={nemo}" in lines
    assert f"megatron-core=={megatron_core}" in lines
    assert any(line.startswith("#") and f"image {tag}" in line for line in lines)


def test_the_optimizations_that_an_image_is_without_exist() -> None:
    for image in catalogue.images().values():
        words = set(re.findall(r"[a-z]+_[a-z_]+", image.lacks))
        assert words <= set(catalogue.optimizations())
        assert set(image.fits) <= set(image.engines)
        assert ("nemo" in image.fits) == ("nemo" in image.engines)


def test_ftgens_own_set_is_the_pinned_one() -> None:
    own = catalogue.images()["ftgen"]
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    assert {f"nemo-toolkit=={own.nemo}", f"megatron-core=={own.megatron_core}"} <= set(pins)
    extras = tomli.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert f"transformer-engine[pytorch]=={own.transformer_engine}.*" in extras["gpu"]
