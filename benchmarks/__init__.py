"""Benchmarks: seeded, against real servers, the stock way beside ours in the same run."""
