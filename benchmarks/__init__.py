"""Inlay beside its peers: the same model, data, type and batch, the same losses, rounds interleaved."""
