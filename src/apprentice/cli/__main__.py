"""python -m apprentice.cli: the command without its script."""

from apprentice.cli import main

main()
