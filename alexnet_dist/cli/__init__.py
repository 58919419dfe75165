"""The command line: `main` and one module for each family of commands."""
