"""Check a node before the training, and record its GPUs while it runs, so that a slow figure is not blamed on the software.

In: a plan. Out: a line in the log for each node, the file nodes/<name>.json beside the log; an error if the plan says so.
Start with `beside.py`, which runs `check.py` in a process of its own while the training imports its packages, and with
`telemetry.py`, which runs `sampler.py` beside the training.
"""
