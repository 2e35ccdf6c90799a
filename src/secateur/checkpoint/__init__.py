"""The sub-model on disk: bitmask codec, files, export, and the hook through which transformers opens it."""
