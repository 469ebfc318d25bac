"""The kernel of the optimization fused_rotary beside Transformer Engine's. Needs a GPU and Transformer Engine. Out: JSON.

    python bench/rotary.py [--tokens 4096] [--length 180] [--repeats 200]

Queries (32 heads) and keys (8 heads, a part of a wider tensor, as in training) of Llama-3 8B in BF16, in sequences of one
length. Microseconds of a call, forward and backward, in a CUDA graph; the bytes that it must read and write, as GB/s; and
the largest difference of the results.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from runtime.engines.rotary import Rotate

SIZE, HEADS = 128, {"queries": 32, "keys": 8}
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

    def stock(heads: Any) -> Any:
        return apply_rotary_pos_emb(heads, angles[: options.length], tensor_format="thd", fused=True, cu_seqlens=bounds)

    def own(heads: Any) -> Any:
        return Rotate.apply(heads, bounds, angles)

    with torch.cuda.stream(torch.cuda.Stream()):  # a graph cannot be captured on the default stream
        rows = [_row(name, count, stock, own, options) for name, count in HEADS.items()]
    print(
        json.dumps(
            {"gpu": torch.cuda.get_device_name(), "tokens": options.tokens, "length": options.length, "rows": rows}, indent=1
        )
    )


def _row(name: str, count: int, stock: Callable[[Any], Any], own: Callable[[Any], Any], options: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    wide = torch.randn(options.tokens, count, (3 if name == "keys" else 1) * SIZE, dtype=torch.bfloat16, device="cuda")
    gradient = torch.randn(options.tokens, count, SIZE, dtype=torch.bfloat16, device="cuda")
    found = {
        which: _both(rotate, wide[..., :SIZE], gradient, options.repeats) for which, rotate in (("te", stock), ("own", own))
    }
    gb = 2 * gradient.numel() * gradient.element_size() / 1e9
    return {
        "what": name,
        "largest_difference": [float((a - b).abs().max()) for a, b in zip(found["te"][0], found["own"][0], strict=True)],
        **{f"{which}_us": [round(time, 1) for time in times] for which, (_, times) in found.items()},
        **{f"{which}_gb_per_s": [round(gb / (time / 1e6)) for time in times] for which, (_, times) in found.items()},
    }


def _both(rotate: Callable[[Any], Any], heads: Any, gradient: Any, repeats: int) -> tuple[list[Any], list[float]]:
    """What a call gives, forward and backward, and the microseconds of each."""
    heads = heads.detach().requires_grad_()
    out = rotate(heads)
    (back,) = torch.autograd.grad(out, heads, gradient)
    forward = _microseconds(lambda: rotate(heads), repeats)
    both = _microseconds(lambda: torch.autograd.grad(rotate(heads), heads, gradient), repeats)
    return [out.detach().float(), back.float()], [forward, both - forward]


def _microseconds(call: Callable[[], Any], repeats: int) -> float:
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for _ in range(repeats):
            call()
    graph.replay()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    graph.replay()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) * 1000 / repeats


if __name__ == "__main__":
    main()
