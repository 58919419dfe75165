"""The network of 2012, and the arithmetic that is its own."""
