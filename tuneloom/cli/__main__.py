"""`python -m tuneloom.cli`: the command line without its script."""

from tuneloom.cli import main

main()
