"""One folder for each framework that trains; each has the same file names.

In: a plan, weights, data. Out: step lines and checkpoints. Start with `nemo/train.py`.
"""
