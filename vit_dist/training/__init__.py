"""The optimiser step: losses, schedules, optimisers, checkpoints."""
