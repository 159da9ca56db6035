from typing import Any

from rich.progress import Progress


class KilledError(BaseException):
    """What a killed process looks like from inside: nothing catches it."""


class KillingProgress(Progress):
    """Ends the process, in a manner of speaking, at its n-th update."""

    def __init__(self, updates: int) -> None:
        super().__init__(disable=True)
        self.left = updates

    def update(self, *args: Any, **kwargs: Any) -> None:
        self.left -= 1
        if self.left < 0:
            raise KilledError
