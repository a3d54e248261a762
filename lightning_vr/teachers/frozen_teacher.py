"""A frozen diffusion model that teaches something else: a scene, a generator, another model.

What pipelines ask of it is the residual of its noise prediction at a draw ``x_t = alpha x0 + sigma
noise``. With a network output o of prediction type ``p x0 + q noise`` (``process.predictions``),

    eps_hat - noise = alpha / sigma (x0 - x0_hat) = alpha (p x0 + q noise - o) / (sigma p - alpha q)

whose right-hand side has no difference of nearly equal numbers at low noise. Classifier-free
guidance extrapolates the output, ``o = o_null + guidance (o_cond - o_null)``, by one call of the
network on both halves. ``guidance`` is the ``guidance_scale`` of diffusers' samplers; threestudio's
score distillation adds ``s (text - null)`` to the text's prediction, so that its s is
``guidance - 1``.

The network is in evaluation mode, has no gradients, is in no checkpoint, in no optimizer and in no
average of weights, and follows the device of the module that owns the teacher. Its dtype is its
own, whatever the precision of a run.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_vr.core.conditions import Condition
from lightning_vr.core.rows import concatenated, mapped, tensors
from lightning_vr.core.shared_model import SharedModel
from lightning_vr.core.types import UNLABELLED, Noised
from lightning_vr.core.validation import check_finite_number
from lightning_vr.process.diffusers_autoencoder import Autoencoder, AutoencoderFolder
from lightning_vr.process.network_dtype import InDtype, NetworkDtype
from lightning_vr.process.objective import Objective
from lightning_vr.process.predictions import Prediction, PredictionType
from lightning_vr.process.predictions import prediction as prediction_of
from lightning_vr.process.schedules import Schedule, expand
from lightning_vr.process.timesteps import Density
from lightning_vr.process.weightings import Weighting
from lightning_vr.teachers.negative_condition import NEGATIVE, split_negative
from lightning_vr.training.diffusion import Diffusion
from lightning_vr.training.guidance import check_guidance
from lightning_vr.training.upstream import NullCondition

_KNOWN_DROPOUT = 0.1
"""A network with an embedding for dropped labels is taken to have seen some."""


class FrozenTeacher(nn.Module):
    """A frozen diffusion model.

    It takes the network over: the network's gradients are switched off, and its mode is set.

    Args:
        network: The network, called as in a ``Diffusion``.
        schedule: The schedule that it was trained with, or a scheduler of diffusers.
        prediction: What it predicts.
        sigma_data: Standard deviation of its data, for the preconditioning of ``"edm"``.
        num_classes: Number of class labels that it knows; its embedding has one more.
        guidance: Scale of classifier-free guidance; 1 is none.
        null_cond: What stands for no condition where a call brings no negative one: ``"zeros"``, or
            a row of numbers for each name.
        timesteps: Density of t that it was trained with; the schedule's usual one if not given.
        vae: The autoencoder whose latents it knows.
        dtype: The dtype of its weights; the one that they have if not given.

    Raises:
        ValueError: If the parts do not go together.
    """

    _device: Tensor

    def __init__(
        self,
        network: nn.Module,
        schedule: Schedule,
        prediction: PredictionType = "epsilon",
        *,
        sigma_data: float = 0.5,
        num_classes: int | None = None,
        guidance: float = 1.0,
        null_cond: NullCondition = None,
        timesteps: Density | None = None,
        vae: Autoencoder | None = None,
        dtype: NetworkDtype | None = None,
    ) -> None:
        super().__init__()
        model = Diffusion(
            network,
            schedule,
            prediction,
            timesteps,
            sigma_data=sigma_data,
            num_classes=num_classes,
            label_dropout=0.0 if num_classes is None else _KNOWN_DROPOUT,
            null_cond=null_cond,
        )
        self._hold(model, guidance, vae, dtype)

    @classmethod
    def from_module(
        cls,
        module: Diffusion,
        *,
        guidance: float = 1.0,
        vae: Autoencoder | None = None,
        dtype: NetworkDtype | None = None,
    ) -> "FrozenTeacher":
        """Return a teacher of a copy of a model, with the weights that it has now.

        What the model overrides, such as ``predict``, counts.

        Args:
            module: The model, which may go on training.
            guidance: As for the class.
            vae: As for the class.
            dtype: As for the class.

        Raises:
            ValueError: If the model was never trained without what guidance leaves out.
        """
        return cls._of(copy.deepcopy(module), guidance, vae, dtype)

    @classmethod
    def from_checkpoint(
        cls,
        path: Any,
        *,
        guidance: float = 1.0,
        vae: Autoencoder | None = None,
        dtype: NetworkDtype | None = None,
        trust: Sequence[str] = (),
        **settings: Any,
    ) -> "FrozenTeacher":
        """Return the teacher in a checkpoint of a ``DiffusionModule``: of averaged weights if any.

        Args:
            path: The checkpoint.
            guidance: As for the class.
            vae: As for the class.
            dtype: As for the class.
            trust: Packages whose classes may be imported and built.
            **settings: Arguments of the module in place of the checkpoint's, such as ``network``.

        Raises:
            ValueError: If the checkpoint does not rebuild its module.
        """
        from lightning_vr.training.module import DiffusionModule  # which needs Lightning

        module = DiffusionModule.load_from_checkpoint(path, "cpu", trust=trust, **settings)
        return cls._of(module, guidance, vae, dtype)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        guidance: float = 1.0,
        dtype: NetworkDtype | None = None,
        **settings: Any,
    ) -> "FrozenTeacher":
        """Return the teacher in a folder of diffusers, with the autoencoder in its ``vae`` if any.

        Network, scheduler and autoencoder are read from their subfolders alone. Nothing is
        downloaded, and no text encoder is needed: conditions are given as embeddings.

        Args:
            folder: What a pipeline's ``save_pretrained``, or ``export``, wrote.
            guidance: As for the class.
            dtype: The dtype of the weights; float32 if not given.
            **settings: Further arguments of the class, which count before those of the folder.

        Raises:
            ValueError: If there is no network or scheduler, or if weights are missing.
        """
        from lightning_vr.training.incoming_folder import IncomingFolder  # which needs Lightning

        found, kind = IncomingFolder.read(folder), dtype or "float32"
        given = {name: x for name, x in found.objective.items() if name != "label_dropout"}
        if (Path(folder).expanduser() / "vae" / "config.json").is_file():
            given["vae"] = Autoencoder(AutoencoderFolder(str(folder), "vae", kind))
        return cls(found.load_network(kind), guidance=guidance, **(given | settings))

    @property
    def model(self) -> Diffusion:
        """The model, on the device of the teacher."""
        found: Diffusion = self._shared.on(self._device.device)
        return found

    def encode(self, images: Tensor, source: torch.Generator | None = None) -> Tensor:
        """Return latents ``(B, *)`` of images in [-1, 1], with a graph; images if there is no vae.

        Args:
            images: Images ``(B, C, H, W)``.
            source: Generator of draws from the latents' posterior; its mean if not given.
        """
        if self.vae is None:
            return images
        mean, std = self.vae.posterior(images)
        if source is None:
            return mean
        noise = torch.randn(mean.shape, generator=source, device=mean.device, dtype=mean.dtype)
        return mean + std * noise

    def objective(
        self,
        weighting: Weighting,
        time_range: tuple[float, float],
        prediction: PredictionType = "epsilon",
    ) -> Objective:
        """Return weight and times of an expectation over the teacher's residuals.

        Args:
            weighting: The weight.
            time_range: Quantiles of the teacher's density of t between which times are drawn;
                fractions of the timesteps where these are discrete.
            prediction: In whose space the residual is that is weighted.

        Raises:
            ValueError: If the quantiles are not in order.
        """
        low, high = time_range
        if not 0 <= low < high <= 1:
            raise ValueError(
                f"`time_range` must be two fractions low < high between 0 and 1, got {low} and "
                f"{high}: use (0.02, 0.98)."
            )
        model = self.model
        return Objective(model.schedule, model.timesteps.between(low, high), weighting, prediction)

    @torch.no_grad()
    def noise_residual(self, noised: Noised, guidance: float | None = None) -> Tensor:
        """Return the noise prediction less the noise ``(n, *)``, without cancellation.

        Args:
            noised: Draws. Beside each name of the condition, ``cond`` may hold the same with
                ``negative_`` before it: what guidance leads away from.
            guidance: Used in place of the teacher's own.

        Raises:
            ValueError: If guidance has nothing to lead away from.
        """
        output = self._output(noised, guidance)
        if self.model.prediction == "epsilon":
            return output - noised.noise
        c = self._coefficients(noised)
        exact = expand(c.p, output) * noised.x0 + expand(c.q, output) * noised.noise
        factor = -noised.alpha / noised.sigma * c.b
        return expand(factor, output) * (output - exact)

    @torch.no_grad()
    def denoise(self, noised: Noised, guidance: float | None = None) -> Tensor:
        """Return x0_hat ``(n, *)``; arguments as for ``noise_residual``."""
        return self._coefficients(noised).x0_hat(noised.xt, self._output(noised, guidance))

    @classmethod
    def _of(cls, model: Diffusion, *settings: Any) -> "FrozenTeacher":
        teacher = cls.__new__(cls)
        nn.Module.__init__(teacher)
        teacher._hold(model, *settings)
        return teacher

    def _hold(
        self,
        model: Diffusion,
        guidance: float,
        vae: Autoencoder | None,
        dtype: NetworkDtype | None,
    ) -> None:
        check_finite_number("guidance", guidance)
        # what stands for no condition may come with each call
        check_guidance(guidance, model.num_classes, model.label_dropout, has_null_cond=True)
        if dtype is not None:
            InDtype(model.network, dtype)
        self.guidance, self.vae = guidance, vae
        self._shared = SharedModel(model.requires_grad_(False).eval())
        self.register_buffer("_device", torch.zeros(()), persistent=False)

    def _coefficients(self, noised: Noised) -> Prediction:
        model, scales = self.model, (noised.alpha, noised.sigma)
        return prediction_of(model.prediction, model.schedule, noised.t, model.sigma_data, scales)

    def _output(self, noised: Noised, guidance: float | None) -> Tensor:
        """Return the network's output ``(n, *)``, guided, in float32 or better."""
        scale = self.guidance if guidance is None else guidance
        model, xt, (cond, negative) = self.model, noised.xt, split_negative(noised.cond)
        given = replace(noised, cond=cond, group=noised.group if model.num_classes else None)
        is_scaled = model.prediction == "edm"
        x = expand(self._coefficients(noised).input_scale, xt) * xt if is_scaled else xt
        with torch.autocast(xt.device.type, enabled=False):
            if scale == 1:
                return model.predict(x, given).to(xt.dtype)
            rows = [tensors(self._null(given, negative, scale)), tensors(given)]
            both = model.predict(torch.cat([x, x]), Noised(**concatenated(rows))).to(xt.dtype)
        null, conditional = both.chunk(2)
        return torch.lerp(null, conditional, scale)

    def _null(self, noised: Noised, negative: Condition | None, scale: float) -> Noised:
        """Return draws without what they are conditioned on."""
        if noised.group is None and noised.cond is None:
            raise ValueError(
                f"`guidance` must be 1 for draws without labels and without a condition, got "
                f"{scale:g}: give `group` or `cond`, or use guidance 1."
            )
        group = None if noised.group is None else torch.full_like(noised.group, UNLABELLED)
        if noised.cond is None or negative is not None:
            return replace(noised, group=group, cond=negative)
        if not self.model.has_null_cond:
            name = next(iter(noised.cond))
            raise ValueError(
                f"`cond` must hold {NEGATIVE + name!r} beside {name!r} with guidance {scale:g}, "
                f"got {sorted(noised.cond)}: give the embedding of an empty or a negative prompt, "
                f"or a `null_cond` of the teacher."
            )
        null, count = self.model.null_condition(noised.cond), len(noised.t)
        assert null is not None
        return replace(
            noised, group=group, cond=mapped(null, lambda x: x.expand(count, *x.shape[1:]))
        )
