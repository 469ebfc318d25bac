"""What differs between two runs. In: a `Described` of each. Out: the differences of each part, key by key."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ftgen.documents import leaves, merged
from ftgen.errors import dotted
from ftgen.logs.find import Run
from ftgen.logs.identity import document
from ftgen.logs.log import Log
from ftgen.results.record import Record, record

# Keys of a run that always differ, or are no facts of the run.
OF_EVERY_RUN = {"run_id", "started", "ended", "log", "assumed"}
HARDWARE = {"gpu", "gpu_memory_gib", "cpus", "vbios", "infiniband", "topology", "partition"}
NOT_COMPARED = {"job", "nodes", "optimizations_off"}  # the first two change with every run, the results have the third
PARTS = ("plan", "software", "hardware", "results")


class Difference(NamedTuple):
    """A key with its two values; None: not known."""

    key: str
    first: Any
    second: Any


class Described(NamedTuple):
    """A run, and what its folder says of its machine."""

    name: str
    record: Record
    environment: Mapping[str, Any]  # of environment.json, or of the log
    nodes: Mapping[str, Mapping[str, Any]]  # what the check of each node found


def describe(name: str, run: Run, log: Log) -> Described:
    """A run, with the files beside its log, if those are its own."""
    home = Path(run.log).parent
    beside = _documents(home.glob("environment.json")) if run.plan else {}
    return Described(name, record(run, log), beside.get("environment", {}), log.nodes)


def _documents(paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """JSON objects by the names of their files; a file that has none is left out."""
    found = ((path.stem, document(path.read_bytes())) for path in sorted(paths) if path.is_file())
    return {name: said for name, said in found if said is not None}


def differences(first: Described, second: Described) -> dict[str, list[Difference]]:
    """The differences by part: plan, software, hardware, results. A part without any has an empty list."""
    found = zip(PARTS, _parts(first), _parts(second), strict=True)
    return {part: _compared(one, other) for part, one, other in found}


def _parts(run: Described) -> tuple[dict[str, Any], ...]:
    environment = merged(dict(run.environment), dict(run.record["environment"] or {}))
    facts = {key: value for key, value in environment.items() if key not in NOT_COMPARED}
    hardware = {key: facts.pop(key) for key in HARDWARE & facts.keys()} | {"node_check": _well(run)}
    results = {key: value for key, value in run.record["results"].items() if key not in OF_EVERY_RUN}
    return _flat(run.record["plan"] or {}), _flat(facts), _flat(hardware), results


def _well(run: Described) -> dict[str, Any]:
    """The figures of the slowest node, and the nodes that are not well."""
    figures = ("gemm_tflops", "copy_gb_per_s", "all_reduce_gb_per_s")
    slowest = {
        key: min((node[key] for node in run.nodes.values() if isinstance(node.get(key), (int, float))), default=None)
        for key in figures
    }
    return slowest | {"bad_nodes": sum(node.get("state") == "bad" for node in run.nodes.values()) if run.nodes else None}


def _flat(document: Mapping[str, Any]) -> dict[str, Any]:
    return {dotted(path): value for path, value in leaves(dict(document)).items()}


def _compared(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[Difference]:
    keys = dict.fromkeys((*one, *other))
    return [Difference(key, one.get(key), other.get(key)) for key in keys if one.get(key) != other.get(key)]
