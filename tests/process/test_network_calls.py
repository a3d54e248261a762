"""Each kind of network is called as its own library calls it."""

import gc
import weakref

import diffusers
import pytest
import torch
from support.diffusers_networks import KINDS, WITH_LABELS, WITH_VARIANCE, condition, shape_of, tiny
from torch import nn

from lightning_vr.process.calling_conventions import NetworkCall
from lightning_vr.process.network_calls import call_network
from lightning_vr.process.packed_latents import pack, unpack

LABELS = torch.tensor([0, 2, 3])
TIMES = torch.tensor([0.25, 400.5, 999.0])


def by_hand(kind, network, x, cond):
    """Call a network with arguments written out for its class."""
    cond = cond or {}
    if kind == "MLP":
        return network(x, TIMES)
    if kind == "UNet":
        return network(x, TIMES, class_labels=LABELS).sample
    if kind in ("conditional UNet", "UNet of SDXL"):
        return network(sample=x, timestep=TIMES, **cond).sample
    if kind == "DiT":
        return network(hidden_states=x, timestep=TIMES, class_labels=LABELS).sample
    if kind in ("PixArt", "SD3"):
        return network(hidden_states=x, timestep=TIMES, **cond).sample
    tokens = torch.stack(
        [
            torch.stack([x[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].flatten(1)], dim=1)
            for i in range(4)
            for j in range(4)
        ],
        dim=1,
    ).flatten(1, 2)
    places = torch.tensor([[0.0, i, j] for i in range(4) for j in range(4)])
    found = network(
        hidden_states=tokens,
        timestep=TIMES / 1000,
        img_ids=places,
        txt_ids=torch.zeros(3, 3),
        **cond,
    ).sample
    output = torch.empty_like(x)
    for number, token in enumerate(found.unbind(1)):
        i, j = divmod(number, 4)
        output[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2] = token.reshape(3, 2, 2, 2)
    return output


def test_how_a_network_is_called_is_forgotten_with_it():
    network = tiny("MLP")
    assert NetworkCall.of(network) is NetworkCall.of(network)
    kept = weakref.ref(network)
    del network
    gc.collect()
    assert kept() is None


@pytest.mark.parametrize("kind", KINDS)
def test_the_output_is_bitwise_that_of_a_direct_call(kind, source):
    network, cond = tiny(kind).eval(), condition(kind, 3)
    x = torch.randn(3, *shape_of(kind), generator=source)
    labels = LABELS if kind in WITH_LABELS else None

    with torch.no_grad():
        found = call_network(network, x, TIMES, labels, cond)
        expected = by_hand(kind, network, x, cond)

    assert float(expected.std()) > 0.01
    if kind in WITH_VARIANCE:
        assert torch.equal(torch.cat(found, dim=1), expected)
    else:
        assert torch.equal(found.mean, expected)
        assert found.variance is None


def test_a_network_in_16_bits_gets_conditions_in_16_bits_and_times_in_32(source):
    kind = "UNet of SDXL"
    network, cond = tiny(kind).eval().to(torch.bfloat16), condition(kind, 3)
    x = torch.randn(3, *shape_of(kind), generator=source)
    seen = []
    network.time_proj.register_forward_pre_hook(lambda _, given: seen.append(given[0]))

    with torch.no_grad():
        found = call_network(network, x, TIMES, None, cond).mean

    assert found.dtype == torch.bfloat16
    assert torch.equal(seen[0], TIMES)
    wide = by_hand(kind, tiny(kind).eval(), x, cond)
    torch.testing.assert_close(found.float(), wide, atol=0.05, rtol=0.05)


def test_packing_is_undone_by_unpacking(source):
    x = torch.randn(2, 3, 4, 6, generator=source)
    assert torch.equal(unpack(pack(x), 4, 6), x)
    with pytest.raises(ValueError, match=r"even height and width .* got \(3, 4, 5\): crop or pad"):
        pack(x[..., :5])


@pytest.mark.parametrize(
    ("name", "convention"),
    {
        "UNet2DModel": "plain",
        "UNet2DConditionModel": "plain",
        "UNet3DConditionModel": "plain",
        "DiTTransformer2DModel": "DiT",
        "PixArtTransformer2DModel": "PixArt",
        "SD3Transformer2DModel": "SD3",
        "FluxTransformer2DModel": "Flux",
    }.items(),
)
def test_the_convention_of_a_class_is_known_from_its_signature(name, convention):
    assert NetworkCall.of_class(getattr(diffusers, name), {}).convention == convention


@pytest.mark.parametrize(
    "name",
    [
        "AuraFlowTransformer2DModel",  # counts time from 0 to 1
        "BriaTransformer2DModel",  # as Flux, and counts time to a thousand
        "ChromaTransformer2DModel",
        "Flux2Transformer2DModel",
        "Lumina2Transformer2DModel",  # counts time the other way round
        "QwenImageTransformer2DModel",
        "WanTransformer3DModel",
    ],
)
def test_other_transformers_are_not_guessed_at(name):
    with pytest.raises(ValueError, match=rf"`network` must take the call {name}\(x, t\), or .*`pr"):
        NetworkCall.of_class(getattr(diffusers, name), {})


@pytest.mark.parametrize("kind", [kind for kind in KINDS if condition(kind, 1)])
def test_a_condition_that_is_missing_is_named(kind, source):
    network, cond = tiny(kind), condition(kind, 3)
    x = torch.randn(3, *shape_of(kind), generator=source)
    for name in cond:
        rest = {key: value for key, value in cond.items() if key != name}
        with pytest.raises(
            ValueError, match=rf"`cond` must hold `{name}`, which .* override `encode` .* `predict`"
        ):
            call_network(network, x, TIMES, None, rest)


def test_the_shape_of_a_condition_that_does_not_fit_is_told(source):
    kind = "conditional UNet"
    x = torch.randn(3, *shape_of(kind), generator=source)
    text = torch.randn(3, 5, 3, generator=source)
    said = r"with the condition `encoder_hidden_states` of shape \(5, 3\), but UNet2D"
    with pytest.raises(ValueError, match=said):
        call_network(tiny(kind), x, TIMES, cond={"encoder_hidden_states": text})


def test_a_condition_that_the_network_does_not_take_is_named(source):
    x = torch.randn(3, *shape_of("conditional UNet"), generator=source)
    cond = condition("conditional UNet", 3) | {"text": x}
    with pytest.raises(ValueError, match=r"arguments of UNet2DConditionModel.* got `text`: rename"):
        call_network(tiny("conditional UNet"), x, TIMES, None, cond)
    with pytest.raises(ValueError, match=r"ResidualMLP, which takes class_labels, got `timestep`"):
        call_network(tiny("MLP"), x[:, 0, 0, :2], TIMES, None, {"timestep": TIMES})


def test_a_network_with_arguments_of_any_name_takes_any_condition(source):
    class Any(nn.Module):
        def forward(self, *args, **kwargs):
            return args[0] * kwargs["scale"]

    x = torch.randn(3, 2, generator=source)
    found = call_network(Any(), x, TIMES, None, {"scale": torch.full((3, 1), 2.0)})
    assert torch.equal(found.mean, 2 * x)


@pytest.mark.parametrize(
    ("kind", "mapping"),
    {
        "MLP": "ResidualMLP is called as (x=x, t=t)",
        "UNet": "UNet2DModel is called as (sample=x, timestep=t, class_labels=labels)",
        "UNet of SDXL": 'UNet2DConditionModel is called as (sample=x, timestep=t, encoder_hidden_states=cond["encoder_hidden_states"], added_cond_kwargs=cond["added_cond_kwargs"])',  # noqa: E501
        "DiT": "DiTTransformer2DModel is called as (hidden_states=x, timestep=t, class_labels=labels)",  # noqa: E501
        "Flux": 'FluxTransformer2DModel is called as (hidden_states=tokens of x, timestep=t / 1000, encoder_hidden_states=cond["encoder_hidden_states"], pooled_projections=cond["pooled_projections"], guidance=cond["guidance"], img_ids=places of the tokens, txt_ids=zeros)',  # noqa: E501
    }.items(),
)
def test_the_mapping_says_what_goes_into_which_argument(kind, mapping):
    call = NetworkCall.of(tiny(kind))
    assert call.mapping(has_labels=kind in WITH_LABELS) == mapping
