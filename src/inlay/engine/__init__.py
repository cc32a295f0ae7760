"""The engine: packed batches, attention within sequences, logits only where they are scored."""
