"""Variants: runs are called what people call them."""

from datetime import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from runs import summary_of

from ftgen import catalogue
from ftgen.plan.engine_rules import forbids
from ftgen.results import variants
from ftgen.results.variants import numbered, variant
from ftgen.spec.spec import Spec

DEFAULTS = [name for name, known in catalogue.optimizations().items() if known.is_default("lora", "fp8", "h200", "nemo")]


def plan(on, *, without=(), packed=True, tp=1, **more):
    chosen = {name: name in on for name in catalogue.optimizations() if name not in without}
    known = {"scheme": "lora", "precision": "fp8", "gpu": {"name": "h200"}, "micro_batch_size": 1}
    split = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": 1, "context_parallel_size": 1}
    return known | {"parallelism": split, "data": {"packed": packed}, "optimizations": chosen} | more


@pytest.mark.parametrize(
    ("of", "name"),
    [
        (plan([]), "stock"),
        (plan(DEFAULTS), "default"),
        (plan([*DEFAULTS, "merge_micro_batches"]), "default + merge_micro_batches"),
        (plan([*DEFAULTS[:-1], "op_fuser"]), f"default + op_fuser − {DEFAULTS[-1]}"),
        (plan(DEFAULTS[1:]), f"default − {DEFAULTS[0]}"),
        (plan(["short_padding"]), "stock + short_padding"),
        (plan([], tp=2), "TP 2, stock"),
        (
            plan(
                {*DEFAULTS}
                - {"loss_tokens_only", "loss_tokens_in_last_layer", "scale_small_tensor"}
                - {"fused_lora_add", "fused_swiglu", "fp8_swiglu"},
                tp=2,
            ),
            "TP 2, default",
        ),
        (
            plan({*DEFAULTS} - {"cuda_graphs", "short_padding", "fused_rotary", "short_attention"}, packed=False),
            "not packed, default",
        ),
        (plan([], lora={"targets": ["linear_qkv", "linear_fc1"]}), "LoRA on linear_qkv+linear_fc1, stock"),
        (plan(DEFAULTS[:-1], without=DEFAULTS[-1:]), "earlier default"),
        (plan(DEFAULTS, without=["merge_micro_batches"]), "default"),
        (plan([], gpu={"name": "cpu"}), "stock"),
        (plan(["mine"]) | {"optimizations": {"mine": True}}, "stock + mine"),
        ({"parallelism": {"tensor_model_parallel_size": 4}}, "TP 4"),
        ({"optimizations": "none", "data": 3}, ""),
        (None, ""),
    ],
)
def test_a_variant_is_named_as_people_call_it(of, name):
    assert variant(of) == name


def test_runs_of_one_variant_are_numbered_in_the_order_of_time():
    first, second, other, alone = (summary_of("lora_nemo_llama3_8b_fp8_8", [1.0] * 20, run_id=run) for run in "9283")
    first, second = (run._replace(started=datetime(2026, 11, day)) for run, day in ((first, 1), (second, 2)))
    alone = alone._replace(gpus=16)
    names = numbered([second, first, other, alone], ["default", "default", "stock", "default"])
    assert names == ["default 2", "default 1", "stock", "default"]


def test_runs_that_nothing_is_known_of_are_numbered_by_their_ids():
    runs = [summary_of("lora_nemo_llama3_8b_fp8_8", [1.0] * 20, run_id=run) for run in ("10", "9")]
    assert numbered(runs, ["", ""]) == ["run 2", "run 1"]
    assert numbered(runs[:1], [""]) == ["run 1"]


@given(st.data())
def test_what_a_run_cannot_have_is_what_the_compiler_forbids(data):
    split = {
        f"{which}_parallel_size": data.draw(st.sampled_from([1, 2]))
        for which in ("tensor_model", "pipeline_model", "context")
    }
    packed, micro_batch_size = data.draw(st.booleans()), data.draw(st.sampled_from([1, 2]))
    scheme = data.draw(st.sampled_from(["sft", "lora"]))
    lora = {"dropout": data.draw(st.sampled_from([0.0, 0.1])), "targets": data.draw(TARGETS)} if scheme == "lora" else None
    shared = {"scheme": scheme, "precision": "fp8", "parallelism": split, "micro_batch_size": micro_batch_size}
    spec = Spec.model_validate(
        shared
        | {"model": "llama3_8b", "gpu": "h200", "gpus": 8, "data": {"packed": packed}}
        | ({"lora": lora} if lora else {})
    )
    of = shared | {"gpu": {"name": "h200"}, "data": {"packed": packed}, "lora": lora}
    for name in variants._defaults(of):
        assert variants._is_possible(name, of) == (not forbids(name, spec)), name


TARGETS = st.lists(st.sampled_from(["linear_qkv", "linear_fc1", "linear_fc2"]), min_size=1, unique=True)
