"""Generate a Llama with the plan's shape and random weights, in Hugging Face format.

In: a plan. Out: a directory that the importer reads.

Such a model measures speed without a download: it trains as fast as the real one. The tokenizer is a byte-level BPE
with exactly `vocab_size` entries. Each thread generates and writes one shard at a time, so 8 billion weights need 5
GiB of memory with eight threads and 2.6 GiB with two (measured), instead of 16 GiB.
"""

import json
import os
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.data import synthetic_text

if TYPE_CHECKING:
    import torch

SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>"]
LARGE = 10**9  # parameters; from this size on, weights are bfloat16, as in published models; smaller models have float32
# In Llama-3 8B, the shard of embedding and head has 1.05 billion weights and that of a layer 0.22 billion. With 8
# threads, the first shard is finished at the same time as the 32 others. More threads would only need more memory.
THREADS = 8
STD = 0.02  # standard deviation of the weights: `initializer_range` in Llama's config.json


def write(plan: dict[str, Any], directory: Path) -> None:
    """Write config, tokenizer and weights of plan["model"], generated from plan["seed"]."""
    directory.mkdir(parents=True, exist_ok=True)
    model = plan["model"]
    dtype = "bfloat16" if model["parameters"] >= LARGE else "float32"
    (directory / "config.json").write_text(json.dumps(_config(model, dtype), indent=1))
    write_tokenizer(model["vocab_size"], model["max_position_embeddings"], directory)
    _write_weights(model, dtype, plan["seed"], directory, min(len(os.sched_getaffinity(0)), THREADS))


def _config(model: dict[str, Any], dtype: str) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "head_dim": model["hidden_size"] // model["num_attention_heads"],
        "hidden_act": "silu",
        "hidden_size": model["hidden_size"],
        "initializer_range": STD,
        "intermediate_size": model["ffn_hidden_size"],
        "max_position_embeddings": model["max_position_embeddings"],
        "num_attention_heads": model["num_attention_heads"],
        "num_hidden_layers": model["num_layers"],
        "num_key_value_heads": model["num_query_groups"],
        "rms_norm_eps": 1e-5,
        "rope_theta": model["rope_theta"],
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "vocab_size": model["vocab_size"],
    }


def write_tokenizer(vocab_size: int, max_length: int, directory: Path) -> None:
    """Write a byte-level BPE with exactly `vocab_size` entries."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=1,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(vocab_size), trainer)
    missing = vocab_size - tokenizer.get_vocab_size()
    tokenizer.add_special_tokens([f"<|reserved_special_token_{index}|>" for index in range(missing)])
    tokenizer.save(str(directory / "tokenizer.json"))
    named = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[1]}
    settings = named | {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_length}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
    (directory / "special_tokens_map.json").write_text(json.dumps(named, indent=1))


def _corpus(vocab_size: int) -> list[str]:
    """Texts with enough different names to train a tokenizer of `vocab_size` entries."""
    rng = random.Random(vocab_size)  # noqa: S311
    examples = (synthetic_text.example(rng) for _ in range(400))
    names = [synthetic_text.name(rng) for _ in range(vocab_size // 2)]
    return [f"{example['input']} {example['output']}" for example in examples] + [f" {name}" for name in names]


def _write_weights(model: dict[str, Any], dtype: str, seed: int, directory: Path, threads: int) -> None:
    """Write the shards and their index. The bytes do not depend on the number of threads."""
    shards = _shards(model)
    files = [directory / f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors" for number in range(len(shards))]
    seeds = [seed * 1000 + number for number in range(len(shards))]  # one seed per shard: a shard can be generated alone
    with ThreadPoolExecutor(threads) as pool:  # the first shard is the largest, and starts first
        size = sum(pool.map(_write_shard, shards, files, seeds, [dtype] * len(shards)))
    index = {key: file.name for shapes, file in zip(shards, files, strict=True) for key in shapes}
    document = {"metadata": {"total_size": size}, "weight_map": index}
    (directory / "model.safetensors.index.json").write_text(json.dumps(document, indent=1))


def _write_shard(shapes: dict[str, tuple[int, ...]], file: Path, seed: int, dtype: str) -> int:
    """Write one shard; returns the size of its weights in bytes. Most of the time is spent without the GIL."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    tensors = {key: _weight(shape, getattr(torch, dtype), generator) for key, shape in shapes.items()}
    save_file(tensors, file, metadata={"format": "pt"})
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _shards(model: dict[str, Any]) -> list[dict[str, tuple[int, ...]]]:
    """For each shard the shapes of its weights, by name: first embedding, last norm and head, then one shard per layer."""
    hidden, ffn, vocab = model["hidden_size"], model["ffn_hidden_size"], model["vocab_size"]
    kv = hidden // model["num_attention_heads"] * model["num_query_groups"]
    layer = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (hidden, hidden),
        "self_attn.k_proj.weight": (kv, hidden),
        "self_attn.v_proj.weight": (kv, hidden),
        "self_attn.o_proj.weight": (hidden, hidden),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (ffn, hidden),
        "mlp.up_proj.weight": (ffn, hidden),
        "mlp.down_proj.weight": (hidden, ffn),
    }
    ends: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocab, hidden),
    }
    numbers = range(model["num_layers"])
    return [ends, *({f"model.layers.{number}.{key}": shape for key, shape in layer.items()} for number in numbers)]


def _weight(shape: tuple[int, ...], dtype: "torch.dtype", generator: "torch.Generator") -> "torch.Tensor":
    import torch

    mean = 1 if len(shape) == 1 else 0  # only norms have one dimension
    return torch.empty(shape, dtype=dtype).normal_(mean, STD, generator=generator)
