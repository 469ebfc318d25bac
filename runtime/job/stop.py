"""Stop a training when Slurm asks for it, after the current step instead of at once.

In: signals to this process. Out: `asked()`, the name of the first signal, or "".

SIGUSR1 is Slurm's warning before the time limit. SIGTERM comes with a pre-emption, a requeue and a cancellation.
"""

import signal
from types import FrameType

AGAIN = 85  # exit code of a training that was saved before its last step: run it again
_asked: list[str] = []


def listen(*signals: signal.Signals) -> None:
    """From now on these signals do not end this process; `asked` tells of them. Only the main thread may call this."""
    for one in signals:
        signal.signal(one, _note)


def asked() -> str:
    """Name of the first signal that asked this process to stop; "" if none did."""
    return _asked[0] if _asked else ""


def _note(number: int, _frame: FrameType | None) -> None:
    _asked.append(signal.Signals(number).name)
