"""Scores of how much a training sample counts for a query, and how well scores predict retraining.

With features φ (``gradient_features.py``) of queries and of the training set Φ ``(n, d)``,

    cosine:  φ_qᵀ φ_i / (‖φ_q‖ ‖φ_i‖)
    TRAK:    φ_qᵀ (ΦᵀΦ + damping · tr(ΦᵀΦ)/d · I)⁻¹ φ_i

(Park et al. 2023, arXiv 2303.14186, equation 16). A model retrained on a subset A should give a
query an output that the sum of scores over A orders: the linear datamodeling score is the rank
correlation of the two over subsets (equation 9 there).
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize
from torchmetrics.functional import spearman_corrcoef

from lightning_vr.core.validation import check_positive


def cosine_scores(query: Tensor, train: Tensor) -> Tensor:
    """Return cosines of features ``(q, n)``.

    Args:
        query: Features of queries ``(q, d)``.
        train: Features of the training set ``(n, d)``.
    """
    _check_features(query, train)
    own, others = (normalize(x.double(), dim=1) for x in (query, train))
    return torch.mm(own, others.T)


def trak_scores(query: Tensor, train: Tensor, damping: float = 1e-3) -> Tensor:
    """Return TRAK's scores ``(q, n)``, in float64.

    Args:
        query: Features of queries ``(q, d)``.
        train: Features of the training set ``(n, d)``.
        damping: Ridge on the Gram matrix, in units of its mean eigenvalue. Noise in the features
            inflates that matrix: noisier features need more.
    """
    _check_features(query, train)
    check_positive("damping", damping)
    phi = train.double()
    gram = phi.T @ phi
    gram.diagonal().add_(damping * gram.diagonal().mean())
    return torch.mm(query.double(), torch.linalg.solve(gram, phi.T))


def linear_datamodeling_score(scores: Tensor, masks: Tensor, outputs: Tensor) -> Tensor:
    """Return the rank correlation of predicted and true outputs for each query ``(q,)``.

    Its mean is the linear datamodeling score. A loss that falls where a helpful sample is trained
    on is an output with its sign turned.

    Args:
        scores: Scores ``(q, n)``.
        masks: The samples of each subset ``(m, n)``, bool.
        outputs: Output of the model of each subset for each query ``(m, q)``.

    Raises:
        ValueError: If shapes do not go together, or there are fewer than two subsets.
    """
    if masks.shape[1:] != scores.shape[1:] or outputs.shape != (len(masks), len(scores)):
        raise ValueError(
            f"`masks` and `outputs` must have the shapes (m, {scores.shape[1]}) and (m, "
            f"{len(scores)}) for scores {tuple(scores.shape)}, got {tuple(masks.shape)} and "
            f"{tuple(outputs.shape)}: give a row for each subset."
        )
    if len(masks) < 2:
        raise ValueError(f"`masks` must hold at least 2 subsets, got {len(masks)}: retrain more.")
    predicted = masks.to(scores) @ scores.T
    pairs = zip(predicted.T, outputs.to(scores).T, strict=True)
    return torch.stack([spearman_corrcoef(a, b) for a, b in pairs])


def _check_features(query: Tensor, train: Tensor) -> None:
    if query.ndim != 2 or train.ndim != 2 or query.shape[1] != train.shape[1]:
        raise ValueError(
            f"`query` and `train` must be features (q, d) and (n, d) of one kind, got "
            f"{tuple(query.shape)} and {tuple(train.shape)}: compute both by one GradientFeatures."
        )
