"""`python -m benchmarks`: one table of ours beside its peers."""
