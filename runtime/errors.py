"""Errors that the user can mend, as data: what is wrong, and what to do about it."""


class JobError(Exception):
    """One thing the user must change; the entrypoint prints it in a line, the hint in another, and exits with 1."""

    def __init__(self, what: str, hint: str = "") -> None:
        """`what` and `hint` are one line each."""
        super().__init__(what)
        self.what = what
        self.hint = hint

    def lines(self) -> str:
        """`ftgen: error: …`, and the hint on a line of its own."""
        return f"ftgen: error: {self.what}" + (f"\n  hint: {self.hint}" if self.hint else "")
