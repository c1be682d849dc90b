"""Names of losses, for settings: imports nothing."""

from typing import Literal

LossName = Literal["cross_entropy", "forward_kl", "reverse_kl", "total_variation", "lk_alpha", "lk_lambda"]
