"""What follows from a log: figures, verdicts, warnings, comparisons.

In: a `Run` and its `Log`. Out: a `Summary`; keys of the results, each once. Start with `summary.py`, then `keys.py`.
"""
