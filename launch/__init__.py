"""Runs as Slurm jobs: submitted, resumed whatever Slurm does to them, watched.

It uses the package, which does not know of it.
"""
