"""``specx export``: the servable draft, checked."""
