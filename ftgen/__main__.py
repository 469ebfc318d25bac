"""`python -m ftgen`."""

from ftgen.cli import main

main()
