"""A network as an ONNX graph has the numbers of the network."""

import pytest
import torch
from support.diffusers_networks import tiny
from support.networks import small_mlp, small_unet

from lightning_vr import DiffusionModule, export


def check_graph(network, shape, folder):
    """Compare the graph of a network of classes with the network, at another batch size."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    from onnx.reference import ReferenceEvaluator

    module = DiffusionModule(network, num_classes=3)
    module.sample_shape = shape
    export(module, folder, "onnx")
    path = str(folder / "model.onnx")
    onnx.checker.check_model(path)
    x, t = torch.randn(5, *shape), torch.tensor([0.5, 3.0, 40.0, 500.0, 999.0])
    labels = torch.tensor([0, 1, 2, 3, 1])
    given = {"sample": x, "timestep": t, "class_labels": labels}
    graph = ReferenceEvaluator(path)
    assert graph.input_names == list(given)
    (found,) = graph.run(None, {name: value.numpy() for name, value in given.items()})
    with torch.no_grad():
        output = network.eval()(x, t, class_labels=labels)
    wanted = getattr(output, "sample", output)
    assert wanted.std() > 0.01
    torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=1e-4, atol=1e-5)


def test_a_graph_has_the_numbers_of_its_network(tmp_path):
    check_graph(small_mlp(std=0.5, num_class_embeds=4), (2,), tmp_path / "out")


@pytest.mark.slow  # torch takes seconds to trace its layers
def test_a_graph_of_a_unet_has_its_numbers(tmp_path):
    check_graph(small_unet(num_class_embeds=4), (1, 8, 8), tmp_path / "out")


def test_onnx_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_vr.pipelines.onnx_graph.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'pip install "lightning-vr\[onnx\]"'):
        export(DiffusionModule(small_mlp()), tmp_path / "out", "onnx")


def test_a_network_that_needs_a_condition_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_vr.pipelines.onnx_graph.find_spec", lambda name: name)
    module = DiffusionModule(tiny("conditional UNet"))
    module.sample_shape = (2, 8, 8)
    with pytest.raises(
        ValueError, match=r"samples, times and classes alone, got .*: use"
    ) as refusal:
        export(module, tmp_path / "out", "onnx")
    assert "\n" not in str(refusal.value)
