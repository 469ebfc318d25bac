"""The gradients of Transformer Engine's fused SwiGLU MLP in FP8, without NeMo. Out: a table of their errors.

    python bench/fused_swiglu.py [--tokens 4096 --hidden 4096 --ffn 14336] [--mended]

Builds RMSNorm, linear, SwiGLU and linear as Megatron-Core's TEFusedMLP does, from the FP8 weights of LayerNormLinear and
Linear, and computes the gradients of five passes with one input, with delayed scaling. Before each pass, free GPU memory is
filled with bytes that are NaN in FP8: memory that a kernel should have written but did not shows at once. A row is the
relative error of the last pass against float32: of the output, the input's gradient, and the gradients of both weights.
`unfused` is the same with LayerNormLinear, PyTorch's SwiGLU and Linear: that is the error of FP8 alone. `scale` is the
scale of the first weight after the passes; 1 means that nobody renewed it. `--mended` adds the fused MLP with the
corrections of runtime/engines/nemo/optimizations/fused_swiglu.py.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
PASSES = 5
NAN = 0x7F  # in E4M3 and in E5M2


def main() -> int:
    """Print the table; 1 if a gradient of the last row is wrong."""
    import torch

    options = _options()
    torch.manual_seed(1)
    x = torch.randn(options.tokens, 1, options.hidden, device="cuda", dtype=torch.bfloat16)
    towards = torch.randn_like(x)
    reference = _reference(*_modules(options), x, towards)
    print(f"{'':16}{'output':>10}{'input':>10}{'weight 1':>10}{'weight 2':>10}{'scale':>10}")

    def row(name: str, build: Any, fp8: bool = True) -> list[float]:
        first, second = _modules(options)
        computed = _passes(first, second, build, x, towards, fp8)
        errors = [float((a - b).norm() / b.norm()) for a, b in zip(computed, reference, strict=True)]
        scale = float(first.weight._quantizer.scale)
        print(f"{name:16}" + "".join(f"{error:10.4f}" for error in errors) + f"{scale:10.4g}", flush=True)
        return errors

    row("unfused", _unfused)
    row("fused, BF16", _fused, fp8=False)
    errors = row("fused", _fused)
    if options.mended:
        from runtime.engines.nemo.optimizations import fused_swiglu

        fused_swiglu.transpose_in_linear()
        fused_swiglu.keep_weight_scales()
        errors = row("fused, mended", _fused)
    return int(not all(error < 0.2 for error in errors))  # NaN is not less


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--ffn", type=int, default=14336)
    parser.add_argument("--mended", action="store_true")
    return parser.parse_args()


def _recipe() -> Any:
    from transformer_engine.common.recipe import DelayedScaling, Format

    return DelayedScaling(fp8_format=Format.HYBRID, amax_history_len=1024, amax_compute_algo="max")


def _modules(options: argparse.Namespace) -> tuple[Any, Any]:
    """LayerNormLinear and Linear with FP8 weights, the same ones each time."""
    import torch
    import transformer_engine.pytorch as te

    torch.manual_seed(2)
    kept = {"bias": False, "params_dtype": torch.bfloat16, "init_method": lambda w: torch.nn.init.normal_(w, std=0.02)}
    with te.fp8_model_init(enabled=True, recipe=_recipe()):
        first = te.LayerNormLinear(options.hidden, 2 * options.ffn, normalization="RMSNorm", **kept)
        second = te.Linear(options.ffn, options.hidden, **kept)
    return first, second


def _reference(first: Any, second: Any, x: Any, towards: Any) -> list[Any]:
    """What `_passes` returns, computed by PyTorch in float32."""
    import torch
    from torch.nn import functional

    x = x.detach().float().requires_grad_()
    weights = [module.weight.dequantize().detach().float().requires_grad_() for module in (first, second)]
    scale = first.layer_norm_weight.detach().float()
    gate, value = functional.linear(functional.rms_norm(x, scale.shape, scale, first.eps), weights[0]).chunk(2, dim=-1)
    y = functional.linear(functional.silu(gate) * value, weights[1])
    return [y.detach(), *torch.autograd.grad(y, [x, *weights], towards.float())]


def _unfused(first: Any, second: Any) -> Any:
    import torch

    def forward(x: Any) -> Any:
        gate, value = first(x).chunk(2, dim=-1)
        return second(torch.nn.functional.silu(gate.float()).mul(value.float()).to(x.dtype))

    return forward


def _fused(first: Any, second: Any) -> Any:
    """As Megatron-Core's TEFusedMLP._make_fused_impl."""
    from transformer_engine.pytorch import ops

    norm = ops.RMSNorm(first.weight.size(1), eps=first.eps, device="meta", dtype=first.layer_norm_weight.dtype)
    norm.weight = first.layer_norm_weight
    linears = []
    for module in (first, second):
        weight = module.weight
        linear = ops.BasicLinear(weight.size(1), weight.size(0), device="meta", dtype=weight.dtype)
        linear.weight = weight
        linears.append(linear)
    return ops.Sequential(norm, linears[0], ops.SwiGLU(), linears[1])


def _passes(first: Any, second: Any, build: Any, x: Any, towards: Any, fp8: bool) -> list[Any]:
    """The output of the last pass and the gradients of the input and of both weights, in float32."""
    import torch
    import transformer_engine.pytorch as te

    forward = build(first, second)
    for _ in range(PASSES):
        for weight in (first.weight, second.weight, first.layer_norm_weight):
            weight.grad = None
        x = x.detach().requires_grad_()
        _fill_free_memory()
        with te.fp8_autocast(enabled=fp8, fp8_recipe=_recipe()):
            y = forward(x)
        y.backward(towards)
    torch.cuda.synchronize()
    return [t.detach().float() for t in (y, x.grad, first.weight.grad, second.weight.grad)]


def _fill_free_memory() -> None:
    """Leave blocks of many sizes in PyTorch's cache, all of them full of NaN."""
    import torch

    sizes = [2**power for power in range(21, 30) for _ in range(8)]  # 8 GiB
    blocks = [torch.full((size,), NAN, dtype=torch.uint8, device="cuda") for size in sizes]
    del blocks


if __name__ == "__main__":
    sys.exit(main())
