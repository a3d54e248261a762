"""The Fréchet distance between two sets of samples, in the space of some features.

With normal distributions fitted to the features of either set,

    d² = ‖μ_a − μ_b‖² + tr A + tr B − 2 tr (√A B √A)^½,

the squared 2-Wasserstein distance of the two normals (Dowson and Landau 1982); on Inception
features it is the FID of Heusel et al. 2017, arXiv 1706.08500, equation 6. The trace of the root is
the sum of the roots of the eigenvalues of ``√A B √A``, which is symmetric. ``A B``, which
torchmetrics uses, is not: where a covariance is singular its eigenvalues turn complex by rounding,
and equal sets get a distance of about -1e-7.

The estimate from n samples is biased upwards, by about a constant over n that depends on the
distribution (Chong and Forsyth 2020, arXiv 1911.07023): compare values at equal n only.

Only the count, the sum and the sum of outer products of the features are kept, in float64. They
add up over batches, ranks and runs, so that any split of the samples gives the same distance.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from lightning_vr.metrics.features import Features

Side = Literal["real", "fake"]


class FrechetMetric(FrechetInceptionDistance):
    """Streaming Fréchet distance between real and generated samples.

    This is torchmetrics' ``FrechetInceptionDistance`` for any ``Features``. It checks its input,
    returns float64, and is never negative. The sums are in the state dict, the weights of
    ``features`` are not. The sums are float64 whatever dtype the metric is moved to, and on the CPU
    where the device has no float64. Under a process group ``compute`` is collective and gives every
    rank the distance over the samples of all.

    Args:
        features: The space in which the sets are compared, see ``Features``.
        reset_real_features: Whether ``reset`` forgets the real samples too. False suits data that
            do not change between evaluations.
        **kwargs: For ``torchmetrics.Metric``, such as ``process_group``.

    Raises:
        ValueError: If ``features`` is not a ``Features``.

    Example:
        >>> metric = FrechetMetric(IdentityFeatures(2))
        >>> metric.update(torch.randn(1000, 2), real=True)
        >>> metric.update(torch.randn(1000, 2) + 1, real=False)
        >>> metric.compute()  # close to 2, the squared distance of the means
    """

    features: Features

    def __init__(
        self, features: Features, *, reset_real_features: bool = True, **kwargs: Any
    ) -> None:
        if not isinstance(features, Features):
            raise ValueError(
                f"`features` must be a Features, got {type(features).__name__}: wrap your own "
                f"network as Features(network, dimension=...)."
            )
        super().__init__(
            _Unchanged(features.dimension),  # torchmetrics gets features, not images
            reset_real_features,
            compute_with_cache=False,  # a cached distance is wrong once a state is loaded or merged
            **kwargs,
        )
        self.persistent(True)
        # past nn.Module's registry, which would put the weights in the state dict
        object.__setattr__(self, "features", features)

    @property
    def update_called(self) -> bool:
        """Whether there are samples: updated, loaded or merged."""
        return bool(self.real_features_num_samples + self.fake_features_num_samples)

    def update(self, images: Tensor, real: bool) -> None:
        """Add samples to one side.

        Args:
            images: ``(B, *)`` as ``features`` takes them, images in ``[-1, 1]``.
            real: Whether they are real or generated.

        Raises:
            ValueError: If images or features are complex or not finite, or of the wrong shape.
        """
        features = self.features(images)
        check_real_and_finite(f"{_named(real)} images", images)
        self.update_features(features, real)

    def update_features(self, features: Tensor, real: bool) -> None:
        """Add samples to one side by their features.

        Args:
            features: ``(B, f)`` as ``features`` computes them.
            real: Whether they are of real or of generated samples.

        Raises:
            ValueError: If they are complex or not finite.
        """
        name = f"features {self.features.name!r} of the {_named(real)} images"
        check_real_and_finite(name, features)
        super().update(features.to(self.real_features_sum), real)

    def compute(self) -> Tensor:
        """Return the squared Fréchet distance, a float64 scalar.

        Raises:
            ValueError: If a side has too few samples for a covariance of full rank.
        """
        return frechet_distance(*self._moments("real"), *self._moments("fake"))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Raise: one batch has one side only, and so no distance."""
        raise TypeError(
            "FrechetMetric has no value per batch: call update(images, real=...), then compute()."
        )

    def _moments(self, side: Side) -> tuple[Tensor, Tensor]:
        count = int(getattr(self, f"{side}_features_num_samples"))
        least = self.features.dimension + 1
        if count < least:
            # torchmetrics would leave the sums of all ranks in place of our own
            self.unsync(self._is_synced)
            raise ValueError(
                f"The {'real' if side == 'real' else 'generated'} side must have at least {least} "
                f"samples for a covariance of the {self.features.dimension} features "
                f"{self.features.name!r}, got {count}: update with more samples, or use features "
                f"of a smaller dimension."
            )
        mean = getattr(self, f"{side}_features_sum") / count
        scatter = getattr(self, f"{side}_features_cov_sum") - count * torch.outer(mean, mean)
        return mean, scatter / (count - 1)

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Any = "") -> "FrechetMetric":
        self._device = fn(torch.empty(0, device=self._device)).device
        self.features.to(self._device)
        for name in self._defaults:
            setattr(self, name, getattr(self, name).to(_float64_device(self._device)))
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        for name in self._defaults:
            state = getattr(self, name)
            loaded = state_dict.pop(prefix + name, None)
            if loaded is None:
                missing_keys += [prefix + name] if strict else []
            elif loaded.shape != state.shape:
                error_msgs.append(
                    f"`{prefix + name}` must have shape {tuple(state.shape)}, got "
                    f"{tuple(loaded.shape)}: it was saved with other features than "
                    f"{self.features.name!r}, so build the metric with those."
                )
            else:
                # a copy, as torchmetrics adds in place and would change the checkpoint
                setattr(self, name, loaded.to(state, copy=True))

        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def _named(real: bool) -> str:
    return "real" if real else "generated"


class _Unchanged(nn.Identity):
    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features


def frechet_distance(
    mean_a: Tensor, covariance_a: Tensor, mean_b: Tensor, covariance_b: Tensor
) -> Tensor:
    """Return ``‖μ_a − μ_b‖² + tr A + tr B − 2 tr (√A B √A)^½``, a float64 scalar, never negative.

    Args:
        mean_a: ``(f,)``.
        covariance_a: ``(f, f)``, symmetric and positive semi-definite, as is ``covariance_b``.
        mean_b: ``(f,)``.
        covariance_b: ``(f, f)``.

    Raises:
        ValueError: If an argument is complex, not finite or of another shape than the rest.
    """
    size = mean_a.numel()
    mean_a = _float64("mean_a", mean_a, (size,))
    mean_b = _float64("mean_b", mean_b, (size,))
    covariance_a = _float64("covariance_a", covariance_a, (size, size))
    covariance_b = _float64("covariance_b", covariance_b, (size, size))

    root = _square_root(covariance_a)
    spectrum: Tensor = torch.linalg.eigvalsh(root @ covariance_b @ root)
    overlap = spectrum.clamp(min=0).sqrt().sum()

    means = (mean_a - mean_b).square().sum()
    distance = means + covariance_a.trace() + covariance_b.trace() - 2 * overlap
    return distance.clamp(min=0)  # equal sets give about -1e-8 by rounding


def _square_root(covariance: Tensor) -> Tensor:
    eigenvalues, eigenvectors = torch.linalg.eigh(covariance)
    root: Tensor = (eigenvectors * eigenvalues.clamp(min=0).sqrt()) @ eigenvectors.T
    return root


def _float64(name: str, value: Tensor, shape: tuple[int, ...]) -> Tensor:
    if value.shape != shape:
        raise ValueError(
            f"`{name}` must have shape {shape}, got {tuple(value.shape)}: give both sides moments "
            f"of the same features."
        )
    check_real_and_finite(f"`{name}`", value)
    return value.to(_float64_device(value.device)).double()


def _float64_device(device: torch.device) -> torch.device:
    return torch.device("cpu") if device.type == "mps" else device


def check_real_and_finite(name: str, values: Tensor) -> None:
    """Raise if values are complex or not finite.

    Raises:
        ValueError: With the number of values that are not finite.
    """
    if values.is_complex():
        raise ValueError(f"{name} must be real, got {values.dtype}: use torch.view_as_real.")
    wrong = int((~values.isfinite()).sum())
    if wrong:
        raise ValueError(
            f"{name} must be finite, but {wrong} of {values.numel()} values are not: check whether "
            f"the sampler or the network diverged."
        )
