"""Encoder, predictor, optimiser and loss: what must not change the result, and what must."""

import copy
import hashlib
import importlib
import json
import math
import typing
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from lib import command
from lib.arrays import load_arrays
from lib.batches import Part
from lib.channels import POSITIONS, TEN_TWENTY
from lib.errors import Unusable
from lib.grid import Grid, to_patches
from lib.losses import layer_normed, loss_latent
from lib.masks import draw_masks
from lib.metrics import effective_rank, feature_std
from lib.models import Architecture, build_encoder, check_signal, load_encoder, save_encoder, take
from lib.optim import decay_groups, ema_momentum, ema_update, warmup_cosine
from lib.predictor import KINDS, Predictor
from lib.run import saved_config
from lib.tensors import load_tensors, save_tensors

SMALL = Architecture(d_model=32, layers=2, heads=2, patch=25, rate_hz=100.0, relations=True)


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return build_encoder(SMALL)


def windows(batch: int = 3, channels: int = 7, patches: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    positions_C3 = torch.tensor([POSITIONS[n] for n in TEN_TWENTY[:channels]])
    return torch.randn(batch, channels, patches * SMALL.patch), positions_C3.repeat(batch, 1, 1)


def close(a, b, tolerance=1e-5):
    return (a - b).abs().max() <= tolerance


@pytest.mark.parametrize(
    "sizes", [Architecture(), SMALL, Architecture(d_model=48, layers=1, heads=3, patch=10, rate_hz=50)]
)
def test_shapes(sizes):
    encoder = build_encoder(sizes)
    x_BCT, positions_BC3 = torch.randn(2, 5, 3 * sizes.patch), torch.randn(2, 5, 3) / 10
    assert encoder(x_BCT, positions_BC3).shape == (2, 15, sizes.d_model)
    ids_BK = torch.tensor([[0, 4, 14], [1, 2, 3]])
    z_BKD = encoder(x_BCT, positions_BC3, ids_BK=ids_BK)
    assert z_BKD.shape == (2, 3, sizes.d_model)
    predicted_BMD = Predictor(sizes, 2)(z_BKD, positions_BC3, 3, ids_BK, torch.tensor([[5, 6], [7, 8]]))
    assert predicted_BMD.shape == (2, 2, sizes.d_model)


def test_base_preset_has_the_size_of_a_vit_small():
    with torch.device("meta"):
        encoder = build_encoder(Architecture(d_model=512, layers=12, heads=8))
    assert 37e6 < sum(p.numel() for p in encoder.parameters()) < 39e6


def test_permuting_channels_permutes_the_features(encoder):
    x_BCT, positions_BC3 = windows()
    order = torch.randperm(7)
    straight = encoder(x_BCT, positions_BC3).unflatten(1, (7, 4))
    assert close(encoder(x_BCT[:, order], positions_BC3[:, order]).unflatten(1, (7, 4)), straight[:, order])


def test_padding_and_bad_channels_change_nothing(encoder):
    x_BCT, positions_BC3 = windows()
    alone = encoder(x_BCT, positions_BC3).unflatten(1, (7, 4))
    wide_BCT, wide_BC3 = 100 * torch.randn(3, 12, 100), torch.full((3, 12, 3), torch.nan)
    mask_BC = torch.zeros(3, 12, dtype=torch.bool)
    places = torch.tensor([0, 2, 3, 4, 7, 8, 11])  # bad channels in between and at the end
    wide_BCT[:, places], wide_BC3[:, places], mask_BC[:, places] = x_BCT, positions_BC3, True
    assert close(encoder(wide_BCT, wide_BC3, mask_BC).unflatten(1, (12, 4))[:, places], alone)


def test_one_montage_alone_or_in_a_mixed_batch(encoder):
    x_BCT, positions_BC3 = windows(2, 7)
    alone = encoder(x_BCT[:1, :4], positions_BC3[:1, :4])
    mask_BC = torch.ones(2, 7, dtype=torch.bool)
    mask_BC[0, 4:] = False
    assert close(encoder(x_BCT, positions_BC3, mask_BC)[0, :16], alone[0])


def test_context_encoder_sees_nothing_but_the_visible_tokens(encoder):
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
    # filled-up ids are ignored
    filled_BK = torch.cat([ids_BK, torch.zeros(3, 2, dtype=torch.long)], 1)
    real_BK = torch.tensor([[True] * 4 + [False] * 2]).repeat(3, 1)
    assert close(encoder(x_BCT, positions_BC3, None, filled_BK, real_BK)[:, :4], z_BKD)


def test_bfloat16_stays_close_to_float32(encoder):
    x_BCT, positions_BC3 = windows()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = encoder(x_BCT, positions_BC3).float()
    assert torch.nn.functional.cosine_similarity(rounded, encoder(x_BCT, positions_BC3), dim=2).min() > 0.999


def test_place_and_time_matter(encoder):
    x_BCT, positions_BC3 = windows(1)
    z_BND = encoder(x_BCT, positions_BC3)
    assert not close(encoder(x_BCT, positions_BC3.flip(1)), z_BND, 1e-3)
    moved_BCT = x_BCT.unflatten(2, (4, 25)).flip(2).flatten(2)
    assert not close(encoder(moved_BCT, positions_BC3).unflatten(1, (7, 4)).flip(2).flatten(1, 2), z_BND, 1e-3)
    assert close(encoder(x_BCT, positions_BC3 + 1e-4), z_BND, 0.05)  # a tenth of a millimetre doesn't


def test_an_electrode_without_a_position_is_not_at_the_origin(encoder):
    x_BCT, positions_BC3 = windows(1)
    nowhere, origin = positions_BC3.clone(), positions_BC3.clone()
    nowhere[:, 2], origin[:, 2] = torch.nan, 0.0
    z_BND = encoder(x_BCT, nowhere)
    assert z_BND.isfinite().all() and not close(z_BND, encoder(x_BCT, origin), 1e-3)
    z_BND.sum().backward()
    assert all(p.grad.isfinite().all() for p in encoder.parameters())
    assert encoder.place.unplaced_D.grad.abs().sum() > 0


def test_spectrum_is_calibrated_and_keeps_amplitude(encoder):
    t = torch.arange(25) / 100
    x_KS = torch.randn(500, 25) + 5 * torch.sin(2 * math.pi * (8 * t + torch.rand(500, 1)))
    encoder.embed.calibrate(x_KS)
    standard_KF = (encoder.embed.log_amplitude(x_KS) - encoder.embed.level_F) / encoder.embed.spread_F
    assert close(standard_KF.mean(0), torch.zeros(13), 1e-4) and (standard_KF.std(0) <= 1.001).all()
    # random phase leaves the spectrum of a rhythm alone, amplitude moves it
    assert encoder.embed.log_amplitude(2 * x_KS).mean() > encoder.embed.log_amplitude(x_KS).mean() + 0.5
    assert encoder.embed.log_amplitude(torch.zeros(1, 25)).isfinite().all()


def test_loss_is_each_windows_mean_over_its_real_targets():
    predicted_BMD, target_BMD = torch.randn(4, 6, 8), layer_normed(torch.randn(4, 6, 8) * 3 + 2)
    assert close(target_BMD.mean(2), torch.zeros(4, 6)) and close(
        target_BMD.var(2, unbiased=False), torch.ones(4, 6), 1e-3
    )
    real_BM = torch.rand(4, 6) < 0.6
    real_BM[:, 0] = True
    naive_B = []
    for b in range(4):
        e_MD = (predicted_BMD[b] - target_BMD[b]).abs()[real_BM[b]].double()
        naive_B.append(float(torch.where(e_MD < 1, 0.5 * e_MD * e_MD, e_MD - 0.5).mean()))
    assert loss_latent(predicted_BMD, target_BMD, real_BM).tolist() == pytest.approx(naive_B, rel=1e-5)
    alone = [float(loss_latent(predicted_BMD[i : i + 1], target_BMD[i : i + 1], real_BM[i : i + 1])) for i in range(4)]
    assert alone == pytest.approx(naive_B, rel=1e-5)
    predicted_BMD[~real_BM] = torch.inf
    assert loss_latent(predicted_BMD, target_BMD, real_BM).tolist() == pytest.approx(naive_B, rel=1e-5)


def test_ema_equals_its_formula_in_double_precision(encoder):
    teacher = copy.deepcopy(encoder).requires_grad_(False)
    expected = {n: p.double().clone() for n, p in teacher.named_parameters()}
    for step in range(20):
        with torch.no_grad():
            for p in encoder.parameters():
                p.add_(0.1 * torch.randn_like(p))
        m = ema_momentum(step, 20, 0.9)
        ema_update(teacher, encoder, m)
        expected = {n: m * expected[n] + (1 - m) * p.double() for n, p in encoder.named_parameters()}
    assert all(close(p.double(), expected[n], 1e-6) for n, p in teacher.named_parameters())


def test_schedules():
    assert ema_momentum(0, 100, 0.996) == 0.996 and ema_momentum(50, 100, 0.996) == pytest.approx(0.998)
    assert ema_momentum(100, 100, 0.996) == 1
    rates = [warmup_cosine(s, 100, 2.0, 10) for s in range(100)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == rates[10] == 2.0 and rates[99] == pytest.approx(0)
    assert np.argmax(rates) == 9 and (np.diff(rates[10:]) < 0).all()
    middle = 10 + (99 - 10) / 2
    assert warmup_cosine(int(middle), 100, 2.0, 10) == pytest.approx(1 + math.cos(math.pi * (int(middle) - 10) / 89))
    assert warmup_cosine(0, 1, 1.0, 1) == 1.0


def test_every_parameter_is_in_one_group_and_only_matrices_decay(encoder):
    model = torch.nn.ModuleDict({"encoder": encoder, "predictor": Predictor(SMALL, 2)})
    decayed, kept = decay_groups(model, 0.05)
    assert decayed["weight_decay"] == 0.05 and kept["weight_decay"] == 0
    ids = [id(p) for g in (decayed, kept) for p in g["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters()) and len(set(ids)) == len(ids)
    in_decayed = {id(p) for p in decayed["params"]}
    for name, p in model.named_parameters():
        wanted = name.endswith("weight") and "norm" not in name and "place" not in name
        assert (id(p) in in_decayed) == wanted, name


def test_collapse_is_visible_in_the_metrics():
    torch.manual_seed(0)
    healthy_BD, line_BD = torch.randn(400, 32), torch.randn(400, 1) * torch.randn(1, 32)
    assert effective_rank(healthy_BD) > 28 and effective_rank(line_BD) < 1.01
    assert effective_rank(healthy_BD + 100) == pytest.approx(
        effective_rank(healthy_BD), rel=1e-4
    )  # a common offset is no feature
    assert effective_rank(torch.ones(10, 4)) == 1
    assert 0.9 < feature_std(healthy_BD) < 1.1
    assert feature_std(torch.randn(1, 32) + 1e-3 * healthy_BD) < 0.01


def test_encoder_file_round_trip(tmp_path, encoder):
    x_BCT, positions_BC3 = windows()
    encoder.embed.calibrate(torch.randn(50, 25))
    save_encoder(tmp_path / "encoder.safetensors", encoder, {"signal": {"rate_hz": 100.0}, "lineage": []})
    loaded, meta = load_encoder(tmp_path / "encoder.safetensors")
    assert torch.equal(loaded(x_BCT, positions_BC3), encoder(x_BCT, positions_BC3))
    assert meta["architecture"]["d_model"] == 32 and meta["signal"] == {"rate_hz": 100.0}
    assert load_file(tmp_path / "encoder.safetensors").keys() == encoder.state_dict().keys()  # anyone's reader reads it
    assert list(tmp_path.iterdir()) == [tmp_path / "encoder.safetensors"]


def test_damaged_encoder_files_are_refused(tmp_path, encoder):
    good = tmp_path / "encoder.safetensors"
    save_encoder(good, encoder, {"signal": {}, "lineage": []})
    data = good.read_bytes()
    bad = tmp_path / "bad.safetensors"
    middle = len(data) // 2
    damaged = {
        "truncated": data[:-100],
        "half": data[:middle],
        "empty": b"",
        "flipped": data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :],
        "other metadata": data.replace(b'\\"d_model\\":32', b'\\"d_model\\":64'),
        "no safetensors": b"not a model" * 1000,
    }
    for name, content in damaged.items():
        assert content != data, name
        bad.write_bytes(content)
        with pytest.raises(Unusable, match="bad.safetensors"):
            load_encoder(bad)
    with pytest.raises(Unusable, match="no file"):
        load_encoder(tmp_path / "missing.safetensors")
    save_tensors(bad, {"x": torch.ones(2)}, {"format": "something else"})
    with pytest.raises(Unusable, match="something else"):
        load_encoder(bad)


def test_an_encoder_refuses_signals_unlike_its_own(tmp_path, encoder, capsys):
    class Signals:
        signal = {"kind": "eeg", "rate_hz": 100.0, "band_hz": [0.5, 45.0], "scale": "robust", "causal": False}
        unit = "uV"

    path = tmp_path / "encoder.safetensors"
    save_encoder(path, encoder, {"signal": Signals.signal, "unit": "uV", "lineage": []})
    load_encoder(path, Signals)
    mends = {"rate_hz": "--rate-hz 100", "band_hz": "--band-hz ", "scale": "--scale robust", "unit": 'unit = "uV"'}
    for name, value in (("rate_hz", 200.0), ("band_hz", None), ("scale", "none"), ("unit", "g")):
        other = type(
            "Other", (Signals,), {"signal": Signals.signal | {name: value}, "unit": "g" if name == "unit" else "uV"}
        )
        with pytest.raises(Unusable, match=f"at {name} .*: rebuild the cache with {mends[name]}"):
            load_encoder(path, other)
    assert not capsys.readouterr().err
    causal = type("Causal", (Signals,), {"signal": Signals.signal | {"causal": True}})
    load_encoder(path, causal)  # to be tuned
    assert "at causal False, the cache has True" in capsys.readouterr().err
    meta = {"signal": {n: v for n, v in Signals.signal.items() if n != "causal"}}  # an older file says neither
    check_signal(meta, Signals, path)
    with pytest.raises(Unusable, match="at causal False, the cache has True"):
        check_signal(meta, causal, path)


@pytest.mark.parametrize("load", [load_tensors, load_arrays])
def test_files_whose_metadata_is_no_object_are_refused_in_one_line(tmp_path, load):
    path, deep = tmp_path / "odd.safetensors", "[" * 100_000 + "]" * 100_000
    listed = json.dumps({"meta": [1], "sha256": hashlib.sha256(b"[1]").hexdigest()})
    for label in ("[1, 2]", "3", "not JSON", deep, listed, '{"meta": {}}'):
        path.write_bytes(save({}, {"berger": label}))
        with pytest.raises(Unusable) as refused:
            load(path)
        assert "odd.safetensors" in str(refused.value) and "\n" not in str(refused.value)


def test_tensor_files_hold_scalars_and_empty_tensors(tmp_path):
    tensors = {"a": torch.tensor(3.0), "b": torch.empty(0, 4), "c": torch.arange(5), "d": torch.ones(2, 3).T}
    save_tensors(tmp_path / "t.safetensors", tensors, {"text": "µV", "n": [1, None]})
    loaded, meta = load_tensors(tmp_path / "t.safetensors")
    save_tensors(tmp_path / "again.safetensors", dict(reversed(tensors.items())), {"n": [1, None], "text": "µV"})
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "t.safetensors").read_bytes()
    assert meta == {"text": "µV", "n": [1, None]} and all(torch.equal(loaded[k], v) for k, v in tensors.items())


def test_sizes_that_do_not_fit_are_named():
    for wrong, word in (
        (Architecture(d_model=30, heads=4), "--d-model"),
        (Architecture(patch=4), "--patch-s"),
        (Architecture(encoder="lstm"), "--encoder"),
        (Architecture(heads=0), "--heads 0 must be at least 1"),
        (Architecture(heads=-2), "--heads -2"),
        (Architecture(d_model=0), "--d-model 0"),
        (Architecture(d_model=-16), "--d-model -16"),
        (Architecture(layers=0), "--layers 0"),
        (Architecture(layers=-1), "--layers -1"),
    ):
        with pytest.raises(Unusable, match=word):
            build_encoder(wrong)


@pytest.mark.parametrize(
    "d_model, heads, width", [(66, 3, 34), (6, 3, 4), (2, 1, 2), (50, 5, 26), (70, 7, 36), (64, 4, 32)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_predictor_is_half_as_wide_as_any_encoder_or_what_its_heads_make_of_that(d_model, heads, width, kind):
    encoder = build_encoder(Architecture(d_model=d_model, heads=heads, layers=1, patch=25))
    predictor, (x_BCT, positions_BC3) = Predictor(encoder.architecture, 1, kind), windows()
    ids_BK, target_BM = torch.arange(8).repeat(3, 1), torch.arange(8, 13).repeat(3, 1)
    predicted = predictor(encoder(x_BCT, positions_BC3, ids_BK=ids_BK), positions_BC3, 4, ids_BK, target_BM)
    assert predictor.narrow.out_features == width and predicted.shape == (3, 5, d_model) and predicted.isfinite().all()


@pytest.mark.parametrize("script", ["train_jepa", "train_contrastive", "train_supervised", "train_flow"])
def test_no_phase_takes_a_number_that_is_not_finite(script):
    phase = importlib.import_module(script)
    hints = typing.get_type_hints(phase.Config).items()
    names = [name for name, hint in hints if float in (hint, *typing.get_args(hint))]
    assert {"lr", "weight_decay", "epochs", "clip"} <= set(names)
    for name, text in ((name, text) for name in names for text in ("nan", "inf", "-inf")):
        flag = f"--{name.replace('_', '-')}"
        with pytest.raises(Unusable, match=f"^{flag} {text} must be a finite number"):
            command.parse(phase.Config, [f"{flag}={text}"], "", phase.PRESETS, saved_config)
        with pytest.raises(Unusable, match=f"^{flag} {text} must be a finite number"):
            command.check_signs(phase.Config(**{name: float(text)}), "lr", "seed")
    command.check_signs(phase.Config(), "lr steps", "seed")  # what is none passes


def part_of(x_BCT, positions_BC3, mask_BC=None, index_B=None, kind="spatiotemporal") -> Part:
    """Windows with hidden tokens, as a step of pretraining gets them."""
    index_B = np.arange(len(x_BCT)) if index_B is None else index_B
    good_BC = torch.ones(x_BCT.shape[:2], dtype=torch.bool) if mask_BC is None else mask_BC
    masks = draw_masks(kind, positions_BC3, good_BC, 4, 0.6, 0.09, 2, 0, 0, index_B)
    return Part(x_BCT, positions_BC3, mask_BC, index_B, np.zeros(len(x_BCT), np.int64), masks)


@pytest.mark.parametrize("mixed", [False, True])
def test_gradient_reaches_all_of_the_model_and_none_of_the_teacher(encoder, mixed):
    from train_jepa import JEPA, jepa_loss

    x_BCT, positions_BC3 = windows()
    mask_BC = torch.ones(3, 7, dtype=torch.bool)
    if mixed:
        mask_BC[1, 5:] = mask_BC[2, 3:] = False
    model, teacher = JEPA(encoder, "contextual", 2, []), copy.deepcopy(encoder).requires_grad_(False)
    part = part_of(x_BCT, positions_BC3, mask_BC if mixed else None)
    loss_B, mean_BD, level_BD = jepa_loss(model, teacher, part, 0.5)
    loss_B.sum().backward()
    for name, p in model.named_parameters():
        unused = name.endswith("unplaced_D")  # all electrodes have a place here
        assert p.grad is not None and (unused or p.grad.abs().sum() > 0), name
    assert all(p.grad is None for p in teacher.parameters())
    for b in range(3):  # a window's loss does not depend on the others
        own = int(mask_BC[b].sum())
        one = part_of(x_BCT[b : b + 1, :own], positions_BC3[b : b + 1, :own], index_B=np.array([b]))
        alone_B, mean_1D, level_1D = jepa_loss(model, teacher, one, 0.5)
        assert float(alone_B.detach()) == pytest.approx(float(loss_B[b].detach()), rel=1e-4)
        assert close(mean_1D, mean_BD[b : b + 1]) and close(level_1D, level_BD[b : b + 1])


def test_what_all_tokens_have_in_common_is_no_target(encoder):
    from train_jepa import JEPA, jepa_loss

    x_BCT, positions_BC3 = windows()
    model, part = JEPA(encoder, "prelocal", 2, []), part_of(x_BCT, positions_BC3, kind="random")
    plain, offset = copy.deepcopy(encoder).requires_grad_(False), copy.deepcopy(encoder).requires_grad_(False)
    common_D = 50 * torch.randn(32)
    with torch.no_grad():
        offset.norm.bias += common_D
    first_B, _, level_BD = jepa_loss(model, plain, part)
    model.centre_D += common_D
    second_B, _, _ = jepa_loss(model, offset, part)
    assert second_B.tolist() == pytest.approx(first_B.tolist(), rel=1e-3)
    assert close(level_BD, plain(x_BCT, positions_BC3).mean(1), 1e-3)


def test_take_picks_tokens():
    z_BND = torch.arange(24.0).reshape(2, 4, 3)
    assert torch.equal(take(z_BND, torch.tensor([[3, 0], [1, 1]])), torch.stack([z_BND[0, [3, 0]], z_BND[1, [1, 1]]]))


def relations_by_loops(x_CPS, at_CF, seen_CP):
    """What Relations says of each token (C, P, F), one pair of electrodes after the other, float64."""
    C, P, _ = x_CPS.shape
    found = torch.zeros(C, P, at_CF.shape[1], dtype=torch.float64)
    for c, p in ((c, p) for c in range(C) for p in range(P) if seen_CP[c, p]):
        others = [o for o in range(C) if o != c and seen_CP[o, p]]
        for o in others:
            a, b = (x_CPS[i, p].double() - x_CPS[i, p].double().mean() for i in (c, o))
            size = ((a.square().sum() + 1e-3 * len(a)) * (b.square().sum() + 1e-3 * len(b))).sqrt()
            found[c, p] += torch.atanh(0.9 * (a @ b) / size) * at_CF[o].double() / len(others)
    return found


def test_relations_are_the_loops_over_pairs_of_what_is_seen():
    torch.manual_seed(0)
    encoder, C, P = build_encoder(SMALL), 5, 3
    x_BCT, positions_BC3 = torch.randn(2, C, P * 25), 0.08 * torch.randn(2, C, 3)
    x_BCT[:, 1] += 2 * x_BCT[:, 0]
    ids_BK = torch.stack([torch.randperm(C * P)[:9] for _ in range(2)])
    at = encoder.place.harmonics(positions_BC3)
    found_BKF = encoder.relate.measure(take(to_patches(x_BCT, 25), ids_BK), at, Grid(C, P, ids_BK))
    for b in range(2):
        seen_CP = torch.zeros(C * P, dtype=torch.bool).index_fill(0, ids_BK[b], True).unflatten(0, (C, P))
        by_loops = relations_by_loops(x_BCT[b].unflatten(1, (P, 25)), at[0][b], seen_CP).flatten(0, 1)[ids_BK[b]]
        torch.testing.assert_close(found_BKF[b].double(), by_loops, atol=1e-5, rtol=1e-4)


def test_relations_know_nothing_of_hidden_tokens_and_nothing_where_there_is_no_other():
    torch.manual_seed(0)
    encoder = build_encoder(SMALL).eval()
    x_BCT, positions_BC3 = torch.randn(2, 4, 75), 0.08 * torch.randn(2, 4, 3)
    ids_BK = torch.tensor([[0, 1, 4, 5, 7, 11], [2, 3, 6, 9, 10, 0]])
    before = encoder(x_BCT, positions_BC3, None, ids_BK)
    hidden_BCT = torch.ones(2, 12, dtype=torch.bool).scatter(1, ids_BK, False).repeat_interleave(25, 1).unflatten(1, (4, 75))  # fmt: skip
    after = encoder(torch.where(hidden_BCT, 1e3 * torch.randn_like(x_BCT), x_BCT), positions_BC3, None, ids_BK)
    torch.testing.assert_close(before, after)
    alone = encoder.relate.measure(torch.randn(1, 3, 25), encoder.place.harmonics(positions_BC3[:1, :1]), Grid(1, 3))
    assert (alone == 0).all()
    nowhere = encoder.place.harmonics(torch.full((1, 3, 3), torch.nan))
    assert (encoder.relate.measure(torch.randn(1, 9, 25), nowhere, Grid(3, 3)) == 0).all()


def test_relations_of_correlated_electrodes_can_be_read_from_untrained_features():
    """Two classes that differ in nothing but the correlation of two electrodes: a spectrum of each can't tell them, relations can."""
    torch.manual_seed(0)
    positions_BC3 = torch.tensor([POSITIONS[n] for n in ("F3", "F4", "P3", "P4")]).expand(300, -1, -1)
    x_BCT, y_B = torch.randn(300, 4, 200), torch.arange(300) % 2
    x_BCT[:, 1] = torch.where(y_B[:, None] == 1, 0.6 * x_BCT[:, 0] + 0.8 * x_BCT[:, 1], x_BCT[:, 1])
    told = {}
    for relations in (False, True):
        encoder = build_encoder(replace(SMALL, relations=relations)).eval()
        encoder.calibrate([Part(x_BCT, positions_BC3, None, np.arange(300), np.zeros(300, int))])
        with torch.no_grad():
            z_BX = encoder(x_BCT, positions_BC3).unflatten(1, (4, -1)).mean(2).flatten(1).numpy()
        told[relations] = cross_val_score(make_pipeline(StandardScaler(), LogisticRegression(C=0.01)), z_BX, y_B, cv=5).mean()  # fmt: skip
    assert told[True] > 0.9 > 0.75 > told[False]


def test_relations_calibrated_on_one_electrode_are_not_deafening_on_more():
    torch.manual_seed(0)
    encoder = build_encoder(SMALL)
    before = [t.clone() for t in (encoder.relate.level_F, encoder.relate.spread_F)]
    x_BCT, positions_BC3 = windows(8, 7)
    encoder.calibrate([Part(x_BCT[:, :1], positions_BC3[:, :1], None, np.arange(8), np.zeros(8, int))])
    assert torch.equal(encoder.relate.level_F, before[0]) and torch.equal(encoder.relate.spread_F, before[1])
    x_BNS, grid = to_patches(x_BCT, SMALL.patch), Grid(7, 4)
    loud = encoder.relate(x_BNS, encoder.place.harmonics(positions_BC3), grid).abs().mean()
    assert loud < encoder.embed(x_BNS).abs().mean()


def test_relations_of_more_electrodes_are_standardised_and_what_never_varies_stays():
    torch.manual_seed(0)
    relate = build_encoder(SMALL).relate
    found_NF = torch.randn(500, len(relate.spread_F)) * torch.logspace(-5, 0, len(relate.spread_F)) + 0.3
    found_NF[:, 0] = 0.3
    relate.calibrate(found_NF)
    assert (relate.level_F[0], relate.spread_F[0]) == (0, 1)
    assert torch.equal(relate.spread_F[1:], found_NF.std(0).clamp_min(1e-3)[1:])
    assert torch.equal(relate.level_F[1:], found_NF.mean(0)[1:])


def test_a_file_from_before_relations_loads_without_them(tmp_path):
    old = build_encoder(replace(SMALL, relations=False))
    meta = {"signal": {}, "lineage": []}
    save_encoder(tmp_path / "old.safetensors", old, meta)
    tensors, label = load_tensors(tmp_path / "old.safetensors")
    del label["architecture"]["relations"]
    save_tensors(tmp_path / "old.safetensors", tensors, label)
    assert load_encoder(tmp_path / "old.safetensors")[0].relate is None
