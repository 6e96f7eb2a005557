"""apprentice: teach a vision-language model to play Crafter."""

import os

from apprentice import environment, torchvision_operators

# Threads that wait by spinning take the core from those that work: five times slower beside one busy process.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
torchvision_operators.install()
environment.install()
