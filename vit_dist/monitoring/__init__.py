"""What a run tells about itself: metrics on disk, throughput, progress on the terminal."""
