"""What runs the target: one file or folder an engine."""
