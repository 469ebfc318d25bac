"""What a CPU can do of a run on GPUs: pack its data, build its recipe, make a batch: gpu_recipe.py PLAN.json.

In: a plan for GPUs; STAGE_PATH. Out: one line of JSON, the last one: versions, optimizations that are off, and the
lengths of the sequences in a pack, with their padding.
"""

import json
import os
import sys
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any


def main(plan: dict[str, Any], stage: Path) -> dict[str, Any]:
    from runtime.engines.nemo import compatibility, imports
    from runtime.engines.nemo.optimizations import switch

    switch.before_imports(plan)
    imports.defer()
    import fiddle

    from runtime.data.prepare import prepare
    from runtime.engines.nemo import cpu, recipe
    from runtime.weights import random_llama

    compatibility.after_imports()
    cpu.stand_in()
    random_llama.write_tokenizer(512, 4096, stage)
    built = recipe.build(plan, stage, prepare(plan, stage), stage / "logs")
    off = switch.unavailable(built, plan)
    switch.apply(built, plan, off)
    built.model.config.apply_rope_fusion, built.trainer.plugins[0].fp8 = False, None  # they require Transformer Engine
    for part in (built.model.config, built.optim, built.trainer.strategy, built.trainer.plugins[0], built.peft):
        fiddle.build(part)
    return {
        "versions": [version("nemo_toolkit"), version("megatron-core")],
        "nemo": sys.modules["nemo"].__file__,
        "off": off,
        "lengths": lengths(fiddle.build(built.data), built.model.config, stage),
    }


def lengths(data: Any, config: Any, stage: Path) -> list[int]:
    """Of the sequences in the first pack, as the data step of the recipe gives them to the model."""
    from nemo.collections.common.tokenizers import AutoTokenizer

    from runtime.engines.nemo.optimizations.packs import ends_of

    data.tokenizer, data.max_train_samples = AutoTokenizer(str(stage)), 8
    data._create_dataloader = lambda dataset, **_options: dataset
    dataset = data.train_dataloader()
    batch = dataset.collate_fn([dataset[0]])
    (ends,) = ends_of(getattr(config.data_step_fn, "change", dict)(batch))
    return [end - begin for begin, end in pairwise(ends)]


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    print(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()), Path(os.environ["STAGE_PATH"]))))
