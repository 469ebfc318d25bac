"""Bytes of GPU memory that a plan needs, by part. In: a `Plan`. Out: parts at the run's peak, for one GPU; pure.

The peak is the highest of three moments: the checkpoint being loaded (FP8 alone is large there), the end of a forward pass,
and the optimizer's step. What a layer keeps for its backward pass is counted tensor by tensor. Against the peaks that
PyTorch measured (tests/logs/h100, h200, h200_pair and h200_parallel, `max_memory_allocated`) the sum is within 3.5%, with
tensor parallelism and pipeline stages too; with virtual stages, which were not measured, it is a lower bound.
"""

from dataclasses import asdict, dataclass

from ftgen.errors import Problem
from ftgen.plan.plan import Plan

GIB = 1 << 30
BF16, FP32 = 2, 4  # bytes
ADAM = 3 * FP32  # bytes a trained weight: float32 master, first and second moment
# FP8 weights and their transposes take what BF16 weights take. While they are loaded there are also the BF16 ones and parts
# of a third copy: 2.54 times the linear layers' BF16 bytes was measured, at 8 and at 32 layers alike.
FP8_LOADING = 2.54
LOGIT_BYTES = BF16 + FP32  # of the stock loss: BF16 logits and their float32 copy
LOSS_SHARE = 0.05  # of the tokens that have a loss, in SQuAD-shaped data: an answer of a few words
GRAPHS_GIB = {"lora": 0.5, "sft": 2.0}  # what graphs added to the measured peaks


@dataclass(frozen=True)
class Memory:
    """GiB of one GPU, by part, at the peak."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    graphs: float
    loading: float  # beyond all the others, while the checkpoint is loaded

    @property
    def total(self) -> float:
        """GiB in all."""
        return float(sum(asdict(self).values()))


def estimate(plan: Plan) -> Memory | None:
    """What the plan needs on each GPU; None without a GPU."""
    if plan.gpu.name == "cpu":
        return None
    split = plan.parallelism
    weights = plan.model.parameters / (split.tensor_model_parallel_size * split.pipeline_model_parallel_size)
    embedding = plan.model.vocab_size * plan.model.hidden_size / split.tensor_model_parallel_size
    linear = weights - 2 * embedding / split.pipeline_model_parallel_size
    trained = weights if plan.scheme == "sft" else _adapters(plan)
    shards = split.data_parallel_size if plan.scheme == "sft" else 1  # the distributed optimizer's
    activations, logits = _activations(plan), _logits(plan, embedding)
    if split.pipeline_model_parallel_size > 1:  # the first stage keeps several micro-batches, the last one has the logits
        waiting = activations * _micro_batches_kept(plan)
        activations, logits = (waiting, 0.0) if waiting > activations + logits else (activations, logits)
    # once the activations are gone: the optimizer's float32 gradients, and what it casts to FP8 in BF16
    step = trained * FP32 / shards
    if plan.precision == "fp8" and plan.scheme == "sft":
        step += linear * BF16 / shards
    if step > activations + logits:
        activations, logits = 0.0, 0.0
    else:
        step = 0.0
    kept = weights * BF16
    graphs = GRAPHS_GIB[plan.scheme] * GIB if plan.optimizations["cuda_graphs"] else 0.0
    optimizer = trained * ADAM / shards + step
    needed = kept + trained * BF16 + optimizer + activations + logits + graphs
    loading = FP8_LOADING * linear * BF16 + 2 * embedding * BF16 if plan.precision == "fp8" else 0.0
    parts = (kept, trained * BF16, optimizer, activations, logits, graphs, max(0.0, loading - needed))
    return Memory(*(part / GIB for part in parts))


def problems(plan: Plan) -> list[Problem]:
    """That the plan cannot fit the GPU it names, and what would make it fit."""
    needed = estimate(plan)
    if needed is None or needed.total <= plan.gpu.memory_gib:
        return []
    parts = ", ".join(f"{name} {gib:.1f}" for name, gib in asdict(needed).items() if gib >= 0.05)
    room = f"the {plan.gpu.memory_gib:g} GiB of {plan.gpu.name}"
    split = "parallelism.tensor_model_parallel_size splits weights, gradients and activations"
    more = "; more gpus split the optimizer" if plan.scheme == "sft" else ""
    return [
        Problem(
            ("gpu",),
            f"must hold the run: {needed.total:.1f} GiB ({parts}) do not fit {room}",
            f"{split}{more}; micro_batch_size and seq_length are {plan.micro_batch_size} and {plan.seq_length}",
            also=(("gpus",), ("parallelism",), ("micro_batch_size",), ("seq_length",), ("model",), ("scheme",)),
        )
    ]


def _adapters(plan: Plan) -> float:
    """Weights of LoRA's adapters."""
    if plan.lora is None:
        return 0.0
    model = plan.model
    attention = model.head_size * model.num_attention_heads
    features = {
        "linear_qkv": model.hidden_size + attention + 2 * model.head_size * model.num_query_groups,
        "linear_proj": attention + model.hidden_size,
        "linear_fc1": model.hidden_size + 2 * model.ffn_hidden_size,
        "linear_fc2": model.ffn_hidden_size + model.hidden_size,
    }
    return model.num_layers * plan.lora.rank * sum(features[target] for target in plan.lora.targets)


def _activations(plan: Plan) -> float:
    """Bytes that the layers keep for the backward pass of one micro-batch.

    For each token, in BF16: the inputs of both norms, q, k, v, the attention's output, and fc1's output; where weights have
    gradients also the linear layers' inputs: both norms' outputs and fc2's input. LoRA needs its own layers' inputs alone.
    """
    model, split = plan.model, plan.parallelism
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    attention = 2 * model.head_size * (model.num_attention_heads + model.num_query_groups)  # q, k, v and the output
    targets = plan.lora.targets if plan.lora else ["linear_qkv", "linear_fc1", "linear_fc2"]
    inputs = hidden * (("linear_qkv" in targets) + ("linear_fc1" in targets))
    whole = 2 * hidden + inputs  # on every tensor-parallel rank, unless the sequence is split as well
    shared = attention + 2 * ffn + ffn * ("linear_fc2" in targets)
    tensor_parallel = split.tensor_model_parallel_size
    token = whole / (tensor_parallel if split.sequence_parallel else 1) + shared / tensor_parallel
    tokens = _tokens(plan)
    return token * BF16 * tokens * model.num_layers / split.pipeline_model_parallel_size


def _micro_batches_kept(plan: Plan) -> int:
    """How many micro-batches wait on the first stage for their backward pass, by Megatron-Core's schedule.

    With virtual stages one, which is a lower bound: what that schedule keeps was not measured.
    """
    split = plan.parallelism
    micro_batches = plan.global_batch_size // (plan.micro_batch_size * split.data_parallel_size)
    return 1 if split.virtual_pipeline_model_parallel_size else min(split.pipeline_model_parallel_size, micro_batches)


def _logits(plan: Plan, embedding: float) -> float:
    """Bytes of the LM head's forward and backward pass; `embedding` is its weights on this rank."""
    split = plan.parallelism
    share = LOSS_SHARE if plan.optimizations["loss_tokens_only"] else 1.0
    logits = _tokens(plan) * share * plan.model.vocab_size / split.tensor_model_parallel_size * LOGIT_BYTES
    return logits + (2 * embedding * BF16 if plan.scheme == "sft" else 0.0)  # the head's and the embedding's new gradients


def _tokens(plan: Plan) -> float:
    """Tokens of one pass through the model on this rank."""
    split = plan.parallelism
    sequences = plan.micro_batch_size
    if plan.optimizations["merge_micro_batches"]:
        sequences = plan.global_batch_size // split.data_parallel_size
    return sequences * plan.seq_length / split.context_parallel_size
