import torch
from torch import nn

from lightning_vr.core.devices import device_of, dtype_of


def test_the_dtype_is_that_of_the_first_floating_point_tensor():
    counted = nn.Linear(2, 2, dtype=torch.float16)
    counted.register_parameter("none", None)
    counted.register_buffer("count", torch.zeros((), dtype=torch.int64))
    network = nn.Sequential(nn.Identity(), nn.Sequential(counted), nn.Linear(2, 2))
    assert dtype_of(network) == next(network.parameters()).dtype == torch.float16
    assert dtype_of(network.double()) == torch.float64


def test_a_module_without_parameters_has_the_dtype_of_its_buffers():
    module = nn.Module()
    assert dtype_of(module) == torch.get_default_dtype()
    assert device_of(module) == torch.device("cpu")
    module.register_buffer("count", torch.zeros((), dtype=torch.int64, device="meta"))
    module.register_buffer("scale", torch.zeros((), dtype=torch.float64))
    assert dtype_of(module) == torch.float64
    assert device_of(module) == torch.device("meta")
