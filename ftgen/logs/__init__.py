"""Finding and reading logs.

In: paths. Out: a `Run` for each run, and a `Log` of what its log says. Read `find.py` first, then `read.py` and `feed.py`.
"""
