"""Loops and kernels of ours, where torch's operators take too many passes over memory."""
