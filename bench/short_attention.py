"""The kernels of the optimization short_attention beside cuDNN's. Needs a GPU and Transformer Engine. Out: JSON.

    python bench/short_attention.py [--tokens 4096] [--lengths 180 448 1024 4096] [--repeats 50]

Queries (32 heads), keys and values (8 heads) of Llama-3 8B in BF16, in packed sequences of one length. Microseconds of the
forward and of the backward pass, in a CUDA graph, and the largest difference of output and gradients.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from gpu_time import both

from runtime.engines.short_attention import Attend

HEADS, GROUPS, SIZE = 32, 8, 128


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--lengths", type=int, nargs="+", default=[180, 448, 1024, 4096])
    parser.add_argument("--repeats", type=int, default=50)
    options = parser.parse_args()
    with torch.cuda.stream(torch.cuda.Stream()):  # a graph cannot be captured on the default stream
        rows = [_row(length, options) for length in options.lengths]
    print(json.dumps({"gpu": torch.cuda.get_device_name(), "tokens": options.tokens, "rows": rows}, indent=1))


def _row(length: int, options: argparse.Namespace) -> dict[str, Any]:
    from transformer_engine.pytorch import DotProductAttention

    torch.manual_seed(0)
    parts = [
        torch.randn(options.tokens, heads, SIZE, dtype=torch.bfloat16, device="cuda") for heads in (HEADS, GROUPS, GROUPS)
    ]
    ends = [*range(0, options.tokens, length), options.tokens]
    bounds = torch.tensor(ends, dtype=torch.int32, device="cuda")
    stock = DotProductAttention(HEADS, SIZE, num_gqa_groups=GROUPS, attn_mask_type="padding_causal", qkv_format="thd")
    packs = {"cu_seqlens_q": bounds, "cu_seqlens_kv": bounds, "max_seqlen_q": length, "max_seqlen_kv": length}
    calls = {
        "te": lambda *inputs: stock(*inputs, **packs).view(-1, HEADS, SIZE),
        "own": lambda *inputs: Attend.apply(*inputs, bounds, SIZE**-0.5),
    }
    found = {name: both(call, parts, options.repeats) for name, call in calls.items()}
    pairs = zip(found["te"][0], found["own"][0], strict=True)
    return {
        "length": length,
        "largest_difference": [float((a - b).abs().max()) for a, b in pairs],
        **{f"{name}_us": [round(time, 1) for time in times] for name, (_, times) in found.items()},
    }


if __name__ == "__main__":
    main()
