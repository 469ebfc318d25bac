"""Check an export: its tensors, and what a model that is loaded from it computes.

In: the folder of the export, and the trained weights. Out: findings for the log and the model card, or a JobError.

1. Names, shapes and types of the tensors are those of the base (`structure`).
2. Each value in the files is that of the checkpoint (`values`). The rows of fused tensors are found by computing their
   numbers, not as the export cuts them, and adapters are merged in float64: the files may differ by roundings.
3. A model that transformers loads from the files computes the logits of the trained weights (`behaviour`). These come
   from `forward.py`, which reads the checkpoint as Megatron does. For merged weights, it also tells how much the
   rounding changed the logits.

Together: the files are the trained weights, their layout is what transformers expects, and config.json describes the
model that was trained. Training and checkpoint themselves are taken as they are.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from runtime.export import forward, names
from runtime.export.names import Source
from runtime.export.trained import Trained
from runtime.job.errors import JobError
from runtime.weights import adapter, reload, shards
from runtime.weights.shards import Entry

if TYPE_CHECKING:
    import torch

Plan = dict[str, Any]
TOKENS = 32
ROWS = 1024  # rows of a merged weight that are compared at a time, because float64 needs much memory
# Largest difference of a logit, as a fraction of the largest logit. Both sides have the same weights and compute in float32:
# only the order of sums differs. Measured: 1e-6, on tiny models and on two layers of the size of Llama-3 8B.
BOUND = 1e-3
PROMPT = "The capital of France is"


def structure(folder: Path, expected: dict[str, Entry]) -> str:
    """JobError unless the files have exactly these tensors."""
    try:
        found = shards.entries(folder, shards.files_of(folder))
    except (OSError, ValueError) as error:
        raise _wrong(folder, str(error)) from error
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            raise _wrong(folder, f"{name} is {found.get(name)}, expected {expected.get(name)}")
    return f"{len(found)} tensors have the names, shapes and types of the base"


def values(folder: Path, tensors: dict[str, Entry], trained: Trained) -> str:
    """JobError unless each value of the files is that of the checkpoint; if it was merged, within the roundings."""
    merged = trained.adapted(tensors)
    for name, entry in tensors.items():
        if name in merged:
            _compare_merged(folder, name, entry, merged[name], trained)
        else:
            _compare(folder, name, entry, trained)
    same = f"{len(tensors) - len(merged)} tensors are those of the checkpoint, bit for bit"
    if not merged:
        return same
    return f"{same}; {len(merged)} are merged: W + alpha / rank * B @ A in float64, rounded once to their type"


def adapter_values(folder: Path, modules: dict[str, Source], trained: Trained) -> str:
    """JobError unless the adapters of the files are those of the checkpoint, bit for bit."""
    assert trained.adapters  # noqa: S101 - only LoRA exports adapters
    found = shards.entries(folder, [adapter.FILE])
    expected = {adapter.tensor_name(module, matrix) for module in modules for matrix in "AB"}
    if found.keys() != expected:
        raise _wrong(folder, f"its tensors are not those of {len(modules)} adapters")
    for module, source in modules.items():
        a = trained.read(trained.adapters, names.adapter(source.linear, "in"), source.layer)
        b = trained.read(trained.adapters, names.adapter(source.linear, "out"), source.layer)
        for matrix, tensor in (("A", a), ("B", b[_rows(source.part, len(b), trained.model)])):
            name = adapter.tensor_name(module, matrix)
            if not _equal(shards.read(folder, name, found[name]), tensor):
                raise _wrong(folder, f"{name} differs from the checkpoint")
    return f"{len(found)} tensors are those of the checkpoint, bit for bit"


class Reference(NamedTuple):
    """What the loaded model must compute."""

    tokens: list[int]
    logits: "torch.Tensor"  # of the weights as they are exported
    unmerged: "torch.Tensor | None"  # of the adapters beside the weights
    merged: "torch.dtype | None"


def reference(trained: Trained, epsilon: float, merged: "torch.dtype | None" = None) -> Reference:
    """Logits from the checkpoint. `merged`: the type of weights that adapters were merged into. Call it before a model is
    loaded, so that memory never holds both.
    """
    tokens = _tokens(trained.model["vocab_size"])
    unmerged = forward.logits(trained, tokens, epsilon)
    if merged is None:
        return Reference(tokens, unmerged, None, None)
    return Reference(tokens, forward.logits(trained, tokens, epsilon, merged), unmerged, merged)


def behaviour(model: reload.Reloaded, expected: Reference) -> list[str]:
    """JobError unless the loaded model computes what the trained weights do."""
    found = model.logits(expected.tokens)[:, : expected.logits.shape[1]]
    difference = _difference(found, expected.logits)
    told = f"{difference:.1e} of the largest logit (bound {BOUND:.0e})"
    if not difference <= BOUND:  # also for NaN
        raise JobError(
            f"the exported model is not the trained model: logits differ by {told}",
            "please report this; the files were not published",
        )
    findings = [f"logits of the model that transformers loads differ from those of the checkpoint by {told}"]
    if expected.unmerged is not None:
        rounding = f"{_difference(found, expected.unmerged):.1e} of the largest one"
        findings.append(f"merging the adapters and rounding to {expected.merged} changed logits by {rounding}")
    return findings


def completion(model: reload.Reloaded) -> str:
    """What the loaded model continues a prompt with. One token repeated is a warning: the trained model does the same."""
    text, repeated = model.complete(PROMPT)
    told = f"greedy completion of {PROMPT!r}: {text!r}"
    return f"warning: the trained model repeats one token: {told}" if repeated else told


def merged_type(tensors: dict[str, Entry], trained: Trained) -> "torch.dtype | None":
    """The type of the weights that adapters were merged into; None without adapters."""
    return next((shards.torch_dtype(tensors[name].dtype) for name in trained.adapted(tensors)), None)


def _difference(found: "torch.Tensor", expected: "torch.Tensor") -> float:
    """The largest difference of a logit, as a fraction of the largest logit."""
    return float((found - expected).abs().max() / expected.abs().max())


def _compare(folder: Path, name: str, entry: Entry, trained: Trained) -> None:
    """JobError unless each value is that of the checkpoint. A function of its own, so that its tensors are freed."""
    expected = _expected(name, trained).to(shards.torch_dtype(entry.dtype))
    if not _equal(shards.read(folder, name, entry), expected):
        raise _wrong(folder, f"{name} differs from the checkpoint")


def _compare_merged(folder: Path, name: str, entry: Entry, source: Source, trained: Trained) -> None:
    """JobError unless each value is W + alpha / rank * B @ A, within the roundings of float32 sums and of its type."""

    assert trained.adapters  # noqa: S101 - it is merged
    a = trained.adapters.read(names.adapter(source.linear, "in"), source.layer).double()
    b = trained.adapters.read(names.adapter(source.linear, "out"), source.layer).double()
    b = b[_rows(source.part, len(b), trained.model)] * trained.scale
    found, weight = shards.read(folder, name, entry), _expected(name, trained)
    for some in zip(found.split(ROWS), weight.split(ROWS), b.split(ROWS), strict=True):
        if not _is_merged(*some, a):
            raise _wrong(folder, f"{name} differs from W + alpha / rank * B @ A by more than roundings do")


def _is_merged(found: "torch.Tensor", weight: "torch.Tensor", b: "torch.Tensor", a: "torch.Tensor") -> bool:
    """Whether `found` is weight + b @ a, within the roundings. The sums in float32 have one for each of rank + 3 terms."""
    import torch

    expected = weight.double() + b @ a
    sums = torch.finfo(torch.float32).eps / 2 * (weight.double().abs() + (len(a) + 3) * (b.abs() @ a.abs()))
    allowed = torch.finfo(found.dtype).eps / 2 * (expected.abs() + sums) + sums
    return bool(((found.double() - expected).abs() <= allowed).all())


def _expected(name: str, trained: Trained) -> "torch.Tensor":
    """The checkpoint's values of a Hugging Face name, before merging."""
    source = trained.source(name)
    fused = trained.read(trained.weights, source.name, source.layer)
    return fused[_rows(source.part, len(fused), trained.model, source.name in names.PADDED)]


def _rows(part: str, count: int, model: dict[str, Any], padded: bool = False) -> "torch.Tensor | slice":
    """Numbers of the fused tensor's rows that are the rows of a part, in their order."""
    import torch

    heads, groups, size = model["num_attention_heads"], model["num_query_groups"], model["head_size"]
    queries = heads // groups
    if padded:
        return slice(model["vocab_size"])
    if part in {"gate", "up"}:
        return slice(0, count // 2) if part == "gate" else slice(count // 2, count)
    if not part:
        return slice(count)
    row = torch.arange((heads if part == "q" else groups) * size)
    head, place = row // size, row % size
    if part == "q":
        slot = head // queries * (queries + 2) + head % queries
    else:
        slot = head * (queries + 2) + queries + (part == "v")
    return slot * size + place


def _equal(one: "torch.Tensor", other: "torch.Tensor") -> bool:
    import torch

    return one.dtype == other.dtype and bool(torch.equal(one, other))


def _tokens(vocabulary: int) -> list[int]:
    """The same tokens each time, from all of the vocabulary."""
    import torch

    found: list[int] = torch.randint(vocabulary, (TOKENS,), generator=torch.Generator().manual_seed(1)).tolist()
    return found


def _wrong(folder: Path, what: str) -> JobError:
    return JobError(f"{folder}: {what}", "nothing was published: export again, and report this if it happens again")
