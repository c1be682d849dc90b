"""Names of the losses, in a file that imports nothing heavy, as settings need them."""

from typing import Literal

LossName = Literal["cross_entropy", "forward_kl", "reverse_kl", "total_variation", "lk_alpha", "lk_lambda"]
