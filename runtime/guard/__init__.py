"""A folder is published once, whole, for all who ask.

In: a place, what identifies its content, and a function that builds it. Out: the folder. Start with `publish.py`.
"""
