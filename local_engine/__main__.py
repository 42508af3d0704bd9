"""`python -m local_engine`: the same as the console script hybridgate-engine."""

from local_engine.cli import main

main()
