"""The order of the samples in a training: real epochs, shuffled by the seed, each in another order.

In: the number of samples (examples, or packs of examples), the seed, and the place of a sample in the training, from 0.
Out: the number of the sample; a data set in this order (`InOrder`).

The order is a pure function. A training that resumes needs only the number of samples that it has consumed.
"""

from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


def sample(place: int, samples: int, seed: int) -> int:
    """The sample at this place of the training."""
    epoch, within = divmod(place, samples)
    return int(shuffled(epoch, samples, seed)[within])


class InOrder:
    """The samples of a training in their order, for as many samples as the training needs."""

    def __init__(self, samples: Any, count: int, seed: int) -> None:
        """`samples` is a data set with a function `collate_fn`."""
        self.samples, self.count, self.seed = samples, count, seed
        self.collate_fn = samples.collate_fn

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, place: int) -> dict[str, Any]:
        found: dict[str, Any] = self.samples[sample(place, len(self.samples), self.seed)]
        return found


@lru_cache(maxsize=2)
def shuffled(epoch: int, samples: int, seed: int) -> "np.ndarray[Any, Any]":
    """The order of one epoch: int64 [samples]. NumPy keeps the results of RandomState the same in all its versions."""
    import numpy as np

    return np.random.RandomState([seed, epoch]).permutation(samples)


def steps(epochs: int, samples: int, batch: int) -> int:
    """Steps of `batch` samples that give every sample `epochs` times. The last batch is filled from one more epoch."""
    return -(-epochs * samples // batch)
