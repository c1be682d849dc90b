"""The training loop: Lightning module, trainer, checkpoints, run directory."""
