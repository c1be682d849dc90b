"""``specx regenerate``: the target's own answers."""
