"""Weights in Hugging Face format: which repository has them, or random ones; and read a checkpoint ahead.

In: a plan. Out: a repository, or a folder with safetensors. Start with `hub.py`.
"""
