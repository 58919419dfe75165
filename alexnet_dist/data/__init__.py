"""Images from their source to the windows that conv1 sees."""
