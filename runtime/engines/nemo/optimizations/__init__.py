"""What makes a step faster than the stock recipe: one file for each optimization.

In: a recipe and a plan. Out: the recipe, changed. Start with `switch.py`.
"""
