"""The optimizer step: losses, schedules, optimizers, checkpoints."""
