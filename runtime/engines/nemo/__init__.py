"""NeMo 2 with Megatron-Core.

In: a plan. Out: a converted checkpoint (`convert.py`), training (`train.py`). Start with `train.py`, then `recipe.py`.
"""
