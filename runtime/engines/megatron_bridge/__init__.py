"""Train with Megatron-Bridge and Megatron-Core.

In: a plan. Out: a converted checkpoint, step lines. Start with `train.py`.
"""
