"""Optimizations that make a step faster than the stock recipe, one file each.

In: a recipe and a plan. Out: the recipe, changed. Start with `switch.py`.
"""
