"""Each node is checked once before the training, and one that is not well is named."""

import json
import re
import subprocess
import sys

import pytest
from cluster import ROOT, SITE

TWO_BY_TWO = SITE + 'convert = "task"\ngpus_per_node = 2\n'


def nodes_of(desk, job):
    """What the log says of each node, by the node's name."""
    lines = re.findall(r"^ftgen node: (\{.*\})$", desk.log(job), re.MULTILINE)
    found = [json.loads(line) for line in lines]
    assert len({each["node"] for each in found}) == len(found)
    return {each["node"]: each for each in found}


def test_each_node_is_checked_once(desk):
    job = desk.submit(desk.compile("spec", gpus=4, site=TWO_BY_TWO))
    assert desk.ended(job, 90).state == "COMPLETED", desk.everything()
    found = nodes_of(desk, job)
    assert {name: each["state"] for name, each in found.items()} == {"node1": "no GPU", "node2": "no GPU"}
    (folder,) = desk.stage.glob(f"logs/experiments/*/*_{job}/*/nodes")
    assert sorted(path.name for path in folder.iterdir()) == ["node1.json", "node2.json"]


def test_a_site_without_it_checks_nothing(desk):
    job = desk.submit(desk.compile("spec", gpus=4, site=TWO_BY_TWO + "[node_check]\non = false\n"))
    assert desk.ended(job, 90).state == "COMPLETED", desk.everything()
    assert not nodes_of(desk, job)


@pytest.mark.parametrize("bad", ["warn", "stop"])
def test_a_node_that_is_not_well_is_named(desk, bad):
    """The cluster's GPUs are none: PyTorch finds none on either node."""
    site = TWO_BY_TWO + f'[node_check]\nbad = "{bad}"\n'
    job = desk.submit(desk.compile("spec", gpus=4, gpu="h100", site=site))
    ended = desk.ended(job, 180)
    assert ended.state == {"warn": "COMPLETED", "stop": "FAILED"}[bad], desk.everything()
    log = desk.log(job)
    assert nodes_of(desk, job)
    for name in nodes_of(desk, job):  # with stop, the first node may end the other's check
        assert f"ftgen: warning: node {name} is not well: PyTorch finds no GPU" in log
    if bad == "stop":
        assert re.search(r"ftgen: error: node node[12] is not well: .*PyTorch finds no GPU", log)
        assert re.search(r"is not well", desk.output(job))
    else:
        assert sorted(nodes_of(desk, job)) == ["node1", "node2"]
    command = [sys.executable, "-m", "ftgen", "tabulate", desk.stage, "--format", "json"]
    (run,) = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout)["runs"]
    assert any(re.match("node node[12] was not well: .*PyTorch finds no GPU", warning) for warning in run["warnings"])
    assert (bad == "warn") or re.search("node node[12] is not well", run["reason"])
