"""Tell what a training trains on: one line for the log, and the number of steps of an epoch.

In: a plan, and the folder of its tokens with report.json. Out: lines in the log, and the plan with its steps.
"""

import json
import os
from pathlib import Path
from typing import Any

from runtime.data import order
from runtime.data.split import SPLITS, is_recipes
from runtime.job.names import ENGINES
from runtime.job.progress import say

Plan = dict[str, Any]
Report = dict[str, Any]


def planned(plan: Plan, folder: Path) -> Plan:
    """The plan with max_steps, which the data decides if the plan has epochs. Says on rank 0 what the data is."""
    counted = read(folder)
    if os.environ.get("RANK", "0") == "0":
        print(f"ftgen data: {json.dumps(facts(plan, counted))}", flush=True)
    for text in warnings(plan, counted):
        say(f"warning: {text}")
    if plan["epochs"] is None:
        return plan
    say(epochs_text(plan, counted))
    return plan | {"max_steps": steps(plan, counted)}


def steps(plan: Plan, counted: Report) -> int:
    """Number of steps of a plan with epochs."""
    samples, _ = samples_of(counted["training"])
    return order.steps(plan["epochs"], samples, plan["global_batch_size"])


def epochs_text(plan: Plan, counted: Report) -> str:
    """The epochs of a plan as steps, and what fills the last batch."""
    samples, what = samples_of(counted["training"])
    epochs, batch = plan["epochs"], plan["global_batch_size"]
    text = f"{epochs} epoch{'s' * (epochs > 1)} of {samples} {what} are {steps(plan, counted)} steps of {batch} {what}"
    more = steps(plan, counted) * batch - epochs * samples
    return f"{text}; the last step has {more} {what} of one more epoch" if more else text


def read(folder: Path) -> Report:
    """The report: sha256 of the data, and the counts of each split."""
    counted: Report = json.loads((folder / "report.json").read_text())
    return counted


def facts(plan: Plan, counted: Report) -> dict[str, Any]:
    """What the log's line has: where the examples are, the hash of the user's data or else of the examples, the counts."""
    named = ("kind", "path", "dataset", "revision", "config", "split")
    place = {key: plan["data"][key] for key in named if plan["data"][key]}
    if plan["data"]["kind"] != "hf":
        place.pop("split")
    keys = ("examples", "tokens", "trained_tokens", "truncated", "dropped", "packs")
    counts = {split: {key: counted[split][key] for key in keys if key in counted[split]} for split in SPLITS}
    return {**place, "sha256": counted["sha256"], **counts}


def samples_of(counts: dict[str, Any]) -> tuple[int, str]:
    """The number of samples of a split, and whether they are packs or examples."""
    return (counts["packs"], "packs") if "packs" in counts else (counts["examples"], "examples")


def warnings(plan: Plan, counted: Report) -> list[str]:
    """What happened to examples that are too long, for each split."""
    found, word = [], "row" if plan["data"]["kind"] == "hf" else "line"
    for split in SPLITS:
        counts = counted[split]
        if not counts["too_long"]:
            continue
        all_examples = counts["examples"] + counts["dropped"]
        text = f"{split}: {counts['too_long']} of {all_examples} examples have more than {plan['seq_length']} tokens"
        done = f"{counts['truncated']} are truncated, {counts['dropped']} are dropped"
        if is_recipes(plan):
            done = f"{ENGINES[plan['engine']]} cuts the end of their input"
        longest = counts["longest"]
        found.append(f"{text}: {done}; the longest has {longest['tokens']} tokens ({word} {longest['line']})")
    return found
