"""Runs as Slurm jobs: submitted, resumed through whatever Slurm does, watched.

Beside the package, which knows nothing of it.
"""
