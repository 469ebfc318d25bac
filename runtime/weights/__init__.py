"""Weights in Hugging Face format: downloaded, made at random, read ahead.

In: a plan. Out: a folder with safetensors. Start with `hub.py`.
"""
