"""Compression primitives behind the notebooks: one flat module per idea, named after the papers."""
