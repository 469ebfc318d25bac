"""What can be said: the keys of a spec and of a site profile, and reading them from TOML.

In: TOML files and --set. Out: documents with line numbers, and frozen `Spec`s and `Site`s.
Start with `spec.py`, then `source.py`.
"""
