"""What Inlay knows of decoders: a table of families, inference for the rest, known shapes, the embedded bases."""
