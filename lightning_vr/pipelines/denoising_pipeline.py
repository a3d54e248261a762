"""A pipeline of diffusers for what its own do not sample: classes, latents, EDM's preconditioning.

One loop over the timesteps of any scheduler: scale the input, call the network, step. The network
gets ``time_scale * t + time_shift`` for the scheduler's timestep t, which is t itself but for
networks with EDM's preconditioning: there t is log(sigma) / 4. What a network of twice the channels
says about the variance goes to schedulers that have a learned one, and is left out for others.

This file is saved beside the weights, so that it needs torch and diffusers alone.
"""

import inspect
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

_Pipeline: Any = DiffusionPipeline
"""As a type it has none of its methods."""


class DenoisingPipeline(_Pipeline):  # type: ignore[misc]
    """Samples from a network and a scheduler.

    Args:
        scheduler: Any scheduler of diffusers that takes the network's output.
        unet: The network, if it is a U-Net.
        transformer: The network, if it is a transformer.
        vae: The autoencoder whose latents are sampled, if they are decoded.
        shape: Shape of one sample, channels first.
        num_classes: Number of classes, or None. The label of that number stands for no class.
        label_dropout: Fraction of labels that training dropped; without it each sample has a class.
        null_is_zeros: Whether zeros stand for further arguments of the network that are left out.
        is_latent: Whether samples are no pictures in [-1, 1], but what a decoder of one's own
            takes.
        latent_shift: What is added to latents, after their scale, for the autoencoder: a number, or
            one for each channel.
        latent_scale: What latents are divided by for that.
        time_scale: Factor on the scheduler's timesteps for the network.
        time_shift: What is added to that.
        noise_levels: Noise levels of EDM's scheduler in place of its own, for as many steps.
        num_inference_steps: Steps where none are given.
        guidance_scale: Scale of classifier-free guidance where none is given; 1 is none.
    """

    _optional_components = ["unet", "transformer", "vae"]  # noqa: RUF012  # as diffusers has it

    def __init__(
        self,
        scheduler: Any,
        unet: Any = None,
        transformer: Any = None,
        vae: Any = None,
        shape: list[int] | None = None,
        num_classes: int | None = None,
        label_dropout: float = 0.0,
        null_is_zeros: bool = False,
        is_latent: bool = False,
        latent_shift: list[float] | None = None,
        latent_scale: list[float] | None = None,
        time_scale: float = 1.0,
        time_shift: float = 0.0,
        noise_levels: list[float] | None = None,
        num_inference_steps: int = 18,
        guidance_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.register_modules(scheduler=scheduler, unet=unet, transformer=transformer, vae=vae)
        self.register_to_config(
            shape=shape,
            num_classes=num_classes,
            label_dropout=label_dropout,
            null_is_zeros=null_is_zeros,
            is_latent=is_latent,
            latent_shift=latent_shift,
            latent_scale=latent_scale,
            time_scale=time_scale,
            time_shift=time_shift,
            noise_levels=noise_levels,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
        )

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        class_labels: list[int] | Tensor | None = None,
        cond: dict[str, Any] | None = None,
        null_cond: dict[str, Any] | None = None,
        guidance_scale: float | None = None,
        num_inference_steps: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str | None = None,
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Return samples.

        Args:
            batch_size: Number of samples.
            class_labels: A class for each sample, or None for samples without a class.
            cond: Further arguments of the network, of ``batch_size`` rows each.
            null_cond: What stands for them in guidance, of as many rows; zeros where training had
                zeros.
            guidance_scale: Scale of classifier-free guidance; 1 is none.
            num_inference_steps: Number of steps of the scheduler.
            generator: Generator of the noise.
            latents: Standard normal noise to begin with ``(batch_size, *shape)``.
            output_type: ``"pil"``, ``"np"``, ``"pt"``, or ``"latent"`` for samples as they are.
            return_dict: Whether to return an object with ``images``, or a tuple.
        """
        guidance = self.config.guidance_scale if guidance_scale is None else guidance_scale
        labels, device = self._labels(class_labels, batch_size), self._execution_device
        asked, null = (labels, cond), None
        if guidance != 1:
            null = (self._null_labels(batch_size), self._null_cond(cond, null_cond))
        self._set_timesteps(num_inference_steps or self.config.num_inference_steps, device)
        takes = inspect.signature(self.scheduler.step).parameters
        options = {"generator": generator} if "generator" in takes else {}
        x = self._noise(batch_size, latents, generator) * self._largest_noise_level()

        for t in self.progress_bar(self.scheduler.timesteps):
            output = self._output(x, t, asked, null, guidance)
            x = self.scheduler.step(output, t, x, **options).prev_sample

        images = self._finish(x, output_type or ("latent" if self.config.is_latent else "pil"))
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _set_timesteps(self, steps: int, device: torch.device) -> None:
        self.scheduler.set_timesteps(steps, device=device)
        given = self.config.noise_levels
        is_edm = hasattr(self.scheduler, "precondition_noise")
        if given is None or steps != len(given) or not is_edm:
            return
        # the scheduler's own `sigmas` are no noise levels, but fractions of a Karras grid
        levels = torch.tensor(given, dtype=torch.float32)
        self.scheduler.timesteps = self.scheduler.precondition_noise(levels).to(device)
        self.scheduler.sigmas = torch.cat([levels, levels.new_zeros(1)])

    def _noise(self, count: int, given: Tensor | None, generator: Any) -> Tensor:
        size = (count, *self.config.shape)
        if given is None:
            device = self._execution_device
            drawn: Tensor = randn_tensor(
                size, generator=generator, device=device, dtype=torch.float32
            )
            return drawn
        if tuple(given.shape) != size:
            raise ValueError(
                f"`latents` must have the shape {size}, got {tuple(given.shape)}: give noise of "
                f"that shape, or leave it out."
            )
        return given

    def _largest_noise_level(self) -> float:
        if type(self.scheduler).__name__ == "EDMEulerScheduler":
            # its `init_noise_sigma` adds the variance of data whose standard deviation is 1
            return float(self.scheduler.sigmas[0])
        return float(getattr(self.scheduler, "init_noise_sigma", 1.0))  # flows have none

    def _output(self, x: Tensor, t: Tensor, asked: Any, null: Any, guidance: float) -> Tensor:
        """Return what the scheduler takes; guidance leaves the variance as it is asked for."""
        scaled, channels = self._scaled(x, t), x.shape[1]
        output = self._call(scaled, t, *asked)
        mean, variance = output[:, :channels], output[:, channels:]
        if guidance != 1:
            mean = torch.lerp(self._call(scaled, t, *null)[:, :channels], mean, guidance)
        is_learned = self.scheduler.config.get("variance_type") in ("learned", "learned_range")
        return torch.cat([mean, variance], dim=1) if is_learned else mean

    def _scaled(self, x: Tensor, t: Tensor) -> Tensor:
        scale = getattr(self.scheduler, "scale_model_input", None)
        scaled: Tensor = x if scale is None else scale(x, t)
        return scaled

    def _call(
        self, x: Tensor, t: Tensor, labels: Tensor | None, cond: dict[str, Any] | None
    ) -> Tensor:
        network = self.unet or self.transformer
        names = inspect.signature(network.forward).parameters
        time = self.config.time_scale * t.to(x.device, torch.float32) + self.config.time_shift
        arguments = {next(iter(names)): x.to(network.dtype), "timestep": time.expand(len(x))}
        arguments |= {} if labels is None else {"class_labels": labels}
        output = network(**arguments, **(cond or {}), return_dict=False)[0]
        found: Tensor = output.to(x.dtype)
        return found

    def _labels(self, given: Any, count: int) -> Tensor | None:
        classes = self.config.num_classes
        if given is None:
            return self._null_labels(count)
        found = torch.as_tensor(given, device=self._execution_device)
        if classes is None or found.shape != (count,) or not bool((found < classes).all()):
            raise ValueError(
                f"`class_labels` must be {count} classes below {classes or 0}, got {given}: give "
                f"one for each of `batch_size` samples."
            )
        return found.long()

    def _null_labels(self, count: int) -> Tensor | None:
        classes = self.config.num_classes
        if classes is None:
            return None
        if self.config.label_dropout == 0:
            raise ValueError(
                "`class_labels` must be given, and `guidance_scale` be 1, for a network that was "
                "trained with a class for each sample, got others: give them."
            )
        return torch.full((count,), classes, device=self._execution_device)

    def _null_cond(self, cond: Any, given: Any) -> Any:
        if cond is None or given is not None:
            return given
        if not self.config.null_is_zeros:
            raise ValueError(
                "`null_cond` must be given with a `guidance_scale` other than 1, to stand for "
                "`cond`, got None: give the embedding of no text, or use 1."
            )
        return _zeros(cond)

    def _finish(self, x: Tensor, output_type: str) -> Any:
        if output_type == "latent":
            return x
        if self.vae is not None:
            scale, shift = (
                x.new_tensor(each).reshape(1, -1, 1, 1)
                for each in (self.config.latent_scale, self.config.latent_shift)
            )
            x = self.vae.decode((x / scale + shift).to(self.vae.dtype)).sample.to(x.dtype)
        images = (x / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return images
        pixels = images.cpu().permute(0, 2, 3, 1).float().numpy()
        return pixels if output_type == "np" else self.numpy_to_pil(pixels)


def _zeros(cond: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _zeros(value) if isinstance(value, dict) else torch.zeros_like(value)
        for name, value in cond.items()
    }
