"""What is not imported before it is used: the mechanism on small packages, and on NeMo itself."""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional, Union

import pytest

from runtime.engines.nemo.imports import DEFERRED, MANAGED_MEMORY, NOTHING_TO_DO, OFF, Deferring, StandIn

FILES = {
    "slow/__init__.py": "import sys\nsys.slow_was_imported = True\n__version__ = '1.2'\nLIMIT = 3\nNAMES = ['a', 'b']\n",
    "slow/inner.py": "class Client:\n    def __init__(self, name): self.name = name\n\ndef double(n): return 2 * n\n",
    "broken_inside.py": "import no_such_package\n",
}


@pytest.fixture
def slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Deferring]:
    """A package `slow` that is deferred; sys.slow_was_imported tells whether it has been imported."""
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "slow_was_imported", False, raising=False)
    finder = Deferring(["slow", "broken_inside", "not_installed"])
    monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
    yield finder
    for name in [name for name in sys.modules if name.partition(".")[0] in {"slow", "broken_inside"}]:
        del sys.modules[name]


def was_imported() -> bool:
    return bool(sys.slow_was_imported)  # type: ignore[attr-defined]


def test_importing_annotating_and_deriving_import_nothing(slow: Deferring) -> None:
    module = importlib.import_module("slow")
    client = importlib.import_module("slow.inner").Client

    class Derived(client):  # type: ignore[misc]
        pass

    assert Optional[client] == client | None  # noqa: UP045
    assert Union[client, str]  # noqa: UP007
    assert {client: 1}[client] == 1
    assert Derived.__mro__[1] is client
    assert not hasattr(module, "__wrapped__")  # asked of every module by inspect
    assert Path(module.__spec__.origin).name == "__init__.py"
    assert not was_imported()


def test_a_name_that_is_called_is_the_real_one(slow: Deferring) -> None:
    module = importlib.import_module("slow")
    inner = importlib.import_module("slow.inner")
    client, chained = inner.Client, module.inner.double
    assert client("a").name == "a"
    assert was_imported()
    assert chained(4) == inner.double(4) == 8
    assert not isinstance(sys.modules["slow.inner"], StandIn)
    assert isinstance(importlib.import_module("slow.inner").Client("a"), client)
    assert not isinstance(3, client)
    assert issubclass(sys.modules["slow.inner"].Client, client)


def test_values_are_the_real_ones(slow: Deferring) -> None:
    module = importlib.import_module("slow")
    assert "b" in module.NAMES
    assert module.LIMIT == 3
    assert module.__version__ == "1.2"


def test_what_is_written_to_a_stand_in_reaches_the_real_package(slow: Deferring) -> None:
    module = importlib.import_module("slow")
    importlib.import_module("slow.inner")
    module.inner.double = lambda number: 3 * number
    assert not was_imported()
    assert module.inner.double(4) == 12
    assert sys.modules["slow.inner"].double(4) == 12


def test_a_class_derived_from_a_stand_in_says_what_to_do(slow: Deferring) -> None:
    class Derived(importlib.import_module("slow.inner").Client):  # type: ignore[misc]
        pass

    with pytest.raises(RuntimeError, match=rf"Derived cannot be used: .* from slow\.inner\.Client, .*export {OFF}=1"):
        Derived("a")


def test_what_is_not_installed_cannot_be_imported(slow: Deferring) -> None:
    for name in ("not_installed", "slow.not_there"):
        with pytest.raises(ModuleNotFoundError, match=name):
            importlib.import_module(name)
        assert importlib.util.find_spec("not_installed") is None


def test_a_package_that_is_broken_says_so_when_it_is_used(slow: Deferring) -> None:
    function = importlib.import_module("broken_inside").function
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        function()


# --- NeMo

SCRIPT = """
import json, sys
from runtime.engines.nemo import imports
imports.defer()
imports.defer()
from runtime.engines.nemo import recipe
from nemo.collections.llm.recipes import llama3_8b
there = {name: type(sys.modules[name]).__name__ for name in imports.DEFERRED if name in sys.modules}
finders = sum(isinstance(finder, imports.Deferring) for finder in sys.meta_path)
from transformers.generation.candidate_generator import roc_curve
curve = roc_curve([0, 1], [0.2, 0.8])[1].tolist()
managed = hasattr(sys.modules[imports.MANAGED_MEMORY], "load_inline")
sklearn = type(sys.modules["sklearn"]).__name__
print(json.dumps({"managed": managed, "there": there, "finders": finders, "curve": curve, "sklearn": sklearn}))
"""


def importing(**environment: str) -> dict[str, Any]:
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])} | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return dict(json.loads(process.stdout.splitlines()[-1]))


@pytest.mark.runtime
def test_importing_nemo_imports_none_of_the_deferred_packages_and_all_of_them_can_be_used() -> None:
    found = importing()
    assert set(found["there"].values()) == {"StandIn"}
    assert set(found["there"]) == set(DEFERRED), "the others are imported by nothing any more: leave them out"
    assert found["finders"] == 1
    assert not found["managed"], "Megatron-Core compiled an extension for inference"
    assert (found["curve"], found["sklearn"]) == ([0.0, 1.0, 1.0], "module")


@pytest.mark.runtime
def test_the_switch_turns_it_off() -> None:
    found = importing(**{OFF: "1"})
    assert "StandIn" not in found["there"].values()
    assert found["finders"] == 0
    assert found["managed"]


def test_inference_finds_the_names_that_it_imports() -> None:
    """Those of Megatron-Core's module for managed memory, which a fine-tune goes without."""
    importers = Path(importlib.util.find_spec("megatron.core").origin).parent.rglob("*.py")  # type: ignore[union-attr, arg-type]
    wanted = {
        line for path in importers for line in path.read_text().splitlines() if f"from {MANAGED_MEMORY} import" in line
    }
    assert wanted == {f"from {MANAGED_MEMORY} import create_unified_mempool, has_unified_memory"}


@pytest.mark.parametrize("name", sorted(NOTHING_TO_DO))
def test_what_a_training_asks_modelopt_for_is_still_there(name: str) -> None:
    """The functions are named by a string: one that NeMo renames would be imported and called again."""
    module, _, function = name.rpartition(".")
    folder = Path(importlib.util.find_spec("nemo").submodule_search_locations[0])  # type: ignore[index, union-attr, arg-type]
    path = folder.joinpath(*module.split(".")[1:])
    source = (path.with_suffix(".py") if path.with_suffix(".py").is_file() else path / "model_utils.py").read_text()
    assert f"def {function}(" in source
