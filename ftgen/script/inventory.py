"""Lists experiments, and whether their scripts are current. In: `Path`s of specs and of the scripts' folder. Out: `Row`s."""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ftgen import files
from ftgen.errors import SpecError
from ftgen.plan.experiments import load
from ftgen.plan.plan import Plan
from ftgen.script.render import assignments, render
from ftgen.spec.read import find_specs

CURRENT = "current"


class Row(NamedTuple):
    """One experiment, or one script without a spec."""

    name: str
    spec: str  # its file; "" if there is none
    what: str  # scheme, precision, model and GPUs
    state: str


def rows(specs: Iterable[Path], out: Path, site: Path | None = None, overrides: Sequence[str] = ()) -> list[Row]:
    """A row for each experiment, for each spec with an error, and for each script in `out` that no spec compiles to."""
    found: list[Row] = []
    for path in find_specs(specs):
        try:
            found += [_row(each.plan, path, out) for each in load(path, site, overrides)]
        except SpecError as error:
            first = str(error.problems[0]).partition("\n")[0]
            found.append(Row(path.stem, str(path), "", f"refused: {first}"))
    known = {row.name for row in found}
    left = sorted(script.stem for script in out.glob("*.sh") if script.stem not in known)
    return [*found, *(Row(name, "", "", "no spec compiles to this script") for name in left if _compiled(out, name))]


def _row(plan: Plan, path: Path, out: Path) -> Row:
    what = f"{plan.scheme} {plan.precision} {plan.model.name} {plan.gpus} x {plan.gpu.name}"
    return Row(plan.name, str(path), what, _state(plan, out))


def _state(plan: Plan, out: Path) -> str:
    texts = render(plan)
    if not any((out / name).exists() for name in texts):
        return "not compiled"
    if not files.differences(out, texts):
        return CURRENT
    there = _compiled(out, plan.name)
    if there and there.get("overrides", {}) != plan.overrides:
        said = " ".join(f"--set {text}" for text in assignments(there.get("overrides", {})))
        return f"stale: compiled with {said}" if said else "stale: compiled without --set"
    if there and there.get("ftgen_version") != plan.ftgen_version:
        return f"stale: compiled by ftgen {there.get('ftgen_version')}"
    return "stale"


def _compiled(out: Path, name: str) -> dict[str, Any] | None:
    """The plan in a compiled entrypoint; None if there is none."""
    path = out / f"{name}.py"
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    found = re.search(r'^PLAN = json\.loads\(r"""\n(.*?)\n"""\)$', text, flags=re.DOTALL | re.MULTILINE)
    try:
        plan = json.loads(found[1]) if found else None
    except ValueError:
        return None
    return plan if isinstance(plan, dict) else None
