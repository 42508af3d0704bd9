"""How well the detectors tell private data and secrets from what only looks like it. See tests/bench/README.md."""
