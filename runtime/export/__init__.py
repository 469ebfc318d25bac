"""Export a trained checkpoint of either engine to Hugging Face format, and check that it is the trained model.

In: a plan and a run. Out: folders that transformers and PEFT load. Start with `export.py`.
"""
