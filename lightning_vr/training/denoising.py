"""How a model calls its network: raw outputs, and the estimate of the clean sample from them."""

import torch
from torch import Tensor, nn

from lightning_vr.core.conditions import Condition
from lightning_vr.core.types import Noised
from lightning_vr.estimators.loss import denoise
from lightning_vr.process.network_calls import NetworkOutput, call_network, class_labels
from lightning_vr.process.objective import Objective
from lightning_vr.process.predictions import PredictionType
from lightning_vr.process.reverse_estimate import ReverseEstimate
from lightning_vr.process.schedules import Schedule
from lightning_vr.process.timesteps import Density
from lightning_vr.process.weightings import Weighting
from lightning_vr.training.upstream import Upstream


class Denoising(Upstream):
    """A network and what it learns."""

    network: nn.Module
    schedule: Schedule
    timesteps: Density
    weighting: Weighting
    prediction: PredictionType
    sigma_data: float

    def predict(self, x: Tensor, noised: Noised) -> Tensor:
        """Call the network on scaled samples ``x (B, *)``; override it for other signatures."""
        return self.predict_with_variance(x, noised).mean

    def predict_with_variance(self, x: Tensor, noised: Noised) -> NetworkOutput:
        """Do what ``predict`` does, and return what is said about the variance, or None, too.

        Override this one in place of ``predict`` where the variance is learned.
        """
        return self.call_network(x, noised.t, noised.group, noised.cond)

    def call_network(
        self, x: Tensor, t: Tensor, group: Tensor | None, cond: Condition | None
    ) -> NetworkOutput:
        """Call the network on scaled samples, unless how it is called is overridden.

        Args:
            x: Scaled samples ``(B, *)``.
            t: Times ``(B,)``.
            group: Class labels ``(B,)``, negative where unconditional; None if all are.
            cond: Further condition of the network.
        """
        time, labels = self.schedule.embedding_time(t), class_labels(group, t, self.num_classes)
        return call_network(self.network, x, time, labels, cond)

    def denoise(
        self,
        xt: Tensor,
        t: Tensor,
        group: Tensor | None = None,
        cond: Condition | None = None,
    ) -> Tensor:
        """Return x0_hat ``(B, *)`` for ``xt (B, *)`` at times ``t (B,)``.

        Args:
            xt: Noised samples.
            t: Times.
            group: Class labels ``(B,)``, negative where unconditional; None if all are.
            cond: Further condition of the network.
        """
        return self.reverse_estimate(xt, t, group, cond).x0

    def reverse_estimate(
        self,
        xt: Tensor,
        t: Tensor,
        group: Tensor | None = None,
        cond: Condition | None = None,
    ) -> ReverseEstimate:
        """Return x0_hat and what the network says about the variance; arguments of ``denoise``."""
        alpha, sigma, weight = self.schedule.alpha(t), self.schedule.sigma(t), torch.ones_like(t)
        noised = Noised(xt, xt, torch.zeros_like(xt), t, alpha, sigma, weight, group, cond)
        outputs: list[NetworkOutput] = []

        def predict(x: Tensor, noised: Noised) -> Tensor:
            outputs.append(self._outputs(x, noised))
            return outputs[0].mean

        x0, v = denoise(predict, noised, self.objective), outputs[0].variance
        return ReverseEstimate(x0, None if v is None else v.to(x0.dtype))

    @property
    def objective(self) -> Objective:
        """The loss as an expectation, whatever estimates it."""
        return Objective(
            self.schedule, self.timesteps, self.weighting, self.prediction, self.sigma_data
        )

    @classmethod
    def overrides_mean_alone(cls) -> bool:
        """Return whether ``predict`` is one's own, and what is said about the variance is not."""
        own = cls.predict is not Denoising.predict
        return own and cls.predict_with_variance is Denoising.predict_with_variance

    @classmethod
    def overrides_predict(cls) -> bool:
        """Return whether how the network is called is one's own."""
        own = cls.predict is not Denoising.predict
        return own or cls.predict_with_variance is not Denoising.predict_with_variance

    def _outputs(self, x: Tensor, noised: Noised) -> NetworkOutput:
        if self.overrides_mean_alone():
            return NetworkOutput(self.predict(x, noised))
        return self.predict_with_variance(x, noised)
