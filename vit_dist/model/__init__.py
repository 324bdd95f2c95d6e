"""The Vision Transformer and everything that depends on its shape alone."""
