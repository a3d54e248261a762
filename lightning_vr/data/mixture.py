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
are found once. The score is summed as written and not taken from
:math:`(\alpha \bar m - x_t) / \sigma^2`, and the covariance around :math:`\bar m`: both differences
cancel at low noise.

Source: Gaussian conditioning as in C. M. Bishop, "Pattern Recognition and Machine Learning" (2006),
eq. 2.113-2.117, one component at a time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Conditioned:
    """The components given x_t, in the eigenvectors of each; ``B`` may be 1 for a shared noise.

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
    """A mixture of C Gaussians in d dimensions and everything a diffusion makes of it.

    Results come in the precision of ``xt``, and in float32 for half precision. A component may
    be a point (zero covariance) as long as the noise is positive.

    Args:
        means: Means of shape ``(C, d)``.
        std: Standard deviation of isotropic components, one for all or of shape ``(C,)``.
        covariances: Covariances of shape ``(C, d, d)`` in place of ``std``.
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
                "Argument `means` expected to be finite floating point numbers of shape (C, d),"
                f" but got {means.dtype} of shape {tuple(means.shape)}."
            )
        if weights is None:
            weights = means.new_full((len(means),), 1 / len(means))
        _check_weights(weights, len(means))
        if (std is None) == (covariances is None):
            raise ValueError(
                "Arguments `std` and `covariances` expected exactly one to be given,"
                f" but got {'neither' if std is None else 'both'}."
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
        """Independent draws.

        Args:
            count: Number of draws.
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
        """Log density of x_t.

        Args:
            xt: Noised data of shape ``(B, d)``.
            alpha: Signal level, a scalar or ``(B,)``.
            sigma: Noise level, a scalar or ``(B,)``.

        Returns:
            Natural logarithms of shape ``(B,)``.
        """
        return self._condition(xt, alpha, sigma).log_joint.logsumexp(1)

    def score(self, xt: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> Tensor:
        """Gradient of the log density of x_t in x_t.

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
        """Mean of x0 given x_t: the optimal denoiser.

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
        """Trace of the covariance of x0 given x_t, without the covariance.

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

    def posterior_covariance(
        self, xt: Tensor, alpha: Tensor | float, sigma: Tensor | float
    ) -> Tensor:
        """Covariance of x0 given x_t.

        Args:
            xt: Noised data of shape ``(B, d)``.
            alpha: Signal level, a scalar or ``(B,)``.
            sigma: Noise level, a scalar or ``(B,)``.

        Returns:
            Covariances of shape ``(B, d, d)``.
        """
        given = self._condition(xt, alpha, sigma)
        deviation = self._deviations(given)

        with torch.autocast(xt.device.type, enabled=False):
            between = torch.einsum("bc,bci,bcj->bij", given.responsibility, deviation, deviation)
            if self.axes is None:
                return between + _average(given.responsibility, given.variance).diag_embed()
            axes = self.axes.to(deviation)
            within = torch.einsum(
                "bc,cij,bcj,ckj->bik", given.responsibility, axes, given.variance, axes
            )
            return between + within

    def _condition(self, xt: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> Conditioned:
        """Conditions every component on x_t."""
        if xt.ndim != 2 or xt.shape[1] != self.means.shape[1]:
            raise ValueError(
                f"Argument `xt` expected to be of shape (B, {self.means.shape[1]}),"
                f" but got {tuple(xt.shape)}: flatten it first."
            )
        xt = xt.to(torch.promote_types(xt.dtype, torch.float32))
        alpha, sigma = _per_sample("alpha", alpha, xt), _per_sample("sigma", sigma, xt)
        variances, weights = self.variances.to(xt), self.weights.to(xt)

        noised = alpha.square() * variances + sigma.square()
        if not (noised > 0).all():
            raise ValueError(
                "Argument `sigma` expected to be positive where a component has no width,"
                f" but the smallest is {float(sigma.min())}."
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
        """Turns ``(B, C, d)`` from the eigenvectors of each component to plain coordinates."""
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
            f"Argument `{name}` expected to be a scalar or of shape ({len(xt)},),"
            f" but got {tuple(value.shape)}."
        )
    return value.reshape(-1, 1, 1)


def _check_weights(weights: Tensor, count: int) -> None:
    positive = weights.shape == (count,) and bool((weights > 0).all())
    if not positive or not math.isclose(float(weights.sum()), 1, abs_tol=1e-5):
        raise ValueError(
            f"Argument `weights` expected to be {count} positive numbers that sum to 1,"
            f" but got {weights.tolist()}."
        )


def _isotropic(means: Tensor, std: float | Tensor | None) -> Tensor:
    """Variances ``(C, d)`` from standard deviations of components."""
    deviations = torch.as_tensor(std, dtype=means.dtype, device=means.device)
    single = deviations.ndim == 0 or deviations.shape == means.shape[:1]
    if not single or not (deviations >= 0).all():
        raise ValueError(
            "Argument `std` expected to be one non-negative number or one for each of the"
            f" {len(means)} components, but got {deviations.tolist()}."
        )
    return deviations.square().reshape(-1, 1).expand(means.shape).contiguous()


def _diagonalise(means: Tensor, covariances: Tensor) -> tuple[Tensor, Tensor]:
    """Variances ``(C, d)`` along the eigenvectors ``(C, d, d)`` of covariances."""
    count, dimension = means.shape
    if covariances.shape != (count, dimension, dimension):
        raise ValueError(
            f"Argument `covariances` expected to be of shape {(count, dimension, dimension)},"
            f" but got {tuple(covariances.shape)}."
        )

    variances, axes = torch.linalg.eigh(covariances.to(means))
    rounding = 10 * dimension * torch.finfo(means.dtype).eps * variances.abs().max()
    symmetric = torch.allclose(covariances, covariances.mT)
    if not symmetric or not (variances >= -rounding).all():
        raise ValueError(
            "Argument `covariances` expected to be symmetric and positive semi-definite, but got"
            f" a smallest eigenvalue of {float(variances.min()):g}, symmetric: {symmetric}."
        )
    # a singular covariance has eigenvalues of -1e-17 instead of 0
    return variances.clamp_min(0), axes
