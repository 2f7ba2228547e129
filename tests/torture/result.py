"""What one promise showed: how often it was tried, what failed, and whether a broken version was caught."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Result:
    """One row of the table.

    Attributes:
        promise: what is promised, as a clause.
        trials: how many times the attack was made with effect (a kill that came after the end is not counted).
        asked: at least so many trials count as the full figure.
        failures: one line for each trial in which the promise was broken; empty when it holds.
        control: what was broken on purpose to see that this attack can fail, as a clause.
        caught: how many of `control_trials` broken runs were found broken.
        notes: figures worth a word in the table (peak memory, longest time, ...).
    """

    promise: str
    trials: int
    asked: int
    failures: list[str]
    control: str
    caught: int
    control_trials: int
    notes: str = ""
    command: str = field(default="")
    seconds: float = field(default=0.0)

    @property
    def holds(self) -> bool:
        """No trial broke the promise, and every broken run was found."""
        return not self.failures and self.trials > 0 and self.caught == self.control_trials > 0
