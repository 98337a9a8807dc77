"""SmoothQuant (Xiao et al., arXiv 2211.10438): outlier channels move from activations into weights. Pure maths."""

from __future__ import annotations

import torch

ALPHAS = (0.25, 0.4, 0.5, 0.6, 0.75, 0.9)  # shares that the search tries, besides no scale at all
LIMIT = 1e5  # of a scale and of its inverse


def smoothing_scale(x_max: torch.Tensor, w_max: torch.Tensor, alpha: float) -> torch.Tensor:
    """``s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)`` (equation 4), float32 [channels].

    Activations are divided by it, weights multiplied. A channel without input or without weights keeps 1.

    Args:
        x_max: [channels], the largest ``|x|``. w_max: [channels], the largest ``|w|`` of all linears that read it.
    """
    x_max, w_max = x_max.double(), w_max.double()
    scale = x_max.pow(alpha) / w_max.pow(1 - alpha)
    usable = (x_max > 0) & (w_max > 0) & scale.isfinite()
    return torch.where(usable, scale, torch.ones_like(scale)).clamp(1 / LIMIT, LIMIT).float()


def joint_maxima(vision: torch.Tensor, text: torch.Tensor, weight: float) -> torch.Tensor:
    """One profile of channel maxima for visual and text tokens, [channels].

    Visual tokens mostly have the larger values, so that the plain joint maximum is theirs in every channel, and what
    stands out among text tokens is not seen. With a scale for every token only the profile over channels matters, not
    its size; so each modality's maxima are divided by the largest of them, and of each channel the larger share counts:

        p_j = max( sqrt(weight) vision_j / max(vision), text_j / max(text) )

    scaled so that its largest value is that of the joint maximum. The square root, because rounding errors are squared.
    A modality without tokens (or all zero) leaves the other as it is.

    Args:
        vision, text: [channels], the largest ``|x|`` of either's tokens. weight: of a visual token where text weighs 1.
    """
    v, t = (float(part.max()) if part.numel() else 0.0 for part in (vision, text))
    if not v or not t:
        return text if not v else vision
    profile = torch.maximum(weight**0.5 * vision / v, text / t)
    return profile / profile.max() * max(v, t)
