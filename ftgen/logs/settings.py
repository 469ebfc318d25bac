"""What a framework prints of its settings before the steps. In: text (`bytes`). Out: Identity's keys with their texts."""

import re

SEQ_LENGTH = re.compile(rb"\bseq_length\b[ .:='\"]{1,80}(\d{2,8})\b")
WORLD_SIZE = re.compile(rb"\bworld_size\b[ .:='\"]{1,80}(\d{1,7})\b")
GPU = re.compile(rb"\bNVIDIA (?:[A-Za-z]{1,20} )?((?:GB|GH|A|B|H|L|V)\d{2,3})\b")
# Identity's key, the word that the text is searched for first, and the pattern of the value
SETTINGS = (("seq_length", b"seq_length", SEQ_LENGTH), ("gpus", b"world_size", WORLD_SIZE), ("gpu", b"NVIDIA ", GPU))


def find(text: bytes) -> dict[str, str]:
    """The sequence length, the number of GPUs and the kind of GPU, as far as the text has them."""
    found = ((key, pattern.search(text)) for key, word, pattern in SETTINGS if word in text)
    return {key: match[1].decode().lower() for key, match in found if match}
