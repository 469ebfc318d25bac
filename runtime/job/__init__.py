"""The job itself: errors, progress, the environment it found, profiling.

In: a plan and the process environment. Out: lines in the log. Start with `progress.py` and `errors.py`.
"""
