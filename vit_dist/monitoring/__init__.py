"""What a run reports of itself: metrics on disk, throughput, progress on the terminal, a log."""
