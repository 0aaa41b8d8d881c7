"""When which part of a model is sent and when what came back is taken in. Plain numbers, no tensors."""

from __future__ import annotations

from dataclasses import dataclass

from leanmill.core.errors import ConfigError


@dataclass(frozen=True)
class Schedule:
    """Fragments in turn, each once in `every_steps` steps, evenly apart; the last one after a whole interval.

    Raises:
        ConfigError: There are more fragments than steps, so that several would be sent at once.
    """

    num_fragments: int
    every_steps: int

    def __post_init__(self) -> None:
        if self.num_fragments > self.every_steps:
            raise ConfigError(
                f"layout.low_comm.every_steps={self.every_steps} is less than the {self.num_fragments} fragments of "
                f"the model, which take turns; set layout.low_comm.every_steps={self.num_fragments} or more, or larger "
                f"fragments by layout.low_comm.layers_per_fragment"
            )

    def sent_after(self, step: int) -> list[int]:
        """Return the fragments that are sent after `step` optimizer steps."""
        return [index for index in range(self.num_fragments) if self._offset(index) == step % self.every_steps]

    def last_sent(self, fragment: int, step: int) -> int:
        """Return after which step a fragment was last sent, by `step`; 0 or less where it was not yet."""
        return step - (step - self._offset(fragment)) % self.every_steps

    def _offset(self, fragment: int) -> int:
        return (fragment + 1) * self.every_steps // self.num_fragments % self.every_steps
