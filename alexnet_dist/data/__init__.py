"""Images, from a source to the windows that conv1 sees."""
