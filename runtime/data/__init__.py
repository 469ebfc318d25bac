"""Prepare training data: SQuAD, synthetic examples, JSONL; packing.

In: a plan and a tokenizer. Out: folders below $STAGE_PATH/data. Start with `prepare.py`.
"""
