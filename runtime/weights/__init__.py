"""Get weights in Hugging Face format: download them, or generate random ones; and read a checkpoint ahead.

In: a plan. Out: a folder with safetensors. Start with `hub.py`.
"""
