"""Start a task of the training again with a command in front of it, such as numactl.

In: plan["prefix"], and the ranks of this task. Out: this process becomes the command, which starts Python again.
"""

import os
import re
import shutil
import sys
from typing import Any

from runtime.job.errors import JobError
from runtime.job.progress import say

BEHIND = "FTGEN_BEHIND_PREFIX"  # set for the process that the command starts


def enter(plan: dict[str, Any]) -> None:
    """Become the command of the site profile, once. JobError: there is no such program."""
    if not plan["prefix"] or BEHIND in os.environ:
        return
    words = [with_ranks(word) for word in plan["prefix"]]
    program = shutil.which(words[0])
    if not program:
        raise JobError(f"prefix: {words[0]} is not installed here", "correct prefix in the site profile, or install it")
    os.environ[BEHIND] = "1"
    command = [*words, sys.executable, *sys.orig_argv[1:]]
    say("prefix: " + " ".join(words))
    sys.stdout.flush()
    os.execv(program, command)  # noqa: S606 - it starts this program again


def with_ranks(word: str) -> str:
    """The word with {rank}, {local_rank}, {node_rank} and, for example, {local_rank//4} replaced by numbers."""

    def number(found: re.Match[str]) -> str:
        return str(int(os.environ.get(found[1].upper(), "0")) // int(found[2] or 1))

    return re.sub(r"\{(rank|local_rank|node_rank)(?://([1-9][0-9]*))?\}", number, word)
