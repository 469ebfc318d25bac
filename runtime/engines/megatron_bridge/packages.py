"""Find out whether the installed packages can convert and train, without importing them.

In: sys.path. Out: what is found, and a sentence for each thing that is missing.

`import megatron.bridge` takes ten seconds. This module looks for the packages and for the files that a training imports. It
uses no other module of the runtime but installed.py, because the set-up job contains the text of both.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from runtime.engines.installed import folder, is_there, named, version

# Packages, by the names that pip knows.
OTHERS = {
    "torch": "torch",
    "transformers": "transformers",
    "huggingface_hub": "huggingface_hub",
    "omegaconf": "omegaconf",
    "pyarrow": "pyarrow",
    "modelopt": "nvidia-modelopt",
    "diffusers": "diffusers",
    "peft": "peft",
}
ON_A_GPU = {"transformer_engine": "transformer-engine"}
# What a training imports that Megatron-Bridge does not have before 0.6.0: files, and what their text must have.
FILES = {
    "data/builders/__init__.py": "GPTSFTDatasetConfig",
    "data/packing/offline.py": "prepare_gpt_sft_packed_data",
    "training/callbacks.py": "on_train_step_start",
    "training/train.py": "checkpoint_and_decide_exit",
}


def found() -> str:
    """What is there, such as "Megatron-Bridge 0.6.2 in /opt/Megatron-Bridge, PyTorch 2.9.0"."""
    places = (("Megatron-Bridge", folder("megatron.bridge")), ("Megatron-Core", folder("megatron.core")))
    there = [named(name, place) for name, place in places if place]
    others = (("Transformer Engine", version("transformer-engine")), ("PyTorch", version("torch")))
    return (
        ", ".join(there + [f"{name} {number}" for name, number in others if number]) or "no Megatron-Bridge and no PyTorch"
    )


def missing(recipes: list[str], *, gpu: bool) -> Iterator[str]:
    """A sentence for each thing that is missing. `recipes`: a module in megatron.bridge.recipes, and a name in it."""
    for package, name in (OTHERS | (ON_A_GPU if gpu else {})).items():
        if not is_there(package):
            yield f"the package {name} is not installed"
    bridge = folder("megatron.bridge")
    for place, name in ((bridge, "megatron-bridge"), (folder("megatron.core"), "megatron-core")):
        if not place:
            yield f"the package {name} is not installed" + (", only NeMo" if is_there("nemo") else "")
    if bridge:
        yield from _missing_in_bridge(bridge, recipes)


def _missing_in_bridge(bridge: Path, recipes: list[str]) -> Iterator[str]:
    lacking = [name for file, name in FILES.items() if name not in _text(bridge / file)]
    if lacking:
        yield f"{named('Megatron-Bridge', bridge)} has no {lacking[0]}; versions 0.6.0 and later have it"
        return
    for recipe in recipes:
        place, name = recipe.split(":")
        text = _text(bridge.joinpath("recipes", *place.split(".")).with_suffix(".py"))
        if not re.search(rf"^def {name}_(sft|peft)_\d+gpu_h100_bf16_config", text, re.MULTILINE):
            yield f"{named('Megatron-Bridge', bridge)} has no recipe {name}, which this model needs"


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8") if file.is_file() else ""
