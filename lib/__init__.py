"""Compression primitives behind the notebooks: README.md draws the tree."""
