"""Pack examples into sequences of one length, with little padding: best fit, the longest example first.

In: the lengths of the examples. Out: the packs, as lists of example numbers.
"""

import random
from collections import defaultdict


def pack(lengths: list[int], size: int, seed: int) -> list[list[int]]:
    """Packs of at most `size` tokens. `seed` decides the order of examples of the same length. No length exceeds `size`.

    The pack with the least room that is enough takes the next example. `rooms` has a bit for each room that some pack
    has, so the search takes the same time for any number of packs.
    """
    order = list(range(len(lengths)))
    random.Random(seed).shuffle(order)  # noqa: S311
    order.sort(key=lambda number: -lengths[number])
    packs: list[list[int]] = []
    by_room: defaultdict[int, list[int]] = defaultdict(list)
    rooms = 0
    for number in order:
        enough = rooms >> lengths[number] << lengths[number]
        if enough:
            room = (enough & -enough).bit_length() - 1
            chosen = by_room[room].pop()
            rooms ^= 0 if by_room[room] else 1 << room
        else:
            room, chosen = size, len(packs)
            packs.append([])
        packs[chosen].append(number)
        by_room[room - lengths[number]].append(chosen)
        rooms |= 1 << (room - lengths[number])
    return packs
