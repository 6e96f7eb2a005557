"""apprentice: teach a vision-language model to play Crafter."""
