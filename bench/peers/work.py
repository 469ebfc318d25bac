"""The work of a plan, for a peer: the packs that ftgen's runtime made for NeMo, in the order in which NeMo trains on them.

In: a plan, and a STAGE_PATH that has its converted checkpoint (for the tokenizer) and its packs. Out: micro-batches on a
device, and what a training of them must have.

Environment: STAGE_PATH, NEMO_HOME (default $STAGE_PATH/HF_ckpt).
"""

import math
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from runtime.data import prepare
from runtime.data.split import is_recipes
from runtime.engines import padding
from runtime.weights import checkpoint

Plan = dict[str, Any]
NO_LOSS = -100  # a label that PyTorch's cross entropy leaves out
SPARE = 1.005  # NeMo's data module asks for so many more samples than the steps need
# NeMo's finetune recipe has these numbers for every model (distributed_fused_adam_with_cosine_annealing, adam_beta2=0.98).
ADAM = {"betas": (0.9, 0.98), "eps": 1e-5, "weight_decay": 0.1}
LARGEST_NORM = 1.0  # of the gradient; NeMo's kernel that clips needs CUDA, so ftgen does not clip on a CPU


class Batch(NamedTuple):
    """A micro-batch of one pack."""

    tokens: torch.Tensor  # int64 [1, length]
    labels: torch.Tensor  # int64 [1, length]: the next token, or NO_LOSS
    positions: torch.Tensor  # int64 [1, length]: from 0 in each sequence
    ends: torch.Tensor  # int32 [sequences + 1]: 0, and where each sequence ends; of one shape in all batches
    longest: int  # no sequence of any batch is longer
    loss_tokens: int
    sha256: str  # of tokens, next tokens, loss mask and boundaries, before the padding was cut


def refuse_other_work(plan: Plan) -> None:
    """Exit if the peers cannot do this work."""
    model = plan["model"]
    wrong = {
        'scheme is not "lora"': plan["scheme"] != "lora",
        "lora.targets is not linear_qkv": plan["lora"] and plan["lora"]["targets"] != ["linear_qkv"],
        "lora.dropout is not 0": plan["lora"] and plan["lora"]["dropout"],
        "more than one GPU": plan["gpus"] > 1,
        "more than one pack in a micro-batch": plan["micro_batch_size"] > 1,
        "the data is not packed by NeMo": not (is_recipes(plan) and plan["data"]["packed"]),
        "epochs": plan["epochs"],
        "the model is not a Llama 3": model["rope_scaling_factor"] or model["tied_embeddings"] or model["qkv_bias"],
    }
    if reasons := [reason for reason, is_so in wrong.items() if is_so]:
        raise SystemExit(f"peers: error: they do not know this work: {', '.join(reasons)}")


def trainable_parameters(plan: Plan) -> int:
    """NeMo's adapter of linear_qkv has one first matrix for queries, keys and values, and one second matrix of all rows."""
    model = plan["model"]
    rows = model["head_size"] * (model["num_attention_heads"] + 2 * model["num_query_groups"])
    return int(model["num_layers"] * plan["lora"]["rank"] * (model["hidden_size"] + rows))


def rate(plan: Plan, step: int) -> float:
    """The learning rate of a step, counted from 0: NeMo's linear warm-up, then half a cosine down to 0."""
    peak, steps = plan["optimizer"]["learning_rate"], plan["max_steps"]
    warmup = min(plan["optimizer"]["warmup_steps"], steps - 1)
    if step <= warmup and warmup > 0:
        return float(peak * (step + 1) / (warmup + 1))
    return float(peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))))


def batches(plan: Plan, device: str) -> list[Batch]:
    """The micro-batches of all steps, in order."""
    tokenizer = checkpoint.tokenizer(plan)
    if not tokenizer.is_dir():
        raise SystemExit(f"peers: error: there is no tokenizer in {tokenizer}: convert the checkpoint first")
    folder = prepare.prepare(plan, tokenizer).packed
    assert folder
    rows = np.load(folder / "training.npy", allow_pickle=True)
    pad, longest = _end_of_text(tokenizer), padding.longest_sequence(folder / "metadata.json")
    made = [_batch(rows[number], plan["seq_length"], pad, longest) for number in _order(plan, len(rows))]
    most = max(len(batch.ends) for batch in made)
    return [_on(batch, most, device) for batch in made]


def _end_of_text(tokenizer: Path) -> int:
    from transformers import AutoTokenizer

    return int(AutoTokenizer.from_pretrained(str(tokenizer)).eos_token_id)


def _order(plan: Plan, rows: int) -> list[int]:
    """Numbers of the packs that the steps need: NeMo shuffles the packs of each epoch with NumPy's legacy generator."""
    needed = plan["global_batch_size"] * plan["max_steps"]
    epochs = math.ceil(math.ceil(needed * SPARE) / rows)
    generator = np.random.RandomState(plan["seed"])
    order = np.arange(rows)[None].repeat(epochs, axis=0)
    for epoch in order:
        generator.shuffle(epoch)
    return [int(number) for number in order.flatten()[:needed]]


def _batch(row: dict[str, Any], length: int, pad: int, longest: int) -> Batch:
    """What NeMo's GPTSFTPackedDataset makes of a row: of each example all tokens but the last, and all but the first."""
    ids, mask = np.asarray(row["input_ids"]), np.asarray(row["loss_mask"])
    spans = list(pairwise([*row["seq_start_id"], len(ids)]))
    tokens, following, counted = np.full(length, pad), np.full(length, pad), np.zeros(length, bool)
    ends = [0]
    for begin, end in spans:
        place = slice(ends[-1], ends[-1] + end - begin - 1)
        tokens[place], following[place], counted[place] = ids[begin : end - 1], ids[begin + 1 : end], mask[begin : end - 1]
        ends.append(place.stop)
    if ends[-1] != length:
        ends.append(length)
    seen = b"".join(np.asarray(each, np.int64).tobytes() for each in (tokens, following, counted, ends))
    ends = padding.cut(ends, longest)
    positions = np.concatenate([np.arange(end - begin) for begin, end in pairwise(ends)])
    labels = np.where(counted, following, NO_LOSS)
    return Batch(
        tokens=torch.from_numpy(tokens)[None],
        labels=torch.from_numpy(labels)[None],
        positions=torch.from_numpy(positions)[None],
        ends=torch.tensor(ends, dtype=torch.int32),
        longest=longest,
        loss_tokens=int(counted.sum()),
        sha256=sha256(seen).hexdigest(),
    )


def _on(batch: Batch, ends: int, device: str) -> Batch:
    """The batch on a device, with so many `ends`: the last one stands for sequences of no length."""
    filled = torch.cat([batch.ends, batch.ends[-1:].expand(ends - len(batch.ends))])
    tokens, labels, positions, filled = (each.to(device) for each in (batch.tokens, batch.labels, batch.positions, filled))
    return batch._replace(tokens=tokens, labels=labels, positions=positions, ends=filled)
