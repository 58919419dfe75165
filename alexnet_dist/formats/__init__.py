"""Other programs' weight files."""
