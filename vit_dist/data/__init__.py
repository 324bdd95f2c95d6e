"""Where images come from, how they are preprocessed, and in which order they are batched."""
