"""From a log to results: figures, verdicts, warnings, comparisons.

In: a `Run` and its `Log`. Out: a `Summary`, and the keys of the results. Start with `summary.py`, then `keys.py`.
"""
