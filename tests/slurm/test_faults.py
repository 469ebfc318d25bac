"""Each fault of the table in docs/faults.md that other tests do not inject, once."""

import pytest
from debian import program
from faults import FAULTS, Fault, attempt, cancelled, node_gone, requeued

ELSEWHERE = {cancelled, requeued, node_gone}  # test_survive.py


@pytest.mark.parametrize("fault", [f for f in FAULTS if f.inject not in ELSEWHERE], ids=lambda fault: fault.inject.__name__)
def test_nothing_is_lost(fault: Fault, cluster, tmp_path):
    program("faketime", "faketime")
    attempt(cluster, fault, tmp_path / "desk")
