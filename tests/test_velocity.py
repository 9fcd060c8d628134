"""lib/velocity.py: any montage and length, at first the encoder and nothing else, and the same with less memory."""

import math

import pytest
import torch

from lib.conditions import Condition
from lib.models import Architecture, build_encoder
from lib.velocity import Shape, Velocity, build_velocity, describe, rebuild, strides

CONDITIONS = [Condition("label", ("a", "b", "c")), Condition("speed"), Condition("level")]


def network(kind: str = "transformer", patch: int = 20, **shape) -> Velocity:
    torch.manual_seed(0)
    return build_velocity(Architecture(kind, 32, 2, 2, 100.0, patch), CONDITIONS, Shape((8, 16), 3, **shape))


def disturbed(net: Velocity) -> Velocity:
    """The network after some training, as far as its zeros go."""
    torch.manual_seed(1)
    with torch.no_grad():
        for layer in (net.modulate, net.last):
            layer.weight.normal_(0, 0.3)
            layer.bias.normal_(0, 0.3)
    return net


def inputs(b: int = 3, c: int = 4, t: int = 60) -> tuple:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(b, c, t, generator=generator)
    code = torch.tensor([[0.0, 0.5, 1.0], [2.0, math.nan, -1.0], [math.nan] * 3])[:b]
    return x, torch.linspace(0.1, 0.9, b), code, 0.1 * torch.randn(b, c, 3, generator=generator)


@pytest.mark.parametrize("kind", ["transformer", "mamba", "fno", "hybrid"])
def test_a_clean_window_without_conditions_always_gets_the_encoder_s_features(kind):
    net = disturbed(network(kind))
    x_BCT, _, _, positions = inputs()
    z_BND, grid = net.encoder.tokens(x_BCT, positions)
    clean = net.modulations(torch.ones(3), torch.full((3, 3), math.nan), 4)[2]
    assert torch.allclose(net.mix(z_BND, grid, clean), net.encoder(x_BCT, positions), atol=1e-5)
    noisy = net.modulations(torch.full((3,), 0.3), torch.full((3, 3), math.nan), 4)[2]
    assert not torch.allclose(net.mix(z_BND, grid, noisy), net.encoder(x_BCT, positions), atol=1e-2)


@pytest.mark.parametrize("kind", ["transformer", "mamba", "fno", "hybrid"])
def test_at_first_no_modulation_changes_the_encoder_and_the_output_is_zero(kind):
    net = network(kind)
    x, t, code, positions = inputs()
    out_BCT, _ = net(x, t, code, positions)
    assert torch.equal(out_BCT, torch.zeros_like(x))
    z_BND, grid = net.encoder.tokens(x, positions)
    assert torch.allclose(net.mix(z_BND, grid, net.modulations(t, code, 4)[2]), net.encoder(x, positions), atol=1e-5)


@pytest.mark.parametrize(("channels", "samples"), [(1, 20), (1, 1024), (5, 63), (12, 7)])
def test_any_number_of_channels_and_samples(channels, samples):
    net = disturbed(network())
    x, t, code, positions = inputs(2, channels, samples)
    out_BCT, z_BND = net(x, t, code, positions)
    assert (
        out_BCT.shape == x.shape and z_BND.shape == (2, channels * -(-samples // 20), 32) and out_BCT.isfinite().all()
    )


def test_order_of_channels_and_masked_ones_change_nothing():
    net = disturbed(network())
    x, t, code, positions = inputs()
    out_BCT, _ = net(x, t, code, positions)
    order = [2, 0, 3, 1]
    assert torch.allclose(net(x[:, order], t, code, positions[:, order])[0], out_BCT[:, order], atol=1e-4)
    mask = torch.tensor([[True, True, True, False]]).repeat(3, 1)
    other = x.clone()
    other[:, 3] = 100.0
    without, _ = net(x[:, :3], t, code, positions[:, :3])
    assert torch.allclose(net(other, t, code, positions, mask)[0][:, :3], without, atol=1e-4)


def test_every_parameter_but_the_embedding_gets_a_gradient():
    net = disturbed(network())
    x, t, code, positions = inputs()
    net(x, t, code, torch.where(torch.arange(4)[:, None] == 0, math.nan, positions))[0].square().sum().backward()
    without = {name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().max() > 0}
    assert all(name.startswith("encoder.embed.") for name in without)


def test_checkpointing_gives_the_same_gradient():
    net = disturbed(network())
    gradients = []
    for net.checkpointing in (False, True):
        net.zero_grad()
        net(*inputs())[0].square().sum().backward()
        gradients.append({n: p.grad for n, p in net.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.allclose(gradients[0][n], gradients[1][n], rtol=1e-4, atol=1e-5) for n in gradients[0])


def test_conditions_level_and_time_all_matter_and_null_is_no_class():
    net = disturbed(network(look=True))
    x, t, _, positions = inputs(1)
    seen = torch.zeros(1, 32)

    def out(code, t=t, seen=seen):
        return net(x, t, torch.tensor([code]), positions, None, seen)[0]

    base = out([0.0, 0.0, 0.0])
    null = math.nan
    for other in (
        [1.0, 0.0, 0.0],
        [null, 0.0, 0.0],
        [0.0, 1.0, 0.0],
        [0.0, null, 0.0],
        [0.0, 0.0, 1.0],
        [0.0, 0.0, null],
    ):
        assert not torch.allclose(out(other), base, atol=1e-3)
    assert not torch.allclose(out([0.0] * 3, t + 0.2), base, atol=1e-3)
    assert not torch.allclose(out([0.0] * 3, t, seen + 1), base, atol=1e-3)
    assert torch.equal(out([0.0] * 3, t, None), base)  # samples have no features, half of the training windows zeros


@pytest.mark.parametrize(
    ("patch", "expected"), [(64, [4, 4, 4]), (16, [4, 4]), (100, [5, 5, 4]), (50, [5, 5, 2]), (13, [13])]
)
def test_a_patch_is_divided_in_stages(patch, expected):
    assert strides(patch) == expected


def test_a_large_prime_is_refused():
    with pytest.raises(ValueError, match="17"):
        strides(34)


def test_it_is_built_again_from_its_description():
    net = disturbed(network())
    again = rebuild(describe(net))
    again.load_state_dict(net.state_dict())
    assert torch.equal(again(*inputs())[0], net(*inputs())[0])


def test_it_keeps_the_weights_of_the_encoder_it_is_given():
    encoder = build_encoder(Architecture("transformer", 32, 2, 2, 100.0, 20))
    net = Velocity(encoder, CONDITIONS, Shape((8,), 3))
    assert net.encoder is encoder
