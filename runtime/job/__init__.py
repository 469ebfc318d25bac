"""Errors, progress lines, environment and profiling of a job.

In: a plan and the process environment. Out: lines in the log. Start with `progress.py` and `errors.py`.
"""
