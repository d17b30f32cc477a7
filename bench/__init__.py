"""Benches: scripts, never timed tests. `python -m bench` runs them all."""
