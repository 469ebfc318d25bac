"""Find out whether the installed packages can convert and train, without importing them.

In: sys.path. Out: what is found, and a sentence for each thing that is missing.

`import nemo` takes half a minute. This module finds the packages that `import` would take, and reads their files: so
sources that come first on sys.path count, and versions of packages do not. NeMo and Megatron-Core fit together if
Megatron-Core has every name that NeMo imports from it. It uses no other module of the runtime but installed.py, because the
set-up job contains the text of both.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from runtime.engines.installed import folder, is_there, named, version

# Packages, by the names that pip knows.
OTHERS = {
    "torch": "torch",
    "lightning": "lightning",
    "transformers": "transformers",
    "huggingface_hub": "huggingface_hub",
    "nemo_run": "nemo_run",
    "fiddle": "fiddle",
}
ON_A_GPU = {"transformer_engine": "transformer-engine"}
IMPORTERS = ("collections/llm", "lightning")  # folders of NeMo that a training imports
IMPORT = re.compile(r"^from (megatron\.core[\w.]*) import (?:\(([^)]*)\)|([^\n(]*))", re.MULTILINE)
NAME = re.compile(r"(\w+)(?: as \w+)?\s*(?:,|$)", re.MULTILINE)
COMMENT = re.compile(r"#.*")


def found() -> str:
    """What is there, such as "NeMo 2.7.3 in /opt/NeMo/nemo, PyTorch 2.9.0"."""
    places = (("NeMo", folder("nemo")), ("Megatron-Core", folder("megatron.core")))
    there = [named(name, place) for name, place in places if place]
    others = (("Transformer Engine", version("transformer-engine")), ("PyTorch", version("torch")))
    return ", ".join(there + [f"{name} {number}" for name, number in others if number]) or "no NeMo and no PyTorch"


def missing(recipes: list[str], *, gpu: bool) -> Iterator[str]:
    """A sentence for each thing that is missing. `recipes`: modules in nemo.collections.llm.recipes."""
    for package, name in (OTHERS | (ON_A_GPU if gpu else {})).items():
        if not is_there(package):
            yield f"the package {name} is not installed"
    nemo, core = folder("nemo"), folder("megatron.core")
    for place, name in ((nemo, "nemo_toolkit"), (core, "megatron-core")):
        if not place:
            yield f"the package {name} is not installed" + (", only Megatron-Bridge" if is_there("megatron.bridge") else "")
    if nemo:
        yield from _missing_in_nemo(nemo, recipes)
    if nemo and core:
        yield from _missing_in_megatron(nemo, core)


def _missing_in_nemo(nemo: Path, recipes: list[str]) -> Iterator[str]:
    library = nemo / "collections" / "llm"
    if not library.is_dir():
        yield f"{named('NeMo', nemo)} has no nemo.collections.llm; versions 2.1 to 2.7 have it"
        return
    for recipe in recipes:
        if not (library / "recipes" / f"{recipe}.py").is_file():
            yield f"{named('NeMo', nemo)} has no recipe {recipe}, which this model needs"


def _missing_in_megatron(nemo: Path, core: Path) -> Iterator[str]:
    lacking = dict.fromkeys(name for name in _imported(nemo) if not _has(core, *name))
    if lacking:
        names = ", ".join(f"{module}.{name}" for module, name in list(lacking)[:3]) + (", ..." if len(lacking) > 3 else "")
        yield f"{named('NeMo', nemo)} does not fit {named('Megatron-Core', core)}, which lacks {names}"


def _imported(nemo: Path) -> Iterator[tuple[str, str]]:
    """Module and name of what NeMo imports from Megatron-Core, except inside of `try` and of functions."""
    for place in IMPORTERS:
        for file in sorted((nemo / place).rglob("*.py")):
            for module, several, few in IMPORT.findall(file.read_text(encoding="utf-8", errors="replace")):
                yield from ((module, name) for name in NAME.findall(COMMENT.sub("", several or few)))


def _has(core: Path, module: str, name: str) -> bool:
    place = core.joinpath(*module.split(".")[2:])
    if (place / f"{name}.py").is_file() or (place / name).is_dir():
        return True
    file = place.with_suffix(".py") if place.with_suffix(".py").is_file() else place / "__init__.py"
    return file.is_file() and bool(re.search(rf"\b{name}\b", file.read_text(encoding="utf-8", errors="replace")))
