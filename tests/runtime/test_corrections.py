"""Changes to Transformer Engine and Megatron-Core that need a GPU to run, on stand-ins of their objects."""

from types import SimpleNamespace

import pytest
import torch

from runtime.engines.nemo.optimizations import bf16_grads_in_adam, early_gather, fused_swiglu

# --- fused_swiglu


class Quantizer:
    def __init__(self, scale=1.0, amax=0.0):
        self.columnwise_usage, self.scale, self.amax = True, Number(scale), Number(amax)

    def set_usage(self, columnwise):
        self.columnwise_usage = columnwise


class Number:
    """A tensor with one value."""

    def __init__(self, value):
        self.value = value

    def copy_(self, other):
        self.value = other.value

    def data_ptr(self):
        return id(self)


def test_swiglu_writes_no_transposes_and_the_quantizer_asks_for_them_again():
    seen = []
    kernel = fused_swiglu._rows_only(lambda _self, x, quantizer: seen.append(quantizer and quantizer.columnwise_usage) or x)
    quantizer = Quantizer()
    assert kernel(None, 1, quantizer) == kernel(None, 1, None) == 1  # without a quantizer: BF16
    assert seen == [False, None]
    assert quantizer.columnwise_usage


def test_a_fused_linear_layer_continues_the_scale_of_its_weight():
    new = Quantizer()

    def reset(self, recipe):
        if hasattr(self, "weight"):
            self.weight._quantizer = new

    layer = SimpleNamespace(weight=SimpleNamespace(_quantizer=Quantizer(scale=4480.0, amax=0.1)))
    reset_and_continue = fused_swiglu._with_weight_scale(reset)
    reset_and_continue(layer, recipe=None)
    assert (new.scale.value, new.amax.value) == (4480.0, 0.1)
    new.amax.value = 0.2  # of a later step
    reset_and_continue(layer, recipe=None)
    assert new.amax.value == 0.2
    reset_and_continue(SimpleNamespace(), recipe=None)  # while it is built, it has no weight
    reset_and_continue(SimpleNamespace(weight=SimpleNamespace(_quantizer=None)), recipe=None)


# --- early_gather


class Group:
    def __init__(self, buckets, ddp_config=None, group=None, size=2):
        self.buckets, self.ddp_config = buckets, ddp_config
        self.intra_distributed_optimizer_instance_group, self.intra_distributed_optimizer_instance_size = group, size
        self.param_gather_dispatched, self.next_param_gather_bucket_group = False, "another"

    def start_param_sync(self):
        self.param_gather_dispatched = True
        STARTED.append(self.buckets)


STARTED: list[list[str]] = []


def test_all_gathers_start_after_the_step_in_the_order_of_the_forward_pass():
    STARTED.clear()
    groups = [Group(["head"]), Group(["layer 2"]), Group(["layer 1"])]
    optimizer = SimpleNamespace(
        ddp_config=SimpleNamespace(overlap_param_gather=True), model_chunks=[SimpleNamespace(bucket_groups=groups)]
    )
    assert early_gather.then_gather(lambda _self: "done")(optimizer) == "done"
    assert STARTED == [["layer 1"], ["layer 2"], ["head"]]
    assert not any(group.next_param_gather_bucket_group for group in groups)


def test_the_lm_head_gets_the_first_group_and_bf16_models_keep_theirs():
    layer_2, layer_1, head, others = (SimpleNamespace(params_list=[1] * count) for count in (2, 2, 1, 5))
    split = early_gather.with_a_group_for_the_head(list)([Group([layer_2]), Group([layer_1, head, others])])
    assert [group.buckets for group in split] == [[head], [layer_2], [layer_1, others]]
    bf16 = [Group([head]), Group([layer_2]), Group([others])]
    assert early_gather.with_a_group_for_the_head(list)(bf16) == bf16
    tied = [Group([layer_2]), Group([layer_1, others, head])]
    assert early_gather.with_a_group_for_the_head(list)(tied) == tied
    alone = [Group([layer_1, head, others])]
    assert early_gather.with_a_group_for_the_head(list)(alone) == alone


# --- bf16_grads_in_adam


def test_the_norm_reads_the_views_and_the_setting_is_as_before():
    name = bf16_grads_in_adam.READS_OTHERS
    optimizer = SimpleNamespace(config=SimpleNamespace(**{name: False}))
    assert bf16_grads_in_adam._of_views(lambda self: getattr(self.config, name))(optimizer) is True
    assert getattr(optimizer.config, name) is False


def test_no_shard_keeps_a_gradient_after_the_step():
    shard = SimpleNamespace(decoupled_grad="a gradient")
    optimizer = SimpleNamespace(get_parameters=lambda: [shard])
    assert bf16_grads_in_adam._then_let_go(lambda _self: True)(optimizer) is True
    assert shard.decoupled_grad is None


@pytest.mark.parametrize(("norm", "by"), [(0.5, 1.0), (4.0, 1.0 / (4.0 + 1e-6))])
@pytest.mark.parametrize("on_the_gpu", [False, True])
def test_bf16_gradients_are_scaled_into_float32(norm, by, on_the_gpu):
    gradient = torch.randn(64, generator=torch.Generator().manual_seed(0)).bfloat16()
    shard, without = SimpleNamespace(decoupled_grad=gradient.clone()), SimpleNamespace(decoupled_grad=None)
    total = norm
    if on_the_gpu:  # as async_step leaves it
        total = torch.tensor(norm)
        total.exact = torch.tensor(norm, dtype=torch.float64)
    bf16_grads_in_adam.clip([shard, without], 1.0, total)
    assert torch.equal(shard.decoupled_grad.float(), gradient.float() * torch.tensor(by, dtype=torch.float32))
    assert without.decoupled_grad is None
