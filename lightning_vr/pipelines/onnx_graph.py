"""The network as an ONNX graph: ``(sample (B, *), timestep (B,), class_labels) -> output``."""

import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_vr.core.devices import device_of, dtype_of
from lightning_vr.training.diffusion import Diffusion

_NEEDS = ("onnx", "onnxscript")


class _Call(nn.Module):
    """A network whose output is a tensor."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(
        self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None
    ) -> Tensor:
        labels = {} if class_labels is None else {"class_labels": class_labels}
        output: Any = self.network(sample, timestep, **labels)
        found: Tensor = (
            output[0] if isinstance(output, tuple) else getattr(output, "sample", output)
        )
        return found


def check_onnx() -> None:
    """Raise if what torch exports graphs with is not installed.

    Raises:
        ValueError: With what to install.
    """
    missing = [name for name in _NEEDS if find_spec(name) is None]
    if missing:
        raise ValueError(
            f"`format` onnx needs {' and '.join(missing)}, which are not installed: pip install "
            f'"lightning-vr[onnx]".'
        )


def save_onnx(model: Diffusion, network: nn.Module, path: Path) -> None:
    """Write the graph of a network, for batches of any size.

    Args:
        model: The model of the network, which knows the shape of samples.
        network: The network.
        path: The file.

    Raises:
        ValueError: If the model has seen no data, or the network needs a further condition.
    """
    if model.sample_shape is None or type(model).predict is not Diffusion.predict:
        raise ValueError(
            f"`format` onnx needs a trained model without a `predict` of its own, got a "
            f"{type(model).__name__}: train it, or use the format safetensors."
        )
    device, batch = device_of(network), torch.export.Dim("batch", min=1)
    inputs: dict[str, Tensor] = {
        "sample": torch.zeros(2, *model.sample_shape, device=device, dtype=dtype_of(network)),
        "timestep": torch.full((2,), 1.0, device=device),
    }
    if model.num_classes is not None:
        inputs["class_labels"] = torch.zeros(2, dtype=torch.int64, device=device)
    call = _Call(network).eval()
    try:
        with torch.no_grad():
            call(**inputs)
    except TypeError as error:
        raise ValueError(
            f"`format` onnx is for networks that take samples, times and classes alone, got a "
            f"{type(network).__name__} ({error}): use the format safetensors."
        ) from error
    with torch.no_grad(), warnings.catch_warnings():
        # of torch's own exporter
        warnings.simplefilter("ignore")
        torch.onnx.export(
            call,
            (),
            str(path),
            kwargs=inputs,
            input_names=list(inputs),
            output_names=["output"],
            dynamic_shapes={name: {0: batch} for name in inputs},
            dynamo=True,
            verbose=False,
        )
