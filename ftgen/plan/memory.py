"""Estimates the GPU memory that a plan needs at the peak of its run, by part.

In: a `Plan`. Out: a `Memory` (GiB of one GPU), and `list[Problem]` if it exceeds the GPU. Pure.

The peak is the highest of three moments: loading the checkpoint (large only in FP8), the end of a forward pass, and the
optimizer's step. The tensors that a layer keeps for its backward pass are counted one by one. The sum is within 3.5% of the
peaks that PyTorch measured (tests/logs/h100, h200, h200_pair and h200_parallel, `max_memory_allocated`), also with tensor
parallelism and pipeline stages. Virtual stages were not measured: with them, the sum is a lower bound.
"""

from dataclasses import asdict, dataclass

from ftgen.errors import Problem
from ftgen.plan.plan import LoraPlan, ModelPlan, Plan

GIB = 1 << 30
BF16, FP32 = 2, 4  # bytes
ADAM = 3 * FP32  # bytes per trained weight: float32 master weight, first and second moment
# FP8 weights with their transposes take as many bytes as BF16 weights. During loading, there are also the BF16 weights and
# parts of a third copy. Measured with 8 and with 32 layers: 2.54 times the BF16 bytes of the linear layers.
FP8_LOADING = 2.54
LOGIT_BYTES = BF16 + FP32  # per logit of the stock loss: BF16, and a float32 copy
# Fraction of the tokens that have a loss. The answers of SQuAD have a few words; of the user's own data, nothing is known.
LOSS_SHARE = {"squad": 0.05, "synthetic": 0.05}
GRAPHS_GIB = {"lora": 0.5, "sft": 2.0}  # by which CUDA graphs increased the measured peaks


@dataclass(frozen=True)
class Memory:
    """GiB of one GPU at the peak, by part."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    graphs: float
    loading: float  # by which loading the checkpoint exceeds the other parts

    @property
    def total(self) -> float:
        """The sum of all parts."""
        return float(sum(asdict(self).values()))


def estimate(plan: Plan) -> Memory | None:
    """The memory that the plan needs on each GPU; None for gpu = "cpu"."""
    if plan.gpu.name == "cpu":
        return None
    split = plan.parallelism
    weights = plan.model.parameters / (split.tensor_model_parallel_size * split.pipeline_model_parallel_size)
    embedding = plan.model.vocab_size * plan.model.hidden_size / split.tensor_model_parallel_size
    linear = weights - 2 * embedding / split.pipeline_model_parallel_size
    trained = adapter_weights(plan.model, plan.lora) if plan.lora else weights
    shards = split.data_parallel_size if plan.scheme == "sft" else 1  # of the distributed optimizer
    activations, logits = _activations(plan), _logits(plan, embedding)
    if split.pipeline_model_parallel_size > 1:  # the first stage keeps several micro-batches, the last has the logits
        waiting = activations * _micro_batches_kept(plan)
        activations, logits = (waiting, 0.0) if waiting > activations + logits else (activations, logits)
    # the optimizer's step, after the activations are freed: float32 gradients, and BF16 copies of weights to cast to FP8
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
    """A problem if the plan needs more memory than its GPU has. The hint names the keys that reduce it."""
    needed = estimate(plan)
    if needed is None or needed.total <= plan.gpu.memory_gib:
        return []
    parts = ", ".join(f"{name} {gib:.1f}" for name, gib in asdict(needed).items() if gib >= 0.05)
    found = f"the run needs {needed.total:.1f} GiB ({parts}), {plan.gpu.name} has {plan.gpu.memory_gib:g} GiB"
    more = " or gpus" if plan.scheme == "sft" else ""  # more GPUs share the state of the distributed optimizer
    less = f"reduce seq_length ({plan.seq_length}) or micro_batch_size ({plan.micro_batch_size})"
    hint = f"increase parallelism.tensor_model_parallel_size{more}, or {less}"
    return [Problem(("gpu",), f"must have enough memory: {found}", hint)]


def adapter_weights(model: ModelPlan, lora: LoraPlan) -> int:
    """Number of weights in the LoRA adapters."""
    attention = model.head_size * model.num_attention_heads
    features = {
        "linear_qkv": model.hidden_size + attention + 2 * model.head_size * model.num_query_groups,
        "linear_proj": attention + model.hidden_size,
        "linear_fc1": model.hidden_size + 2 * model.ffn_hidden_size,
        "linear_fc2": model.ffn_hidden_size + model.hidden_size,
    }
    return model.num_layers * lora.rank * sum(features[target] for target in lora.targets)


def _activations(plan: Plan) -> float:
    """Bytes that the layers keep for the backward pass of one micro-batch.

    Per token, in BF16: the inputs of both norms, q, k, v, and the outputs of the attention and of fc1. A linear layer with
    trained weights (with LoRA: a layer with adapters) also keeps its input: the output of a norm, or the input of fc2.
    """
    model, split = plan.model, plan.parallelism
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    attention = 2 * model.head_size * (model.num_attention_heads + model.num_query_groups)  # q, k, v and the output
    targets = plan.lora.targets if plan.lora else ["linear_qkv", "linear_fc1", "linear_fc2"]
    inputs = hidden * (("linear_qkv" in targets) + ("linear_fc1" in targets))
    whole = 2 * hidden + inputs  # whole on every tensor-parallel rank, unless sequence_parallel splits it
    shared = attention + 2 * ffn + ffn * ("linear_fc2" in targets)
    tensor_parallel = split.tensor_model_parallel_size
    token = whole / (tensor_parallel if split.sequence_parallel else 1) + shared / tensor_parallel
    tokens = _tokens(plan)
    return token * BF16 * tokens * model.num_layers / split.pipeline_model_parallel_size


def _micro_batches_kept(plan: Plan) -> int:
    """Number of micro-batches that the first stage keeps until their backward pass, by Megatron-Core's schedule.

    With virtual stages it is 1, a lower bound, because that schedule was not measured.
    """
    split = plan.parallelism
    micro_batches = plan.global_batch_size // (plan.micro_batch_size * split.data_parallel_size)
    return 1 if split.virtual_pipeline_model_parallel_size else min(split.pipeline_model_parallel_size, micro_batches)


def _logits(plan: Plan, embedding: float) -> float:
    """Bytes of the LM head's forward and backward pass; `embedding` is the number of its weights on this rank."""
    split = plan.parallelism
    share = LOSS_SHARE.get(plan.data.kind, 1.0) if plan.optimizations["loss_tokens_only"] else 1.0
    logits = _tokens(plan) * share * plan.model.vocab_size / split.tensor_model_parallel_size * LOGIT_BYTES
    return logits + (2 * embedding * BF16 if plan.scheme == "sft" else 0.0)  # new gradients of head and embedding


def _tokens(plan: Plan) -> float:
    """Number of tokens in one forward pass on this rank."""
    split = plan.parallelism
    sequences = plan.micro_batch_size
    if plan.optimizations["merge_micro_batches"]:
        sequences = plan.global_batch_size // split.data_parallel_size
    return sequences * plan.seq_length / split.context_parallel_size
