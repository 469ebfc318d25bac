"""The error for everything that the user can fix.

In: what is wrong and what to do, one line each. Out: an exception, which the entrypoint prints as `ftgen: error: ...`.
"""

from collections.abc import Iterator


class JobError(Exception):
    """Something that the user must change. As text: what is wrong, then the hint on its own line. Exit code 1."""

    def __init__(self, what: str, hint: str = "") -> None:
        """`what` and `hint` are one line each."""
        super().__init__(what, hint)
        self.what = what
        self.hint = hint

    def __str__(self) -> str:
        """What is wrong, then the hint."""
        return self.what + (f"\n  hint: {self.hint}" if self.hint else "")


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """The exception, and those that it was raised from or while."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
