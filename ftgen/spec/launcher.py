"""Translates the variables of the recipe's launcher to a spec and a site profile.

In: the environment (`Mapping[str, str]`). Out: a TOML text (`str`) from `spec`, and one from `site`.
"""

import json
from collections.abc import Mapping

from ftgen import catalogue
from ftgen.errors import Problem, SpecError, closest

SPEC_VARIABLES = {"DTYPE": "precision", "SFT_SCHEME": "scheme", "FT_TYPE": "scheme", "JOB_TOTAL_GPUS": "gpus"}
SIZES = {"8b": "llama3_8b", "70b": "llama3_70b"}
MEGATRON = "/opt/megatron-lm"  # where the launcher mounts $STAGE_PATH/Megatron-LM


def spec(environment: Mapping[str, str]) -> str:
    """The spec of `DTYPE=fp8 MODEL_SIZE=8b SFT_SCHEME=lora JOB_TOTAL_GPUS=16 ./launch.sh`; SpecError with every problem."""
    said = {key: environment[name].lower() for name, key in SPEC_VARIABLES.items() if environment.get(name)}
    size = environment.get("MODEL_SIZE", "8b").lower()
    problems = [
        Problem((), "is not set", f"set {name} as for the launcher", file=name)
        for name, key in (("DTYPE", "precision"), ("SFT_SCHEME", "scheme"), ("JOB_TOTAL_GPUS", "gpus"))
        if key not in said
    ]
    for name, key, known in (("DTYPE", "precision", ("bf16", "fp8")), ("SFT_SCHEME", "scheme", ("lora", "sft"))):
        if said.get(key, known[0]) not in known:
            problems.append(Problem((), f"must be one of {', '.join(known)}, found {said[key]!r}", file=name))
    if not said.get("gpus", "8").isdecimal():
        problems.append(Problem((), f"must be a number, found {said['gpus']!r}", file="JOB_TOTAL_GPUS"))
    if size not in SIZES:
        problems.append(Problem((), f"must be 8b or 70b, found {size!r}", closest(size, SIZES), file="MODEL_SIZE"))
    if problems:
        raise SpecError(*problems)
    title = catalogue.models()[SIZES[size]].title
    lines = [f"# {said['scheme'].upper()} of {title} in {said['precision'].upper()} on {int(said['gpus'])} H100s."]
    lines += [f'scheme = "{said["scheme"]}"', f'precision = "{said["precision"]}"', f"gpus = {int(said['gpus'])}"]
    lines += [f'model = "{SIZES[size]}"'] if size != "8b" else []
    return "\n".join(lines) + "\n"


def site(environment: Mapping[str, str]) -> str:
    """The site profile of the launcher's cluster: account, partition, GPUs of a node, image, STAGE_PATH."""
    gpus = environment.get("RUN_CONF_GPUS_PER_NODE") or "8"
    if not gpus.isdecimal() or not int(gpus):
        raise SpecError(Problem((), f"must be a number, found {gpus!r}", file="RUN_CONF_GPUS_PER_NODE"))
    image = environment.get("RUN_CONF_IMAGE") or "$STAGE_PATH/nvidia+nemo+24.12.sqsh"
    if unfit := catalogue.why_unfit(image):
        rule, nearest = unfit
        own = "for an image of your own that has them, leave RUN_CONF_IMAGE out, and set python.image and python.image_fits"
        raise SpecError(Problem((), rule, f"use {nearest}; {own}", file="RUN_CONF_IMAGE"))
    lines = [
        f"{key} = {json.dumps(environment[name], ensure_ascii=False)}"
        for name, key in (("SBATCH_PARTITION", "partition"), ("SBATCH_ACCOUNT", "account"), ("STAGE_PATH", "stage_path"))
        if environment.get(name)
    ]
    lines += [
        f"gpus_per_node = {int(gpus)}",
        "",
        "[python]",
        'kind = "container"',
        f"image = {json.dumps(image, ensure_ascii=False)}",
    ]
    return "\n".join([*lines, f'mounts = ["$STAGE_PATH/Megatron-LM:{MEGATRON}"]']) + "\n"
