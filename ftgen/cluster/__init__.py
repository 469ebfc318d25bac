"""Asks a real cluster about jobs.

In: a `Site` and `Plan`s. Out: the `Finding`s of `ftgen doctor`, and the states of jobs. Start with `doctor.py`.
"""
