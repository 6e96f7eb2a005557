"""python -m apprentice: the command without its script."""

from apprentice.cli import main

main()
