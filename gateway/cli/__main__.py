"""`python -m gateway.cli` is `hybridgate`."""

from gateway.cli import main

main()
