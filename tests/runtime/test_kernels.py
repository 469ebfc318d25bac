"""ftgen's own kernels, in Triton's interpreter."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

WITH_TRITON = Path(__file__).parents[2] / ".venv-sets" / "triton" / "bin" / "python"
# A unit in the last place of values up to 8. Triton's interpreter cuts off where a GPU rounds.
ROUNDING = {"float32": 5e-6, "bfloat16": 2**-5, "float16": 2**-7}
pytestmark = pytest.mark.runtime


def run(script: str) -> Any:
    """What a script of this folder prints."""
    done = subprocess.run(
        [WITH_TRITON, "-W", "ignore", Path(__file__).with_name(script)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(("script", "cases"), [("rotated.py", 18), ("attended.py", 24)])
def test_a_kernel_computes_what_is_defined_forward_and_backward(script: str, cases: int) -> None:
    found: dict[str, list[float]] = run(script)
    assert len(found) == cases
    for case, differences in found.items():
        assert max(differences) <= ROUNDING[case.split(",")[0]], case


def test_attention_of_megatron_core_is_the_same_with_the_kernels() -> None:
    for differences in run("split_attention.py"):
        assert len(differences) == 4
        assert max(differences) <= 1e-6
