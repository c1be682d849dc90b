"""Many engines over one store, in Ray actors."""
