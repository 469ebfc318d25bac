"""The training frameworks, one folder each, with the same file names in each.

In: a plan, weights, data. Out: step lines and checkpoints. Start with `nemo/train.py`.
"""
