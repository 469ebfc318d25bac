"""What a generated entrypoint does, with the plan in a file: job.py PLAN.json COMMAND."""

import json
import sys
from pathlib import Path


def main() -> int:
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from runtime.job.errors import JobError

    plan = json.loads(Path(sys.argv[1]).read_text())
    try:
        if sys.argv[2] == "check":
            from runtime import check

            return check.check(plan)
        if sys.argv[2] == "data":
            from runtime import show_data

            return show_data.show(plan)
        if sys.argv[2] == "finetune":
            from runtime import engines

            status: int = engines.module(plan, "train").train(plan)
            if plan["engine"] != "nemo":
                return status
            from runtime.engines.nemo import imports

            there = {name: sys.modules.get(name) for name in imports.DEFERRED}
            used = [name for name, module in there.items() if module and not isinstance(module, imports.StandIn)]
            print(f"deferred packages that were used: {used}")
            return status
        from runtime import engines
        from runtime.weights import checkpoint

        if sys.argv[2] == "convert":
            from runtime.data import prepare

            prepare.download(plan)
        if sys.argv[2] == "converted":
            return 0 if checkpoint.converted(plan) else 1
        if sys.argv[2] == "verify":
            return checkpoint.verify(plan)
        return int(engines.module(plan, "convert").convert(plan))
    except JobError as error:
        print(f"ftgen: error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
