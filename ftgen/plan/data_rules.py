"""Checks the keys that name the training data, and resolves how examples are cut and ordered.

In: a `Spec`. Out: `list[Problem]`s, and the values of the plan's data. Pure.
"""

from collections.abc import Iterator

from ftgen.errors import KeyPath, Problem, quoted
from ftgen.spec.spec import Spec

DEFAULT_STEPS = 100
IN_A_FILE = ("jsonl", "chat")  # kinds of data that are one file of the user
WITH_MESSAGES = ("chat", "hf")
KIND: KeyPath = ("data", "kind")
PATH: KeyPath = ("data", "path")


def is_packed(spec: Spec) -> bool:
    """Whether examples are packed into full sequences. The default is true on GPUs and false on a CPU."""
    return spec.gpu != "cpu" if spec.data.packed is None else spec.data.packed


def problems(spec: Spec) -> Iterator[Problem]:
    """The broken rules of the table `data`, and of epochs."""
    if spec.epochs and spec.max_steps:
        rule = f"epochs and max_steps must not both be set: epochs is {spec.epochs}, max_steps is {spec.max_steps}"
        yield Problem(("epochs",), rule, "remove one of them", also=(("max_steps",),))
    if spec.data.kind == "hf":
        yield from _dataset(spec)
        return
    kind = quoted(spec.data.kind)
    if spec.data.kind in IN_A_FILE and not spec.data.path:
        yield Problem(PATH, f"is required for data.kind = {kind}", "set it to a file", also=(KIND,))
    if spec.data.kind not in IN_A_FILE and spec.data.path:
        yield Problem(PATH, f'requires data.kind = "jsonl", "chat" or "hf", found {kind}', also=(KIND,))
    for key in ("dataset", "revision", "config", "split", "columns"):
        if key in spec.data.model_fields_set:
            yield Problem(("data", key), f'requires data.kind = "hf", found {kind}', also=(KIND,))
    if spec.data.chat_template and spec.data.kind not in WITH_MESSAGES:
        yield Problem(("data", "chat_template"), f'requires data.kind = "chat" or "hf", found {kind}', also=(KIND,))


def _dataset(spec: Spec) -> Iterator[Problem]:
    data, columns = spec.data, spec.data.columns
    if bool(data.path) == bool(data.dataset):
        found = "both are set" if data.path else "neither is set"
        rule = f'exactly one of data.dataset and data.path must be set for data.kind = "hf": {found}'
        yield Problem(("data", "dataset"), rule, "set dataset to a name on the hub, or path to a folder", also=(PATH, KIND))
    if data.dataset and not data.revision:
        hint = f"see https://huggingface.co/datasets/{data.dataset}/commits/main"
        yield Problem(("data", "revision"), "is required with data.dataset, so that every run trains on the same data", hint)
    if data.revision and not data.dataset:
        yield Problem(("data", "revision"), "requires data.dataset", also=(("data", "dataset"),))
    if (columns.messages or columns.tools) and (columns.prompt or columns.completion):
        yield Problem(("data", "columns"), "must have messages, or prompt and completion, found both")
    if bool(columns.prompt) != bool(columns.completion):
        yield Problem(("data", "columns"), "must have prompt and completion together")


def order(spec: Spec) -> str:
    """Who packs and orders the examples: "recipe", the engine, as in the recipe; or "epochs", ftgen."""
    policy = too_long(spec)
    as_nemo_does = {"squad": policy != "drop", "synthetic": policy != "drop", "jsonl": policy == "error"}
    return "recipe" if as_nemo_does.get(spec.data.kind) and not spec.epochs else "epochs"


def too_long(spec: Spec) -> str:
    """What happens to examples that are too long. The recipe's own data is truncated, as in the recipe."""
    return spec.data.too_long or ("truncate" if spec.data.kind in ("squad", "synthetic") else "error")


def max_steps(spec: Spec) -> int | None:
    """Number of steps; None if the job computes it from the epochs."""
    return None if spec.epochs else spec.max_steps or DEFAULT_STEPS
