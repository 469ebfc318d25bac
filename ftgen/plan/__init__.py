"""Every number of a run, resolved once.

In: a `Spec`, a `Site` and the catalogue. Out: a frozen `Plan`, or every rule that is broken, with its place.
Start with `plan.py`, then `rules.py`.
"""
