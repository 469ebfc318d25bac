"""A training on the CPU beside GPUs that are sampled: sampled.py PLAN.json. Its plan has no GPU, so it starts no sampler."""

import json
import sys
from pathlib import Path


def main() -> int:
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from runtime import engines
    from runtime.node import telemetry

    plan = json.loads(Path(sys.argv[1]).read_text())
    telemetry.begin({**plan, "gpu": {"name": "h100"}})
    return int(engines.module(plan, "train").train(plan))


if __name__ == "__main__":
    sys.exit(main())
