"""Data: sources that deliver an `ImageSet`, and the in-memory data module that splits and batches it."""
