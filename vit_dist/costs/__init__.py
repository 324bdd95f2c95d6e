"""What a model costs on a device: arithmetic, and what devices can do."""
