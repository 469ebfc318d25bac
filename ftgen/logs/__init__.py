"""Finding and reading logs.

In: paths. Out: a `Run` for each run, and what its log says. Start with `find.py`, then `read.py`.
"""
