"""Defines the keys of a spec and of a site profile, and reads them from TOML.

In: TOML files (`Path`) and the texts of --set. Out: `Source`s, which are documents with line numbers, and `Spec`, `Site`.
Start with `spec.py`, then `source.py`.
"""
