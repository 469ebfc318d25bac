"""Lets Megatron-Core up to 0.13 save with a later PyTorch than its images have: a function of PyTorch got new arguments.

In: this folder in PYTHONPATH. Out: the function, which also takes the earlier arguments.
"""

from torch.distributed.checkpoint import filesystem

write_item = filesystem._write_item


def _write_item(*arguments):
    if len(arguments) == 4:  # PyTorch 2.6 and earlier
        arguments = (filesystem._StorageWriterTransforms(), *arguments)
    if len(arguments) == 5:
        arguments = (*arguments, filesystem.SerializationFormat.TORCH_SAVE)
    return write_item(*arguments)


filesystem._write_item = _write_item
