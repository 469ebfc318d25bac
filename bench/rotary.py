"""The kernels of the optimization fused_rotary beside what they replace. Needs a GPU and Transformer Engine. Out: JSON.

    python bench/rotary.py [--tokens 4096] [--length 180] [--repeats 200]

The projection's output of Llama-3 8B in BF16, [tokens, 8 groups, 6 heads of 128], in sequences of one length. `stock` is
what Megatron-Core and Transformer Engine do with it: split it, copy the queries and the values, rotate queries and keys; in
the backward pass rotate back and join. Microseconds of a call, forward and backward, in a CUDA graph; the bytes that it must
read and write, as GB/s; and the largest difference of the results.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from gpu_time import both

from runtime.engines.rotary import SplitAndRotate

SIZE, GROUPS, QUERIES = 128, 8, 4
BASE = 500_000.0  # rope_theta of Llama-3


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--length", type=int, default=180)
    parser.add_argument("--repeats", type=int, default=200)
    options = parser.parse_args()
    from transformer_engine.pytorch.attention.rope import apply_rotary_pos_emb

    bounds = torch.arange(0, options.tokens, options.length, dtype=torch.int32, device="cuda")
    bounds = torch.cat((bounds, torch.tensor([options.tokens], dtype=torch.int32, device="cuda")))
    frequencies = BASE ** (-torch.arange(0, SIZE, 2, device="cuda").float() / SIZE)
    angles = torch.outer(torch.arange(options.tokens, device="cuda").float(), frequencies)
    angles = torch.cat((angles, angles), -1)[:, None, None, :]

    def rotated(heads: Any) -> Any:
        return apply_rotary_pos_emb(heads, angles[: options.length], tensor_format="thd", fused=True, cu_seqlens=bounds)

    def stock(mixed: Any) -> Any:
        queries, keys, values = mixed.split([QUERIES * SIZE, SIZE, SIZE], 2)
        return rotated(queries.reshape(options.tokens, -1, SIZE)), rotated(keys), values.contiguous()

    def own(mixed: Any) -> Any:
        return SplitAndRotate.apply(mixed, bounds, angles)

    with torch.cuda.stream(torch.cuda.Stream()):  # a graph cannot be captured on the default stream
        torch.manual_seed(0)
        mixed = torch.randn(options.tokens, GROUPS, (QUERIES + 2) * SIZE, dtype=torch.bfloat16, device="cuda")
        found = {name: both(split, [mixed], options.repeats) for name, split in (("stock", stock), ("own", own))}
    gb = 2 * mixed.numel() * mixed.element_size() / 1e9
    pairs = zip(found["stock"][0], found["own"][0], strict=True)
    print(
        json.dumps(
            {
                "gpu": torch.cuda.get_device_name(),
                "tokens": options.tokens,
                "length": options.length,
                "largest_difference": [float((a - b).abs().max()) for a, b in pairs],
                **{f"{name}_us": [round(time, 1) for time in times] for name, (_, times) in found.items()},
                **{f"{name}_gb_per_s": [round(gb / (time / 1e6)) for time in times] for name, (_, times) in found.items()},
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
