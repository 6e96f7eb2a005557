"""apprentice: teach a vision-language model to play Crafter."""

import logging
import os

from apprentice.student import torchvision_operators

# Threads that wait by spinning take the core from those that work: five times slower beside one busy process.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# It misses a faster kernel for 4-bit weights on a CPU, and says so wherever PEFT is imported.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
torchvision_operators.install()
