"""Resolves every number of a run once.

In: a `Spec`, a `Site` and the catalogue. Out: a frozen `Plan`, or a `SpecError` with every broken rule and its line.
Start with `plan.py`, then `rules.py`.
"""
