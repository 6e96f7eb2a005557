"""Any of the 17 actions, each as likely."""

import numpy as np

from apprentice.world.observation import ACTIONS, Observation


def script(seed: int) -> "Random":
    """The player of an episode on this world; its draws depend on the seed alone."""
    return Random(np.random.default_rng([seed, 1]))


class Random:
    def __init__(self, generator: np.random.Generator):
        self._generator = generator

    def act(self, observation: Observation) -> str:
        return ACTIONS[self._generator.integers(len(ACTIONS))]
