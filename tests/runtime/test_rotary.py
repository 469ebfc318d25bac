"""The kernel of the optimization fused_rotary, in Triton's interpreter."""

import json
import os
import subprocess
from pathlib import Path

import pytest

WITH_TRITON = Path(__file__).parents[2] / ".venv-sets" / "triton" / "bin" / "python"
# A unit in the last place of values up to 8. Triton's interpreter cuts off where a GPU rounds.
ROUNDING = {"float32": 1e-6, "bfloat16": 2**-5}
pytestmark = pytest.mark.runtime


def test_the_kernel_rotates_as_defined_forward_and_backward() -> None:
    done = subprocess.run(
        [WITH_TRITON, "-W", "ignore", Path(__file__).with_name("rotated.py")],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, list[float]] = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 18
    for case, differences in found.items():
        assert max(differences) <= ROUNDING[case.split(",")[0]], case
