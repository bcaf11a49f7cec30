"""Benchmarks: one file a claim, each printing ours, the peer's and the ratio from one run."""
