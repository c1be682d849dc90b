"""Data sets -> rows -> samples: token ids and loss mask."""
