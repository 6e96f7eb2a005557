"""apprentice: teach a vision-language model to play Crafter."""

from apprentice import torchvision_operators

torchvision_operators.install()
