"""Load a model by name, save what was compressed, compress from disk, read and write GGUF."""
