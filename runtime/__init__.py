"""The code that runs inside the job. It uses the standard library and the framework, but never ftgen.

In: the plan in the job's entrypoint. Out: a checkpoint, data, step lines in the log. Start with `check.py` and
`engines/nemo/train.py`.
"""
