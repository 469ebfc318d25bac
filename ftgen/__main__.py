"""`python -m ftgen`."""

from ftgen.cli.main import main

main()
