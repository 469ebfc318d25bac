"""Cut the padding of a pack into several short sequences.

In: the boundaries of a pack's sequences. Out: boundaries with more of them.

For attention and rotary embedding, the padding at the end of a pack is one more sequence. In a pack with few examples, it is
much longer than any example. The engines differ in the tensors that have the boundaries.
"""

import json
from itertools import pairwise
from pathlib import Path

MULTIPLE = 64  # tokens in a tile of the attention kernel; the longest sequence is rounded up to a multiple


def longest_sequence(metadata: Path) -> int:
    """The length of the longest example in the packs' metadata, rounded up."""
    longest = max(split["dataset_max_seqlen"] for split in json.loads(metadata.read_text()))
    return -(-int(longest) // MULTIPLE) * MULTIPLE


def cut(ends: list[int], longest: int) -> list[int]:
    """The boundaries with no sequence longer than `longest` tokens. No example is longer: only padding is cut.

    There are always as many as the longest possible padding needs, because CUDA graphs need a fixed shape.
    """
    short = [0]
    for begin, end in pairwise(ends):
        short += [*range(begin + longest, end, longest), end]
    count = len(ends) + ends[-1] // longest
    return short + [ends[-1]] * (count - len(short))
