"""What sets a run apart from others of the same work: its plan, and what the packages of its job could not do."""

import json
from pathlib import Path

from ftgen.plan.resolve import resolve
from ftgen.results.options import options
from ftgen.results.variants import variant
from ftgen.spec.site import Site
from ftgen.spec.spec import Spec

PLAN = {
    "parallelism": {"tensor_model_parallel_size": 2},
    "optimizations": {"cuda_graphs": True, "fused_swiglu": False, "loss_tokens_only": True},
}
LACKING = {"cuda_graphs": "NeMo's Llama3Config8B has no cuda_graph_impl"}
STEP = "Training epoch 0, iteration {0}/1 | global_step: {0} | reduced_train_loss: 1.5 | train_step_timing in s: 2.5"


def test_an_optimization_that_the_packages_cannot_do_is_no_option_of_the_run() -> None:
    assert options(PLAN) == ("TP 2", "cuda_graphs", "loss_tokens_only")
    assert options(PLAN, {"optimizations_off": LACKING}) == ("TP 2", "loss_tokens_only")


def test_the_log_says_so_and_so_do_the_results(tmp_path: Path, ftgen) -> None:
    plan = resolve(Spec.model_validate({"scheme": "lora", "precision": "bf16", "gpus": 8}), Site(), name="lora_bf16_8")
    assert plan.optimizations["cuda_graphs"]
    lines = [f"ftgen plan: {json.dumps(json.loads(plan.to_json()))}"]
    lines += [f"ftgen environment: {json.dumps({'optimizations_off': LACKING})}", STEP.format(0), STEP.format(1)]
    (tmp_path / f"log-a.{plan.experiment}_7_0.out").write_text("\n".join(lines) + "\n")
    (run,) = json.loads(ftgen("tabulate", tmp_path, "--format", "json").stdout)["runs"]
    assert variant(json.loads(plan.to_json())) == "default"
    assert variant(json.loads(plan.to_json()), {"optimizations_off": LACKING}) == "default − cuda_graphs"
    assert "loss_tokens_only" in run["options"]
    assert "cuda_graphs" not in run["options"]
    assert f"cuda_graphs was off: {LACKING['cuda_graphs']}" in run["notes"]
