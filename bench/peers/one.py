"""One training by a peer, on the work of a plan. In: plan.json. Out: a JSON with what it computed, step lines on stdout.

    python bench/peers/one.py PLAN.json PEER OUT.json [--weights FOLDER] [--adapters FILE.npz]

A step line is one as NeMo writes it, so ftgen reads it and the telemetry beside it as those of its own runs. Before it
trains, the peer must show that no token sees another example: it exits if other tokens in the first example change what the
last layer says of the others. `--weights` has a Hugging Face checkpoint, in place of random weights; `--adapters` has the
adapters to start from.

Environment: STAGE_PATH, with the converted checkpoint (its tokenizer) and the packs; FTGEN_RUN_DIR, for the telemetry.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

sys.path.insert(1, str(Path(__file__).resolve().parent))  # with PYTHONSAFEPATH, Python leaves it out
sys.path.insert(2, str(Path(__file__).resolve().parents[2]))

import torch
import work
from hf_peer import HfPeer, Variant
from torchtune_peer import TorchtunePeer
from weights import Weights
from work import Batch, Plan

from runtime.node import telemetry

PACKAGES = ("torch", "triton", "transformers", "peft", "liger-kernel", "torchao", "torchtune")
NO_CHANGE = 1e-3  # of the largest value; a leak changes a tenth of it and more
HF: dict[str, Variant] = {
    "hf": Variant(),
    "hf-sdpa": Variant(sdpa=True),
    "hf-liger": Variant(liger="all"),
    "hf-liger-compile": Variant(liger="all", compiles=True),
    "hf-compile": Variant(liger="loss", compiles=True),
    "hf-fp8": Variant(fp8=True),
    "hf-fp8-compile": Variant(liger="loss", compiles=True, fp8=True),
    "hf-fp8-liger-compile": Variant(liger="all", compiles=True, fp8=True),
}
TORCHTUNE = {"torchtune": False, "torchtune-compile": True}


def main() -> int:
    """Build, check, train."""
    options = _options()
    plan: Plan = json.loads(options.plan.read_text())
    work.refuse_other_work(plan)
    device = "cpu" if plan["gpu"]["name"] == "cpu" else "cuda"
    begun = time.monotonic()
    batches = work.batches(plan, device)
    peer = build(options.peer, plan, options, device)
    facts: dict[str, Any] = {"peer": options.peer, "trainable_parameters": _checked_parameters(peer, plan)}
    facts["changed_by_another_example"] = refuse_a_leak(peer, batches[0], plan["model"]["vocab_size"])
    peer.finish()
    peer.prepare(batches)
    facts["start_s"] = time.monotonic() - begun
    facts["versions"] = versions()
    facts["device"] = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    telemetry.begin(plan)
    facts |= train(peer, plan, batches)
    options.out.write_text(json.dumps(facts, indent=1) + "\n")
    print(f"`Trainer.fit` stopped: `max_steps={plan['max_steps']}` reached.\nftgen: exit status 0", flush=True)
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("plan", type=Path)
    parser.add_argument("peer", choices=[*HF, *TORCHTUNE])
    parser.add_argument("out", type=Path)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--adapters", type=Path)
    return parser.parse_args()


def build(name: str, plan: Plan, options: argparse.Namespace, device: str) -> Any:
    """The peer with its weights."""
    import numpy as np

    adapters = dict(np.load(options.adapters)) if options.adapters else None
    weights = Weights(options.weights, adapters)
    dtype = torch.float32 if plan["precision"] == "fp32" else torch.bfloat16
    torch.set_float32_matmul_precision("high")
    if name in TORCHTUNE:
        return TorchtunePeer(plan, TORCHTUNE[name], weights, device, dtype)
    return HfPeer(plan, HF[name], weights, device, dtype)


def versions() -> dict[str, str]:
    """Of the packages that are there."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _checked_parameters(peer: Any, plan: Plan) -> int:
    found, expected = sum(weight.numel() for weight in peer.parameters), work.trainable_parameters(plan)
    if found != expected:
        raise SystemExit(f"peers: error: it trains {found} parameters, and ftgen {expected}: not the same work")
    return int(found)


def refuse_a_leak(peer: Any, batch: Batch, vocabulary: int) -> float:
    """How much other tokens in the first example change the rest, as a part of the largest value. SystemExit: they do."""
    end = int(batch.ends[1])
    tokens = batch.tokens.clone()
    tokens[0, :end] = (tokens[0, :end] + 1) % vocabulary
    with torch.no_grad():
        one, other = peer.hidden(batch).float(), peer.hidden(batch._replace(tokens=tokens)).float()
    changed = (one - other).abs().amax(-1)[0] / one.abs().max()
    if float(changed[:end].max()) <= NO_CHANGE:
        raise SystemExit("peers: error: other tokens in the first example change nothing at all")
    if float(changed[end:].max()) > NO_CHANGE:
        raise SystemExit(f"peers: error: tokens see other examples ({float(changed[end:].max()):.2g}): not the same work")
    return float(changed[end:].max())


class Optimizer:
    """AdamW on float32 copies of the weights, as Megatron-Core's."""

    def __init__(self, peer: Any, plan: Plan, device: str) -> None:
        self.plan, self.weights = plan, peer.parameters
        self.copies = [weight.detach().float().clone().requires_grad_() for weight in self.weights]
        self.adam = torch.optim.AdamW(self.copies, lr=0.0, fused=device == "cuda", **work.ADAM)
        self.clips = device == "cuda"

    def step(self, number: int) -> None:
        """Clip, update, and forget the gradients."""
        for copy, weight in zip(self.copies, self.weights, strict=True):
            copy.grad = weight.grad.float()
            weight.grad = None
        if self.clips:
            torch.nn.utils.clip_grad_norm_(self.copies, work.LARGEST_NORM, foreach=True)
        self.adam.param_groups[0]["lr"] = work.rate(self.plan, number)
        self.adam.step()
        with torch.no_grad():
            torch._foreach_copy_(self.weights, self.copies)


def train(peer: Any, plan: Plan, batches: list[Batch]) -> dict[str, Any]:
    """All steps. Losses are those before a step, over all its tokens, as NeMo logs them."""
    device = str(batches[0].tokens.device.type)
    optimizer, size = Optimizer(peer, plan, device), plan["global_batch_size"]
    seen: dict[str, list[Any]] = {"losses": [], "step_times_s": [], "loss_tokens": [], "batches": []}
    wait: Callable[[], None] = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    begin = time.perf_counter()
    for number in range(plan["max_steps"]):
        telemetry.before_step(number)
        part = batches[number * size : (number + 1) * size]
        losses = []
        for batch in part:
            loss = peer.loss(batch)
            (loss / size).backward()  # the mean of the packs' means, as NeMo's schedule has it
            losses.append(loss.detach() * batch.loss_tokens)
        optimizer.step(number)
        tokens = sum(batch.loss_tokens for batch in part)
        seen["losses"].append(float(torch.stack(losses).double().sum()) / tokens)
        wait()
        end = time.perf_counter()
        telemetry.after_step(number)
        seen["step_times_s"].append(end - begin)
        begin = end
        seen["loss_tokens"].append(tokens)
        seen["batches"].append([batch.sha256 for batch in part])
        print(_line(plan, number, seen, device), flush=True)
    if device == "cuda":
        seen["max_memory_allocated"] = [torch.cuda.max_memory_allocated()]
    return seen


def _line(plan: Plan, number: int, seen: dict[str, list[Any]], device: str) -> str:
    """As NeMo's progress printer."""
    memory = {}
    if device == "cuda":
        memory["max_memory_reserved"] = torch.cuda.max_memory_reserved()
        memory["max_memory_allocated"] = torch.cuda.max_memory_allocated()
    fields = {
        "lr": f"{work.rate(plan, number):.4g}",
        "global_batch_size": plan["global_batch_size"],
        "global_step": number,
        **memory,
        "reduced_train_loss": f"{seen['losses'][-1]:.4g}",
        "train_step_timing in s": f"{seen['step_times_s'][-1]:.4g}",
        "consumed_samples": (number + 1) * plan["global_batch_size"],
    }
    words = [f"Training epoch 0, iteration {number}/{plan['max_steps'] - 1}", *(f"{key}: {fields[key]}" for key in fields)]
    return " | ".join(words)


if __name__ == "__main__":
    sys.exit(main())
