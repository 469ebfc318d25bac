"""Asks a real cluster.

In: a `Site` and `Plan`s. Out: the `Finding`s of `ftgen doctor`, and the states of jobs. Start with `doctor.py`.
"""
