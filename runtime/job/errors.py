"""Errors that the user can mend, as data: what is wrong, and what to do about it."""


class JobError(Exception):
    """One thing the user must change; as text it is that line, and the hint on a line of its own. Exit status 1."""

    def __init__(self, what: str, hint: str = "") -> None:
        """`what` and `hint` are one line each."""
        super().__init__(what, hint)
        self.what = what
        self.hint = hint

    def __str__(self) -> str:
        """Show the rule, then the hint."""
        return self.what + (f"\n  hint: {self.hint}" if self.hint else "")
