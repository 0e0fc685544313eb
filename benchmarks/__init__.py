"""Doorstep beside its peers: the same work, in one session, runs alternating. See benchmarks/README.md."""
