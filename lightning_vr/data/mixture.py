r"""Gaussian mixtures: data whose posterior and score are known in closed form.

With :math:`p_0 = \sum_c \pi_c N(\mu_c, \Sigma_c)` and :math:`x_t = \alpha x_0 + \sigma\epsilon`,
the noised data are again a mixture, of covariances :math:`T_c = \alpha^2 \Sigma_c + \sigma^2 I`,
and so is :math:`p(x_0 | x_t)`:

.. math::
    r_c &\propto \pi_c N(x_t;\, \alpha\mu_c,\, T_c) \qquad
    m_c = \mu_c + \alpha \Sigma_c T_c^{-1} (x_t - \alpha\mu_c) \qquad
    V_c = \sigma^2 \Sigma_c T_c^{-1} \\
    E[x_0|x_t] &= \bar m = \sum_c r_c m_c \qquad
    Cov[x_0|x_t] = \sum_c r_c \left( V_c + (m_c - \bar m)(m_c - \bar m)^T \right) \\
    \nabla \log p_t(x_t) &= -\sum_c r_c T_c^{-1} (x_t - \alpha\mu_c)

All of it is diagonal in the eigenvectors of :math:`\Sigma_c`, which do not depend on the noise and
are computed once. The score is summed as written and not taken from
:math:`(\alpha \bar m - x_t) / \sigma^2`, and the variance is taken around :math:`\bar m`: at low
noise the differences would cancel.

Source: Gaussian conditioning as in C. M. Bishop, "Pattern Recognition and Machine Learning" (2006),
eq. 2.113-2.117, one component at a time.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Conditioned:
    """The components given x_t, each in its own eigenvectors; ``B`` is 1 for a shared noise level.

    Attributes:
        log_joint: log of weight times density of x_t, ``(B, C)``.
        offset: Posterior mean of a component less its prior mean, ``(B, C, d)``.
        variance: Posterior variances of a component, ``(B, C, d)``.
        score: Gradient of the log density of a noised component, ``(B, C, d)``.
    """

    log_joint: Tensor
    offset: Tensor
    variance: Tensor
    score: Tensor

    @property
    def responsibility(self) -> Tensor:
        """Posterior probability of every component, ``(B, C)``."""
        return self.log_joint.softmax(1)


class GaussianMixture(nn.Module):
    """A mixture of C Gaussians in d dimensions, and its densities and posteriors under noise.

    Results have the dtype of ``xt``, float32 for half precision. A component may be a point (zero
    covariance) as long as the noise level is positive.

    Args:
        means: Means of shape ``(C, d)``.
        std: Standard deviation of isotropic components, one number or of shape ``(C,)``.
        covariances: Covariances of shape ``(C, d, d)`` instead of ``std``.
        weights: Probabilities of shape ``(C,)``; equal by default.

    Raises:
        ValueError: If the parameters are not those of a mixture.
    """

    weights: Tensor
    means: Tensor
    variances: Tensor
    axes: Tensor | None

    def __init__(
        self,
        means: Tensor,
        *,
        std: float | Tensor | None = None,
        covariances: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> None:
        super().__init__()
        if means.ndim != 2 or not means.is_floating_point() or not means.isfinite().all():
            raise ValueError(
                f"`means` must be finite floating-point numbers of shape (C, d), got {means.dtype} "
                f"of shape {tuple(means.shape)}: give one row for each component."
            )
        if weights is None:
            weights = means.new_full((len(means),), 1 / len(means))
        _check_weights(weights, len(means))
        if (std is None) == (covariances is None):
            raise ValueError(
                f"Exactly one of `std` and `covariances` must be given, got "
                f"{'neither' if std is None else 'both'}: use `std` for isotropic components."
            )

        if covariances is not None:
            variances, axes = _diagonalise(means, covariances)
        else:
            variances, axes = _isotropic(means, std), None
        self.register_buffer("weights", weights.to(means))
        self.register_buffer("means", means)
        self.register_buffer("variances", variances)
        self.register_buffer("axes", axes)

    def sample(self, count: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Draw independent samples.

        Args:
            count: Number of samples.
            generator: Source of randomness, on the device of the mixture.

        Returns:
            x0 of shape ``(count, d)`` and the component of each, int64 of shape ``(count,)``.
        """
        component = self.weights.multinomial(count, replacement=True, generator=generator)
        shape = (count, self.means.shape[1])
        noise = torch.randn(
            shape, generator=generator, dtype=self.means.dtype, device=self.means.device
        )

        offset = self.variances.sqrt()[component] * noise
        if self.axes is not None:
            offset = (self.axes[component] @ offset.unsqueeze(-1)).squeeze(-1)
        return self.means[component] + offset, component

    def log_density(self, xt: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> Tensor:
        """Return the log density of x_t.

        Args:
            xt: Noised data of shape ``(B, d)``.
            alpha: Signal level, a scalar or ``(B,)``.
            sigma: Noise level, a scalar or ``(B,)``.

        Returns:
            Natural logarithms of shape ``(B,)``.
        """
        return self._condition(xt, alpha, sigma).log_joint.logsumexp(1)

    def score(self, xt: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> Tensor:
        """Return the gradient of the log density of x_t in x_t.

        Args:
            xt: Noised data of shape ``(B, d)``.
            alpha: Signal level, a scalar or ``(B,)``.
            sigma: Noise level, a scalar or ``(B,)``.

        Returns:
            Scores of shape ``(B, d)``.
        """
        given = self._condition(xt, alpha, sigma)
        return _average(given.responsibility, self._rotate(given.score))

    def posterior_mean(self, xt: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> Tensor:
        """Return the mean of x0 given x_t: the optimal denoiser.

        Args:
            xt: Noised data of shape ``(B, d)``.
            alpha: Signal level, a scalar or ``(B,)``.
            sigma: Noise level, a scalar or ``(B,)``.

        Returns:
            Means of shape ``(B, d)``.
        """
        given = self._condition(xt, alpha, sigma)
        return _average(given.responsibility, self._component_means(given))

    def posterior_variance(
        self, xt: Tensor, alpha: Tensor | float, sigma: Tensor | float
    ) -> Tensor:
        """Return the trace of the covariance of x0 given x_t, without the covariance.

        Args:
            xt: Noised data of shape ``(B, d)``.
            alpha: Signal level, a scalar or ``(B,)``.
            sigma: Noise level, a scalar or ``(B,)``.

        Returns:
            Variances summed over dimensions, in units of x0 squared, of shape ``(B,)``.
        """
        given = self._condition(xt, alpha, sigma)
        deviation = self._deviations(given)
        return (given.responsibility * (given.variance + deviation.square()).sum(2)).sum(1)

    def _condition(self, xt: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> Conditioned:
        """Condition every component on x_t."""
        if xt.ndim != 2 or xt.shape[1] != self.means.shape[1]:
            raise ValueError(
                f"`xt` must have shape (B, {self.means.shape[1]}), got {tuple(xt.shape)}: flatten "
                f"each sample first."
            )
        xt = xt.to(torch.promote_types(xt.dtype, torch.float32))
        alpha, sigma = _per_sample("alpha", alpha, xt), _per_sample("sigma", sigma, xt)
        variances, weights = self.variances.to(xt), self.weights.to(xt)

        noised = alpha.square() * variances + sigma.square()
        if not (noised > 0).all():
            raise ValueError(
                f"`sigma` must be positive where a component has variance 0, got "
                f"{float(sigma.min())}: use noise levels above 0, or components with a variance."
            )

        residual = self._rotate(xt.unsqueeze(1) - alpha * self.means.to(xt), inverse=True)
        log_density = -0.5 * (residual.square() / noised + (2 * math.pi * noised).log()).sum(2)
        return Conditioned(
            log_joint=weights.log() + log_density,
            offset=alpha * variances / noised * residual,
            variance=variances * (sigma.square() / noised),
            score=-residual / noised,
        )

    def _component_means(self, given: Conditioned) -> Tensor:
        return self.means.to(given.offset) + self._rotate(given.offset)

    def _deviations(self, given: Conditioned) -> Tensor:
        means = self._component_means(given)
        return means - _average(given.responsibility, means).unsqueeze(1)

    def _rotate(self, vector: Tensor, inverse: bool = False) -> Tensor:
        """Rotate ``(B, C, d)`` from the eigenvectors of each component to plain coordinates."""
        if self.axes is None:
            return vector
        with torch.autocast(vector.device.type, enabled=False):
            axes = self.axes.to(vector)
            return torch.einsum("cij,bci->bcj" if inverse else "cij,bcj->bci", axes, vector)


def _average(responsibility: Tensor, values: Tensor) -> Tensor:
    return (responsibility.unsqueeze(-1) * values).sum(1)


def _per_sample(name: str, value: Tensor | float, xt: Tensor) -> Tensor:
    value = torch.as_tensor(value, dtype=xt.dtype, device=xt.device)
    if value.ndim > 1 or value.numel() not in (1, len(xt)):
        raise ValueError(
            f"`{name}` must be a scalar or have shape ({len(xt)},), got {tuple(value.shape)}: give "
            f"one noise level for all samples, or one for each."
        )
    return value.reshape(-1, 1, 1)


def _check_weights(weights: Tensor, count: int) -> None:
    positive = weights.shape == (count,) and bool((weights > 0).all())
    if not positive or not math.isclose(float(weights.sum()), 1, abs_tol=1e-5):
        raise ValueError(
            f"`weights` must be {count} positive numbers that sum to 1, got {weights.tolist()}: "
            f"divide them by their sum, and leave out components of weight 0."
        )


def _isotropic(means: Tensor, std: float | Tensor | None) -> Tensor:
    """Return variances ``(C, d)`` from the standard deviations of components."""
    deviations = torch.as_tensor(std, dtype=means.dtype, device=means.device)
    single = deviations.ndim == 0 or deviations.shape == means.shape[:1]
    if not single or not (deviations >= 0).all():
        raise ValueError(
            f"`std` must be one non-negative number or one for each of the {len(means)} "
            f"components, got {deviations.tolist()}: use `covariances` for other components."
        )
    return deviations.square().reshape(-1, 1).expand(means.shape).contiguous()


def _diagonalise(means: Tensor, covariances: Tensor) -> tuple[Tensor, Tensor]:
    """Return variances ``(C, d)`` along the eigenvectors ``(C, d, d)`` of covariances."""
    count, dimension = means.shape
    if covariances.shape != (count, dimension, dimension):
        raise ValueError(
            f"`covariances` must have shape {(count, dimension, dimension)}, got "
            f"{tuple(covariances.shape)}: give one for each component."
        )

    variances, axes = torch.linalg.eigh(covariances.to(means))
    rounding = 10 * dimension * torch.finfo(means.dtype).eps * variances.abs().max()
    symmetric = torch.allclose(covariances, covariances.mT)
    if not symmetric or not (variances >= -rounding).all():
        raise ValueError(
            f"`covariances` must be symmetric and positive semi-definite, got a smallest "
            f"eigenvalue of {float(variances.min()):g}, symmetric: {symmetric}: compute them as "
            f"A Aᵀ from real A."
        )
    # a singular covariance has eigenvalues of -1e-17 instead of 0
    return variances.clamp_min(0), axes
