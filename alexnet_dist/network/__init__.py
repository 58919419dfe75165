"""The network of 2012: its model, layers, random numbers and kernels."""
