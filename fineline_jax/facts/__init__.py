"""What is known of metrics, tasks and the table of scores: plain values that every room may read."""
