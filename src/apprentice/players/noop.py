"""Does nothing."""

from apprentice.world.observation import Observation


def script(seed: int) -> "Noop":
    """The player of an episode."""
    return Noop()


class Noop:
    def act(self, observation: Observation) -> str:
        return "noop"
