"""Optimizations of Megatron-Bridge's stock recipe, one file each. Start with `switch.py`."""
