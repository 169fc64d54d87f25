"""Row-by-row decoding."""
