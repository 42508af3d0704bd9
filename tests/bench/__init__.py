"""The benchmark: one load, in one run, against Hybridgate and what it is compared with. `python -m tests.bench
--help`."""
