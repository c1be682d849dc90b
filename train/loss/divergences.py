"""How far a draft's distribution is from the target's, row by row.

Both are over the same outcomes: the draft vocabulary with the target restricted to
it and renormalised, or a few tokens and one bucket for the rest.

Shapes: M rows, S outcomes.
"""

from collections.abc import Callable
from typing import get_args

import torch

from .names import LossName

LOSSES: tuple[LossName, ...] = get_args(LossName)

LK_ETA = 3.0
"""Of ``lk_lambda``: the value its authors found best."""


def row_losses(name: LossName, log_q: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
    """Return the loss (M,) of the draft's log-probabilities against the target's, both (M, S) float32.

    An outcome that is impossible has a large negative number, not -inf.
    """
    return _LOSSES[name](log_q, log_p)


def _cross_entropy(log_q: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
    """-Σ p log q"""
    return -(log_p.exp() * log_q).sum(-1)


def _forward_kl(log_q: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
    """Σ p log(p/q): the cross-entropy less the target's entropy."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _reverse_kl(log_q: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
    """Σ q log(q/p)"""
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def _total_variation(log_q: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
    """½ Σ |p - q| = 1 - α, α the chance that a drafted sample is accepted (arXiv 2211.17192, section 3.2)."""
    return (log_p.exp() - log_q.exp()).abs().sum(-1) / 2


def _acceptance(log_q: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
    """α = Σ min(p, q)"""
    return torch.minimum(log_p, log_q).exp().sum(-1)


def _lk_alpha(log_q: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
    """-log α (LK losses, arXiv 2602.23881)."""
    alpha = _acceptance(log_q, log_p)
    return -alpha.clamp(min=torch.finfo(alpha.dtype).tiny).log()


def _lk_lambda(log_q: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
    """λ KL + (1 - λ) TV with λ = exp(-η α), α without a gradient (LK losses, arXiv 2602.23881)."""
    share = (-LK_ETA * _acceptance(log_q.detach(), log_p)).exp()
    return share * _forward_kl(log_q, log_p) + (1 - share) * _total_variation(log_q, log_p)


_LOSSES: dict[LossName, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "cross_entropy": _cross_entropy,
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "total_variation": _total_variation,
    "lk_alpha": _lk_alpha,
    "lk_lambda": _lk_lambda,
}
