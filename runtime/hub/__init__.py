"""Repositories of the Hugging Face hub: find them on this machine, or download them once for all jobs.

In: a `Repository`. Out: a folder with its files. Start with `fetch.py`; `find.py` uses neither a network nor a package.
"""
