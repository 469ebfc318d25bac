"""The kernels of the optimization fp8_swiglu: in Triton's interpreter, and compiled for a GPU that is not there."""

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

WITH_TRITON = Path(__file__).parents[2] / ".venv-sets" / "triton" / "bin" / "python"
pytestmark = pytest.mark.runtime


def _printed(script: str, **environment: str) -> Any:
    done = subprocess.run(
        [WITH_TRITON, "-W", "ignore", Path(__file__).with_name(script)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_the_kernels_compute_the_result_and_the_gradient_as_defined() -> None:
    found = _printed("gated.py", TRITON_INTERPRET="1")
    edges = found.pop("edges")
    assert len(found) == 5
    for case, differences in found.items():
        assert max(differences) <= 1e-6, case
    # silu(-1e30) is 0, and NaN stays but does not count as the largest value, which grows and never shrinks.
    assert re.fullmatch(r"\[\[nan, -?0\.0, 5\.28\d+]]", edges["written"])
    assert edges["amax"] == [pytest.approx(5.2848, rel=1e-4), 9.0]


def test_compiled_kernels_saturate_and_move_16_bytes_at_a_time(tmp_path: Path) -> None:
    ptx = _printed("gated_ahead.py", TRITON_CACHE_DIR=str(tmp_path))
    for name, cast in (("result", "e4m3x2"), ("gradient", "e5m2x2")):
        assert f"cvt.rn.satfinite.{cast}.f32" in ptx[name]
        assert set(re.findall(r"cp\.async\.\w+\.shared\.global \[[^]]*], \[[^]]*], (\w+)", ptx[name])) == {"0x10"}
        assert "atom.global.gpu.relaxed.max.s32" in ptx[name]
        assert not re.search(r"\b(ld|st)\.local", ptx[name]), "registers are spilled"


def test_the_kernels_write_rows_in_fp8_and_leave_all_else_to_transformer_engine() -> None:
    found = _printed("gated_in_place.py", TRITON_INTERPRET="1")
    ours = {name: found.pop(name) for name in ("result", "public result", "gradient")}
    assert set(found.values()) == {"stock"}
    assert [part["class"] for part in ours.values()] == ["Float8TensorStorage", "Float8Tensor", "Float8TensorStorage"]
    assert [part["shape"] for part in ours.values()] == [[6, 1, 40], [6, 1, 40], [6, 1, 80]]
    assert [part["fp8_dtype"] for part in ours.values()] == ["E4M3", "E4M3", "E5M2"]
    assert [part["stands_for"] for part in ours.values()] == [None, "torch.bfloat16", None]
    for part in ours.values():
        assert (part["transpose"], part["scale_inv"]) == (None, 0.5)
        assert part["largest"] == pytest.approx(part["amax"], rel=0.25)  # E5M2 has two bits after the point
