"""Solvers: from sums over rows to the weights of probes."""
