"""The world for others' trainers: importing this registers `apprentice/Crafter-v0` with Gymnasium, where that is.

`gymnasium.make("apprentice.environment:apprentice/Crafter-v0")` imports it by itself.
"""

from importlib.util import find_spec

SMALLEST = 18
"""Side of the smallest picture that can be drawn: 2 pixels a tile."""

if find_spec("gymnasium"):
    import gymnasium

    gymnasium.register("apprentice/Crafter-v0", "apprentice.environment.gymnasium_env:Crafter")
