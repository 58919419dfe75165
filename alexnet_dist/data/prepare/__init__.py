"""Sources of images, and how one is turned into a packed data set."""
