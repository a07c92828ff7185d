"""When to stop a run that no longer gets better."""

from dataclasses import dataclass


@dataclass
class BestSoFar:
    """The best epoch of a run; part of its checkpoints, so that a resumed run stops where an unbroken one does."""

    epoch: int = 0
    score: float | None = None

    def update(self, epoch: int, score: float) -> None:
        """A score that is not a number is no improvement."""
        if score == score and (self.score is None or score > self.score):
            self.epoch, self.score = epoch, score

    def is_stale(self, epoch: int, patience: int | None) -> bool:
        """Whether ``patience`` epochs up to this one brought nothing better; never, if it is None."""
        return patience is not None and epoch - self.epoch >= patience
