"""Mamba, FNO, hybrid and the adapters: what must not change their features, what must, and their arithmetic against plain meanings."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lib.batches import Part
from lib.channels import POSITIONS, PROFILES
from lib.errors import Unusable
from lib.fno import Spectral, fourier_basis
from lib.grid import Grid, Pool, take
from lib.hybrid import Attend
from lib.losses import layer_normed, loss_latent
from lib.mamba import Scan, selective_scan
from lib.masks import draw_masks
from lib.models import Architecture, build_encoder, load_encoder, save_encoder
from lib.optim import decay_groups
from lib.perceiver import MONTAGE, Across, spread_montage
from lib.predictor import Predictor

SMALL = dict(d_model=32, layers=2, heads=4, patch=25, rate_hz=100.0, relations=True)
KINDS = {
    "transformer": {},
    "mamba": dict(encoder="mamba"),
    "fno": dict(encoder="fno"),
    "hybrid": dict(encoder="hybrid"),
    "perceiver": dict(adapter="perceiver", queries=16),
    "perceiver mamba": dict(encoder="mamba", adapter="perceiver", queries=4),
    "nearest": dict(adapter="nearest", queries=128),
    "nearest fno": dict(encoder="fno", adapter="nearest", queries=32),
}
TUH21 = PROFILES["tuh21"].channels


@pytest.fixture(params=KINDS)
def encoder(request):
    torch.manual_seed(0)
    return build_encoder(Architecture(**SMALL, **KINDS[request.param]))


def windows(batch: int = 3, channels: int = 7, patches: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    positions_C3 = torch.tensor([POSITIONS[n] for n in TUH21[:channels]])
    return torch.randn(batch, channels, patches * SMALL["patch"]), positions_C3.repeat(batch, 1, 1)


def close(a, b, tolerance=2e-5):
    return (a - b).abs().max() <= tolerance


# what every encoder promises


def test_permuting_channels_permutes_the_features(encoder):
    x_BCT, positions_BC3 = windows()
    order = torch.randperm(7)
    straight = encoder(x_BCT, positions_BC3).unflatten(1, (7, 4))
    assert close(encoder(x_BCT[:, order], positions_BC3[:, order]).unflatten(1, (7, 4)), straight[:, order])
    ids_BK = torch.tensor([[1, 2, 6, 9, 23]]).repeat(
        3, 1
    )  # and the order in which tokens are named changes nothing either
    shuffled = torch.tensor([3, 0, 4, 2, 1])
    named = encoder(x_BCT, positions_BC3, None, ids_BK[:, shuffled])
    assert close(named, encoder(x_BCT, positions_BC3, None, ids_BK)[:, shuffled])


def test_padding_and_bad_channels_change_nothing(encoder):
    x_BCT, positions_BC3 = windows()
    alone = encoder(x_BCT, positions_BC3).unflatten(1, (7, 4))
    wide_BCT, wide_BC3 = 100 * torch.randn(3, 12, 100), torch.full((3, 12, 3), torch.nan)
    wide_BC3[:, 1] = positions_BC3[:, 0] + 0.01  # one of the bad ones has a place
    mask_BC = torch.zeros(3, 12, dtype=torch.bool)
    places = torch.tensor([0, 2, 3, 4, 7, 8, 11])  # bad channels in between and at the end
    wide_BCT[:, places], wide_BC3[:, places], mask_BC[:, places] = x_BCT, positions_BC3, True
    assert close(encoder(wide_BCT, wide_BC3, mask_BC).unflatten(1, (12, 4))[:, places], alone)
    mask_BC[0, places[4:]] = False  # a smaller montage in the same batch
    mixed = encoder(wide_BCT, wide_BC3, mask_BC).unflatten(1, (12, 4))
    assert close(mixed[0, places[:4]].flatten(0, 1), encoder(x_BCT[:1, :4], positions_BC3[:1, :4])[0])
    assert close(mixed[1, places], alone[1])


def test_hidden_samples_never_reach_the_features(encoder):
    x_BCT, positions_BC3 = windows()
    ids_BK = torch.tensor([[0, 5, 6, 9]]).repeat(3, 1)
    z_BKD = encoder(x_BCT, positions_BC3, ids_BK=ids_BK)
    other_BCT = torch.randn_like(x_BCT).unflatten(2, (4, 25))
    for n in ids_BK[0].tolist():
        other_BCT[:, n // 4, n % 4] = x_BCT.unflatten(2, (4, 25))[:, n // 4, n % 4]
    assert torch.equal(encoder(other_BCT.flatten(2), positions_BC3, ids_BK=ids_BK), z_BKD)
    # all tokens named one by one are the whole grid
    everything_BK = torch.arange(28).repeat(3, 1)
    assert close(encoder(x_BCT, positions_BC3, ids_BK=everything_BK), encoder(x_BCT, positions_BC3))
    # ids that only fill up, 0 though token 0 is seen, are ignored
    filled_BK = torch.cat([ids_BK, torch.zeros(3, 2, dtype=torch.long)], 1)
    real_BK = torch.tensor([[True] * 4 + [False] * 2]).repeat(3, 1)
    assert close(encoder(x_BCT, positions_BC3, None, filled_BK, real_BK)[:, :4], z_BKD)
    # an electrode of which nothing is seen might as well not be there
    assert close(encoder(x_BCT[:, :3], positions_BC3[:, :3], ids_BK=ids_BK), z_BKD)


def test_what_is_seen_does_reach_the_features_of_other_places(encoder):
    x_BCT, positions_BC3 = windows(1)
    straight = encoder(x_BCT, positions_BC3).unflatten(1, (7, 4))
    x_BCT[:, 2, 25:50] += 1
    change_CP = (encoder(x_BCT, positions_BC3).unflatten(1, (7, 4)) - straight).abs().amax((0, 3))
    assert (change_CP > 1e-5).all()  # in two layers: first over time, or over electrodes, then over the other


def test_place_and_time_matter(encoder):
    x_BCT, positions_BC3 = windows(1)
    z_BND = encoder(x_BCT, positions_BC3)
    assert not close(encoder(x_BCT, positions_BC3.flip(1)), z_BND, 1e-2)
    moved_BCT = x_BCT.unflatten(2, (4, 25)).flip(2).flatten(2)
    assert not close(encoder(moved_BCT, positions_BC3).unflatten(1, (7, 4)).flip(2).flatten(1, 2), z_BND, 1e-2)
    assert close(encoder(x_BCT, positions_BC3 + 1e-5), z_BND, 0.05)  # a hundredth of a millimetre doesn't


def test_electrodes_without_a_position(encoder):
    x_BCT, positions_BC3 = windows(2)
    positions_BC3[:, 2:4] = torch.nan
    z_BND = encoder(x_BCT, positions_BC3)
    order = torch.tensor([0, 1, 3, 2, 4, 5, 6])
    assert z_BND.isfinite().all()
    assert close(encoder(x_BCT[:, order], positions_BC3).unflatten(1, (7, 4))[:, order], z_BND.unflatten(1, (7, 4)))
    z_BND.square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in encoder.parameters())
    assert encoder(x_BCT, torch.full_like(positions_BC3, torch.nan)).isfinite().all()


@pytest.mark.parametrize("masked", [False, True])
def test_gradient_reaches_every_parameter(encoder, masked):
    from train_jepa import JEPA, jepa_loss

    x_BCT, positions_BC3 = windows(4, 9)
    positions_BC3[:, 8] = torch.nan
    mask_BC = torch.ones(4, 9, dtype=torch.bool)
    if masked:
        mask_BC[1, 5:] = mask_BC[2, 3:] = False
    masks = draw_masks("spatiotemporal", positions_BC3, mask_BC, 4, 0.6, 0.09, 2, 0, 0, np.arange(4))
    model, teacher = JEPA(encoder, "prelocal", 2, []), copy.deepcopy(encoder).requires_grad_(False)
    part = Part(x_BCT, positions_BC3, mask_BC if masked else None, np.arange(4), np.zeros(4, np.int64), masks)
    jepa_loss(model, teacher, part, 0.5)[0].sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name
        ignored = encoder.architecture.adapter == "nearest" and name == "encoder.encoder.place.unplaced_D"
        # no change of a logit that all keys share can change an attention
        assert ignored or p.grad.abs().sum() > 0, name


def test_nothing_seen_in_a_patch_or_of_a_window(encoder):
    x_BCT, positions_BC3 = windows(2)
    ids_BK = torch.tensor(
        [[0, 4, 8], [1, 0, 0]]
    )  # patches 1 to 3 are dark in the first, all but one token in the second
    real_BK = torch.tensor([[True] * 3, [True, False, False]])
    z_BKD = encoder(x_BCT, positions_BC3, None, ids_BK, real_BK)
    z_BKD[real_BK].square().sum().backward()
    assert z_BKD[real_BK].isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in encoder.parameters())
    nobody_BC = torch.tensor([[True] * 7, [False] * 7])
    assert encoder(x_BCT, positions_BC3, nobody_BC)[0].isfinite().all()


@pytest.mark.parametrize("channels, patches", [(1, 1), (1, 5), (3, 1), (13, 3), (5, 40)])
def test_any_montage_and_length_with_the_same_weights(encoder, channels, patches):
    weights = {name: tuple(t.shape) for name, t in encoder.state_dict().items()}
    x_BCT, positions_BC3 = windows(2, channels, patches)
    z_BND = encoder(x_BCT, positions_BC3)
    assert z_BND.shape == (2, channels * patches, 32) and z_BND.isfinite().all()
    assert {name: tuple(t.shape) for name, t in encoder.state_dict().items()} == weights


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [dict(d_model=6, heads=3, patch=9), dict(d_model=34, heads=1, patch=17)])
def test_odd_sizes(kind, sizes):
    encoder = build_encoder(Architecture(**(SMALL | sizes | KINDS[kind])))
    z_BND = encoder(torch.randn(2, 5, 3 * sizes["patch"]), torch.randn(2, 5, 3) / 10)
    assert z_BND.shape == (2, 15, sizes["d_model"]) and z_BND.isfinite().all()


def test_bfloat16_stays_near_float32(encoder):
    """Features within a cosine of 0.99 of each token, the loss within 1 %, and every gradient finite."""
    x_BCT, positions_BC3 = windows(2, 21)
    ids_BK, target_BM = torch.arange(0, 84, 3).repeat(2, 1), torch.arange(1, 84, 3).repeat(2, 1)
    predictor, losses, features = Predictor(encoder.architecture, 2, "contextual"), [], []
    for rounded in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=rounded):
            z_BKD = encoder(x_BCT, positions_BC3, ids_BK=ids_BK)
            with torch.no_grad():
                target_BMD = layer_normed(take(encoder(x_BCT, positions_BC3), target_BM))
            predicted_BMD = predictor(z_BKD, positions_BC3, 4, ids_BK, target_BM)
        losses.append(loss_latent(predicted_BMD, target_BMD).mean())
        features.append(z_BKD.float())
    losses[1].backward()
    losses = [loss.item() for loss in losses]
    assert F.cosine_similarity(*features, dim=2).min() > 0.99
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    assert all(p.grad is None or p.grad.isfinite().all() for p in encoder.parameters())


@pytest.mark.parametrize("kind", [dict(encoder="fno"), dict(encoder="hybrid", adapter="perceiver", queries=4)])
def test_one_graph_for_the_compiler(kind):
    encoder = build_encoder(Architecture(**(SMALL | kind | dict(layers=1))))
    x_BCT, positions_BC3 = windows(2)
    ids_BK = torch.tensor([[0, 5, 6, 9], [1, 2, 3, 27]])
    traced = torch.compile(encoder, backend="aot_eager", fullgraph=True)
    assert close(traced(x_BCT, positions_BC3, None, ids_BK), encoder(x_BCT, positions_BC3, None, ids_BK))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["transformer", "mamba", "fno", "hybrid", "perceiver"])
def test_compiled_equals_eager_with_its_gradients(kind):
    torch.manual_seed(0)
    encoder = build_encoder(Architecture(**(SMALL | KINDS[kind] | dict(layers=1))))
    x_BCT, positions_BC3 = windows(2)
    ids_BK = torch.tensor([[0, 5, 6, 9], [1, 2, 3, 27]])
    features, gradients = [], []
    for run in (encoder, torch.compile(encoder)):
        features.append(run(x_BCT, positions_BC3, None, ids_BK))
        loss = features[-1].square().sum()
        gradients.append(torch.autograd.grad(loss, list(encoder.parameters()), allow_unused=True))
    assert close(*features)
    for ours, theirs in zip(*gradients, strict=True):
        assert (ours is None) == (theirs is None) and (ours is None or close(ours, theirs, 1e-3))


def test_file_round_trip(tmp_path, encoder):
    x_BCT, positions_BC3 = windows()
    save_encoder(tmp_path / "encoder.safetensors", encoder, {"signal": {}, "lineage": []})
    loaded, _ = load_encoder(tmp_path / "encoder.safetensors")
    assert torch.equal(loaded(x_BCT, positions_BC3), encoder.eval()(x_BCT, positions_BC3))
    assert loaded.architecture == encoder.architecture


@pytest.mark.parametrize("kind", KINDS)
def test_base_size_builds_and_what_must_not_decay_does_not(kind):
    with torch.device("meta"):
        encoder = build_encoder(Architecture(**(dict(d_model=512, layers=12, heads=8) | KINDS[kind])))
    assert 30e6 < sum(p.numel() for p in encoder.parameters()) < 75e6
    kept = {id(p) for p in decay_groups(encoder, 0.05)[1]["params"]}
    words = ("place", "norm", "log_reach", "log_rate", "step", "skip", "nothing")
    assert all(id(p) in kept for name, p in encoder.named_parameters() if any(word in name for word in words))


def test_sizes_that_do_not_fit_are_named():
    for wrong, word in ((dict(adapter="rnn"), "--adapter"), (dict(queries=0), "--queries"), (dict(queries=129), "128")):
        with pytest.raises(Unusable, match=word):
            build_encoder(Architecture(**wrong))


# the state space


def scan_step_by_step(u_RLE, fade_RLE, b_RLS, c_RLS):
    """The recurrence itself, a step at a time."""
    h_RSE, y = torch.zeros_like(b_RLS[:, 0, :, None] * u_RLE[:, 0, None]), []
    for u_RE, fade_RE, b_RS, c_RS in zip(*(t.unbind(1) for t in (u_RLE, fade_RLE, b_RLS, c_RLS)), strict=True):
        h_RSE = (-fade_RE[:, None]).exp() * h_RSE + b_RS[:, :, None] * u_RE[:, None]
        y.append((c_RS[:, :, None] * h_RSE).sum(1))
    return torch.stack(y, 1)


def scan_inputs(rows=3, steps=23, channels=10, states=6):
    torch.manual_seed(2)
    u_RLE, b_RLS, c_RLS = (torch.randn(rows, steps, n, dtype=torch.float64) for n in (channels, states, states))
    return u_RLE, torch.rand_like(u_RLE) ** 3 * 4, b_RLS, c_RLS


@pytest.mark.parametrize("chunk", [1, 2, 7, 16, 23])
def test_scan_equals_the_recurrence_with_its_gradients(chunk):
    inputs = [t.requires_grad_() for t in scan_inputs()]
    expected, y = scan_step_by_step(*inputs), selective_scan(*inputs, chunk=chunk)
    assert close(y, expected, 1e-12)
    weight = torch.randn_like(y)
    ours = torch.autograd.grad((y * weight).sum(), inputs)
    theirs = torch.autograd.grad((expected * weight).sum(), inputs)
    assert all(close(a, b, 1e-11) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("fading", ["mild", "none", "the most", "mixed"])
def test_scan_in_single_precision(fading):
    u, fade, b, c = scan_inputs(steps=300)
    some = torch.rand_like(fade)
    mixed = torch.where(some < 0.2, 4.0, torch.where(some < 0.5, 0.0, fade))
    fade = {"mild": fade / 100, "none": 0 * fade, "the most": 0 * fade + 4, "mixed": mixed}[fading]
    double = [t.clone().requires_grad_() for t in (u, fade, b, c)]
    single = [t.float().requires_grad_() for t in (u, fade, b, c)]
    expected, y = scan_step_by_step(*double), selective_scan(*single)
    assert (y - expected).norm() < 1e-6 * expected.norm()
    expected.square().sum().backward(), y.square().sum().backward()
    for s, d in zip(single, double, strict=True):  # worst for the fade where it is the most and hardly matters
        assert (s.grad - d.grad).norm() < 1e-4 * d.grad.norm()


def test_scan_forgets_at_most_98_percent_in_a_step():
    u, fade, b, c = (t.float() for t in scan_inputs(steps=40))
    huge = fade * 1e6
    assert torch.equal(selective_scan(u, huge, b, c), selective_scan(u, huge.clamp_max(4), b, c))
    assert selective_scan(u, torch.full_like(fade, torch.inf), b, c).isfinite().all()


def test_steps_of_no_duration_are_dropped():
    u, fade, b, c = scan_inputs()
    kept = torch.tensor([0, 1, 4, 5, 6, 11, 20])
    on_grid = [torch.zeros_like(t).index_copy(1, kept, t[:, kept]) for t in (u, fade, b, c)]
    dropped = selective_scan(*(t[:, kept] for t in (u, fade, b, c)))
    assert close(selective_scan(*on_grid, chunk=8)[:, kept], dropped, 1e-12)


def test_scan_has_a_memory_of_many_lengths():
    remembers_X = 1 / F.softplus(Scan(32, 4, 2).step_X)
    assert close(remembers_X.unflatten(0, (4, 4)), torch.tensor([1.0, 4.0, 16.0, 64.0]), 1e-3)


# the spectral convolution


def test_fourier_basis_is_orthonormal_and_the_layer_is_a_convolution():
    basis_XL = fourier_basis(10, 11).double()
    assert close(basis_XL.T @ basis_XL, torch.eye(10), 1e-6)  # all modes of the double period together lose nothing
    torch.manual_seed(0)
    layer = Spectral(16, 1)
    grid, z_BND = Grid(3, 4), torch.randn(2, 12, 16)
    with torch.no_grad():
        u_RLE = layer.inward(layer.norm(z_BND)).reshape(6, 16, 8)
        kernel_MEE = torch.complex(*layer.modes_2MEE)
        modes_RME = torch.fft.rfft(u_RLE, n=32, dim=1).conj()
        modes_RME[:, :16] = torch.einsum("rme,mef->rmf", modes_RME[:, :16], kernel_MEE)
        modes_RME[:, 16:] = 0
        v_BNX = torch.fft.irfft(modes_RME.conj(), n=32, dim=1)[:, :16].reshape(2, 12, 32)
        assert close(layer(z_BND, grid), layer.out(F.gelu(u_RLE.reshape(2, 12, 32) + v_BNX)))


def test_end_of_a_window_does_not_run_into_its_beginning():
    """A kernel that delays by one step, written as modes: the first step gets nothing from the last."""
    steps = 8
    basis_XL = fourier_basis(steps, steps + 1).double()
    angle_M = torch.pi / steps * torch.arange(steps + 1).double()
    u_L = torch.randn(steps, dtype=torch.float64)
    re_M, im_M = (basis_XL @ u_L).chunk(2)
    v_L = basis_XL.T @ torch.cat(
        [re_M * angle_M.cos() - im_M * angle_M.sin(), re_M * angle_M.sin() + im_M * angle_M.cos()]
    )
    assert close(v_L[1:], u_L[:-1], 1e-6) and abs(v_L[0]) < 1e-6


# mixing over electrodes


@pytest.mark.parametrize("layer", [Pool, Attend])
def test_electrodes_mix_within_their_patch_only(layer):
    torch.manual_seed(0)
    layer, z_BND = layer(16, 2, 1), torch.randn(1, 12, 16)
    straight = layer(z_BND, Grid(3, 4)).unflatten(1, (3, 4))
    changed_BND = z_BND.clone()
    changed_BND[:, 5] = torch.randn(16)  # electrode 1, patch 1
    change_CP = (layer(changed_BND, Grid(3, 4)).unflatten(1, (3, 4)) - straight).abs().amax((0, 3))
    assert (change_CP[:, 1] > 1e-4).all() and change_CP[:, [0, 2, 3]].max() == 0


@pytest.mark.parametrize("layer", [Scan, lambda d, heads, depth: Spectral(d, depth)])
def test_time_mixes_within_an_electrode_only(layer):
    torch.manual_seed(0)
    layer, z_BND = layer(16, 2, 1), torch.randn(1, 12, 16)
    straight = layer(z_BND, Grid(3, 4)).unflatten(1, (3, 4))
    changed_BND = z_BND.clone()
    changed_BND[:, 5] = torch.randn(16)
    change_CP = (layer(changed_BND, Grid(3, 4)).unflatten(1, (3, 4)) - straight).abs().amax((0, 3))
    assert (change_CP[1] > 1e-4).all() and change_CP[[0, 2]].max() < 1e-6


def test_grid_puts_tokens_in_their_places_and_back():
    ids_BK, real_BK = torch.tensor([[7, 0, 3], [5, 0, 0]]), torch.tensor([[True] * 3, [True, False, False]])
    z_BKX = torch.arange(1.0, 7).view(2, 3, 1)
    grid = Grid(2, 4, ids_BK, real_BK)
    assert grid.spread(z_BKX).flatten(1).tolist() == [[2, 0, 0, 3, 0, 0, 0, 1], [0, 0, 0, 0, 0, 4, 0, 0]]
    assert grid.seen_BCP.sum() == 4 and grid.collect(grid.spread(z_BKX))[real_BK].flatten().tolist() == [1, 2, 3, 4]
    assert grid.share(torch.arange(4.0).view(1, 4, 1).repeat(2, 1, 1)).flatten(1).tolist() == [[3, 0, 3], [1, 0, 0]]
    assert torch.equal(take(z_BKX, real_BK.long()), z_BKX.gather(1, real_BK.long()[:, :, None]))


# the adapters


def smooth_fields(channels: list[str], patches: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows as a head gives them: a dozen sources, each seen by electrodes within some centimetres."""
    torch.manual_seed(3)
    positions_C3 = torch.tensor([POSITIONS[n] for n in channels])
    sources_K3 = torch.tensor([POSITIONS[MONTAGE[k]] for k in range(0, 120, 10)])
    gain_CK = torch.exp(-torch.cdist(positions_C3, sources_K3).square() / (2 * 0.05**2))
    return (gain_CK @ torch.randn(2, 12, 25 * patches)), positions_C3.repeat(2, 1, 1)


def heads(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows of 128 electrodes, each of another brain: rhythms of a dozen sources, seen some centimetres around, and noise."""
    torch.manual_seed(3)
    positions_C3 = torch.tensor([POSITIONS[n] for n in MONTAGE])
    gain_CK = torch.exp(-torch.cdist(positions_C3, positions_C3[::10]).square() / (2 * 0.05**2))
    sources = (count, gain_CK.shape[1], 1)
    angle_BKT = 2 * torch.pi * (4 + 20 * torch.rand(sources)) * torch.arange(400) / 100 + 6 * torch.rand(sources)
    source_BKT = torch.randn(sources).exp() * angle_BKT.sin() + 0.3 * torch.randn(count, sources[1], 400)
    return gain_CK @ source_BKT + 0.1 * torch.randn(count, 128, 400), positions_C3.expand(count, -1, -1)


@pytest.mark.parametrize("kind", KINDS)
def test_21_of_128_electrodes_tell_the_same_of_a_window(kind):
    """
    Features averaged over a window, less their mean over windows: what 21 electrodes of the 10-20 system say of a window against
    what all 128 say of it, and of the others.
    """
    torch.manual_seed(0)
    encoder = build_encoder(Architecture(**(SMALL | dict(patch=100) | KINDS[kind])))
    x_BCT, positions_BC3 = heads(16)
    encoder.embed.calibrate(x_BCT.reshape(-1, 100))
    nearest = torch.cdist(torch.tensor([POSITIONS[n] for n in TUH21]), positions_BC3[0]).argmin(1).unique()
    with torch.no_grad():
        few_BD = encoder(x_BCT[:, nearest], positions_BC3[:, nearest]).mean(1)
        all_BD = encoder(x_BCT, positions_BC3).mean(1)
    few_BD, all_BD = few_BD - few_BD.mean(0), all_BD - all_BD.mean(0)
    cosine_BB = F.cosine_similarity(few_BD[:, None], all_BD[None], dim=2)
    other = cosine_BB[~torch.eye(16, dtype=torch.bool)]
    assert len(nearest) == 21 and cosine_BB.diag().min() > 0.9
    assert other.max() < 0.7 and other.mean() < 0.1


@pytest.mark.parametrize("queries", [4, 32, 128])
def test_21_of_128_electrodes_give_nearly_the_same(queries):
    torch.manual_seed(0)
    encoder = build_encoder(Architecture(**SMALL, adapter="perceiver", queries=queries))
    names = [n for n in MONTAGE]
    xyz_Q3 = torch.tensor([POSITIONS[n] for n in names])
    nearest = torch.cdist(torch.tensor([POSITIONS[n] for n in TUH21]), xyz_Q3).argmin(1).unique()
    x_BCT, positions_BC3 = smooth_fields(names)
    few = encoder.unify(*encoded(encoder, x_BCT[:, nearest], positions_BC3[:, nearest]))[0]
    many = encoder.unify(*encoded(encoder, x_BCT, positions_BC3))[0]
    unrelated = encoder.unify(*encoded(encoder, x_BCT.flip(0), positions_BC3))[0]
    assert few.shape == many.shape == (2, 4 * queries, 32)
    same, other = (F.cosine_similarity(few, t, dim=2).mean() for t in (many, unrelated))
    assert same > 0.95 and 1 - same < 0.5 * (1 - other), (same, other)
    few = encoder(x_BCT[:, nearest], positions_BC3[:, nearest])
    many = encoder(x_BCT, positions_BC3).unflatten(1, (128, 4))[:, nearest].flatten(1, 2)
    assert F.cosine_similarity(few, many, dim=2).min() > 0.95


def encoded(perceiver, x_BCT, positions_BC3):
    z_BKD, grid = perceiver.encoder.tokens(x_BCT, positions_BC3)
    return z_BKD, positions_BC3, grid


def test_queries_start_at_places_of_the_montage_far_from_each_other():
    everywhere_Q3 = torch.tensor([POSITIONS[n] for n in MONTAGE])
    assert len(spread_montage(128).unique(dim=0)) == 128
    for few in (4, 8, 21, 32):
        chosen_Q3 = spread_montage(few)
        assert torch.equal(chosen_Q3, spread_montage(128)[:few])
        apart = torch.pdist(chosen_Q3).min()
        assert (
            torch.cdist(everywhere_Q3, chosen_Q3).min(1).values.max() <= apart
        )  # nobody is farther than they are apart


def test_attention_between_places_interpolates():
    """With silent contents the logits are the squared distances in reaches, whatever form they are computed in."""
    torch.manual_seed(0)
    across = Across(8, 2)
    with torch.no_grad():
        for layer in (across.q, across.kv):
            layer.weight.zero_(), layer.bias.zero_()
        across.nothing_X[8:] = 0
        across.nothing_X[:8] = 0
        across.kv.weight[8:].copy_(torch.eye(8))
        across.out.weight.copy_(torch.eye(8)), across.out.bias.zero_()
    query_1Q3, key_1C3 = torch.randn(1, 3, 3) / 20, torch.randn(1, 5, 3) / 20
    z_1KD = torch.randn(1, 5, 8)
    found = across(torch.randn(1, 1, 3, 8), query_1Q3, z_1KD, key_1C3, Grid(5, 1))[0, 0]
    everywhere_C3 = torch.cat([key_1C3[0], across.centre_3[None]])  # the last stands for nothing
    value_CD = torch.cat([across.norm(z_1KD)[0], torch.zeros(1, 8)])
    for h, reach in enumerate(across.log_reach_H.exp()):
        weight_QC = (-(torch.cdist(query_1Q3[0], everywhere_C3) / reach).square()).softmax(1)
        assert close(found[:, 4 * h : 4 * h + 4], weight_QC @ value_CD[:, 4 * h : 4 * h + 4], 1e-4)


def test_perceiver_reads_where_the_electrodes_are():
    torch.manual_seed(0)
    encoder = build_encoder(Architecture(**SMALL, adapter="perceiver", queries=16))
    x_BCT, positions_BC3 = smooth_fields(list(TUH21))
    z_BCPD = encoder(x_BCT, positions_BC3).unflatten(1, (21, 4))
    near, far = (TUH21.index(n) for n in ("F3", "O2"))
    here = TUH21.index("Fp1")
    distance = lambda a, b: (z_BCPD[:, a] - z_BCPD[:, b]).norm()  # noqa: E731
    assert 0 < distance(here, near) < distance(here, far)


def test_nearest_moves_electrodes_to_the_montage():
    torch.manual_seed(0)
    encoder = build_encoder(Architecture(**SMALL, adapter="nearest", queries=128))
    x_BCT, _ = windows(2, 3)
    names = ["E36", "E104", "E11"]
    positions_BC3 = torch.tensor([POSITIONS[n] for n in names]).repeat(2, 1, 1) + 0.003
    z_BND = encoder(x_BCT, positions_BC3)
    full_BQT = torch.zeros(2, 128, 100)
    places = [next(q for q, xyz in enumerate(encoder.xyz_Q3.tolist()) if np.allclose(xyz, POSITIONS[n])) for n in names]
    full_BQT[:, places] = x_BCT
    mask_BQ = torch.zeros(2, 128, dtype=torch.bool)
    mask_BQ[:, places] = True  # where no electrode is nearest, nothing takes part
    full_BND = encoder.encoder(full_BQT, encoder.xyz_Q3.expand(2, -1, -1), mask_BQ)
    assert close(z_BND, full_BND.unflatten(1, (128, 4))[:, places].flatten(1, 2))
    twice = encoder(torch.cat([x_BCT, x_BCT[:, :1]], 1), torch.cat([positions_BC3, positions_BC3[:, :1]], 1))
    assert close(twice[:, :12], z_BND) and close(twice[:, 12:], z_BND[:, :4])  # shared places hold the mean


@pytest.mark.parametrize("queries", [32, 128])
def test_nearest_standardises_relations_as_it_computes_them(queries, monkeypatch):
    torch.manual_seed(0)
    encoder = build_encoder(Architecture(**SMALL, adapter="nearest", queries=queries))
    x_BCT, positions_BC3 = windows(40, 19)
    x_BCT[:, 1:] += x_BCT[:, :1] * torch.rand(40, 18, 1)  # windows differ in how much their electrodes share
    mask_BC = torch.ones(40, 19, dtype=torch.bool)
    mask_BC[:7, 3] = False
    parts = [Part(x_BCT[:20], positions_BC3[:20], mask_BC[:20], np.arange(20), np.zeros(20, int))]
    parts += [Part(x_BCT[20:, :11], positions_BC3[20:, :11], None, np.arange(20), np.zeros(20, int))]
    encoder.calibrate(parts)
    relate, kept = encoder.encoder.relate, []
    measure = relate.measure

    def keep(x_BNS, at, grid):
        found_BNF = measure(x_BNS, at, grid)
        kept.append(((found_BNF - relate.level_F) / relate.spread_F)[grid.real_BK])
        return found_BNF

    monkeypatch.setattr(relate, "measure", keep)
    with torch.no_grad():
        for part in parts:
            encoder(*part.signal)
    kept_NF = torch.cat(kept)
    assert kept_NF.mean(0).abs().max() < 1e-3 and ((kept_NF.std(0) - 1).abs() < 1e-3).all()


def test_nearest_is_not_calibrated_by_electrodes_without_a_position():
    encoder = build_encoder(Architecture(**SMALL, adapter="nearest", queries=8))
    before = copy.deepcopy(encoder.state_dict())
    x_BCT, positions_BC3 = windows()
    encoder.calibrate([Part(x_BCT, torch.full_like(positions_BC3, torch.nan), None, np.arange(3), np.zeros(3, int))])
    assert all(torch.equal(t, before[name]) for name, t in encoder.state_dict().items())


def test_predictor_and_targets_work_behind_an_adapter(encoder):
    x_BCT, positions_BC3 = windows()
    context_BK, target_BM = torch.arange(8).repeat(3, 1), torch.tensor([[8, 9, 12, 27]]).repeat(3, 1)
    z_BKD = encoder(x_BCT, positions_BC3, ids_BK=context_BK)
    predicted = Predictor(encoder.architecture, 2)(z_BKD, positions_BC3, 4, context_BK, target_BM)
    target_BMD = layer_normed(take(encoder(x_BCT, positions_BC3), target_BM))
    first, second = torch.triu_indices(4, 4, 1)
    for t in (predicted, target_BMD):
        assert torch.cdist(t, t)[:, first, second].min() > 0.01
