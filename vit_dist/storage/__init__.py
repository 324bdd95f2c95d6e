"""Storage that fails: its errors in one vocabulary, durable files, the lock of a workdir."""
