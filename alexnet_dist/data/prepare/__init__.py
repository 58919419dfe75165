"""A source of images, turned into a packed data set."""
