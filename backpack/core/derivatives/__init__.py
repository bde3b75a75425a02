"""Import paths of the original that scripts use."""
