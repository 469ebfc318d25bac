"""Build a folder once, however many jobs and ranks need it, and publish it only when it is complete.

In: a path, what identifies its content, and a function that builds it. Out: the folder. Start with `publish.py`.
"""
