"""`python -m tests.bench.limits`: limits under load, under kills and under every failure of Redis, judged from what the
provider saw."""
