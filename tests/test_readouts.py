"""Readouts: any montage, padding and order of channels change nothing; models as files; transfer; prototypes; occlusion; autopsy."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lib import occlusion
from lib.autopsy import autopsy
from lib.batches import Part
from lib.channels import POSITIONS, TEN_TWENTY
from lib.errors import Unusable
from lib.models import Architecture, build_encoder
from lib.readouts import LOCAL, Decoder, Reading, Sites, load_model, save_model
from lib.shots import few_shot
from lib.targets import Target
from lib.tensors import save_tensors
from lib.transfer import Domain, moved

KINDS = ("mean", "sites", "attention", "prelocal", "postlocal", "contextual")
TARGETS = [Target("rt", mean=1.0, std=0.5, unit="s"), Target("task", ("a", "b", "c"), (1.0, 2.0, 0.5))]
META = {"signal": {}, "lineage": [], "window_s": 2.0}


def decoder_of(kind: str, stretches: int = 0, targets=TARGETS, adapter: str = "none") -> Decoder:
    torch.manual_seed(0)
    architecture = Architecture(d_model=32, layers=2, heads=2, patch=50, adapter=adapter, queries=8, relations=True)
    decoder = Decoder(build_encoder(architecture), Reading(kind, 4, 3, stretches), targets)
    for head in decoder.heads:
        torch.nn.init.normal_(head.weight)
    return decoder.eval()


def part_of(names, windows: int = 3, seed: int = 0, mask_BC: torch.Tensor | None = None) -> Part:
    place_C3 = torch.tensor([POSITIONS[n] for n in names], dtype=torch.float32)
    x_BCT = torch.from_numpy(np.random.default_rng(seed).standard_normal((windows, len(names), 200))).float()
    return Part(
        x_BCT, place_C3.expand(windows, -1, -1).contiguous(), mask_BC, np.arange(windows), np.zeros(windows, int)
    )


@pytest.mark.parametrize("adapter", ["none", "perceiver"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stretches", [0, 2])
def test_order_and_padding_of_channels_change_nothing(kind, stretches, adapter):
    decoder = decoder_of(
        kind, stretches, TARGETS if not stretches else [Target("seizure", ("no", "yes"), source="seizure")], adapter
    )
    part = part_of(TEN_TWENTY[:8])
    outs = decoder(part)
    assert [o.shape for o in outs] == ([(3, 8)] if stretches else [(3, 1), (3, 3)])
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    turned = replace(part, x_BCT=part.x_BCT[:, order], positions_BC3=part.positions_BC3[:, order])
    padded = replace(
        part,
        x_BCT=torch.cat([part.x_BCT, torch.zeros(3, 2, 200)], 1),
        positions_BC3=torch.cat([part.positions_BC3, torch.zeros(3, 2, 3)], 1),
        mask_BC=torch.cat([torch.ones(3, 8, dtype=torch.bool), torch.zeros(3, 2, dtype=torch.bool)], 1),
    )
    for other in (turned, padded):
        for ours, theirs in zip(decoder(other), outs, strict=True):
            assert torch.allclose(ours, theirs, atol=2e-4)


def test_downstream_designs_use_the_parts_they_name():
    for kind in KINDS:
        decoder = decoder_of(kind)
        has_blocks = any("blocks" in name for name, _ in decoder.named_parameters())
        assert has_blocks != (kind in LOCAL)
        decoder.loss(decoder(part_of(TEN_TWENTY)), torch.zeros(3, 2)).sum().backward()
        unused = [name for name, p in decoder.named_parameters() if p.grad is None]
        assert not unused


def test_patches_keep_their_order_in_the_designs_that_say_so():
    part = part_of(TEN_TWENTY)
    back = replace(part, x_BCT=part.x_BCT.unflatten(2, (4, 50)).flip(2).flatten(2))
    for kind, alike in (("prelocal", False), ("postlocal", False), ("contextual", False)):
        assert torch.allclose(decoder_of(kind)(part)[0], decoder_of(kind)(back)[0], atol=1e-3) == alike


def test_sites_keep_their_own_electrodes_apart_and_take_in_those_of_other_montages():
    own = Sites(TEN_TWENTY)
    place_BC3 = torch.tensor([[POSITIONS[n] for n in TEN_TWENTY]], dtype=torch.float32)
    w_EC = own(place_BC3, None)[0]
    assert torch.equal(w_EC.argmax(1), torch.arange(19)) and w_EC.diagonal().min() > 0.5
    assert torch.allclose(w_EC.sum(1), torch.ones(19))
    names = ("O1", "Oz", "O2", "C1", "Fpz")
    w_EC = own(
        torch.tensor([[POSITIONS[n] for n in names]], dtype=torch.float32), torch.tensor([[1, 1, 1, 1, 0]]).bool()
    )[0]
    told = {site: names[i] for site, i in zip(TEN_TWENTY, w_EC.argmax(1).tolist(), strict=True)}
    assert (told["O1"], told["O2"], told["C3"]) == ("O1", "O2", "C1") and (w_EC[:, 4] == 0).all()
    nowhere = own(torch.full((1, 3, 3), torch.nan), None)
    assert torch.allclose(nowhere, torch.full((1, 19, 3), 1 / 3))  # electrodes without a place: their mean everywhere


def test_losses_leave_missing_values_out_and_weigh_classes():
    decoder = decoder_of("mean")
    out = [
        torch.tensor([[0.5], [2.0]], requires_grad=True),
        torch.tensor([[1.0, 0, 0], [0, 1.0, 0]], requires_grad=True),
    ]
    y_BK = torch.tensor([[1.5, float("nan")], [float("nan"), 2.0]])
    loss_K = decoder.loss(out, y_BK)
    assert loss_K[0] == 1.0
    assert loss_K[1].item() == pytest.approx(0.5 * (np.log(2 + np.e)), rel=1e-5)
    loss_K.sum().backward()
    assert out[0].grad[1] == 0 and (out[1].grad[0] == 0).all() and out[0].grad.isfinite().all()
    said = decoder.say([torch.tensor([[0.0], [2.0]]), torch.zeros(2, 3)])
    assert said[0][:, 0].tolist() == [1.0, 2.0] and said[1].sum(1).tolist() == pytest.approx([1, 1])


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_its_file(kind, tmp_path):
    decoder, part = decoder_of(kind), part_of(TEN_TWENTY[:5])
    save_model(tmp_path / "m.safetensors", decoder, META, {"baseline.x": torch.ones(2)})
    again, meta, others = load_model(tmp_path / "m.safetensors")
    assert again.targets == decoder.targets and meta["window_s"] == 2.0 and others["baseline.x"].tolist() == [1, 1]
    assert all(torch.equal(a, b) for a, b in zip(again(part), decoder(part), strict=True))


def test_a_file_that_is_no_model_is_refused(tmp_path):
    save_tensors(tmp_path / "e.safetensors", {"x": torch.ones(1)}, {"format": "berger-encoder", "version": 1})
    with pytest.raises(Unusable, match="is berger-encoder 1, .* model.safetensors of a run of train_supervised.py"):
        load_model(tmp_path / "e.safetensors")


def test_transfer_moves_what_is_shifted_scaled_or_turned():
    rng = np.random.default_rng(0)
    source_BX = rng.standard_normal((400, 3)) @ np.array([[1, 0.5, 0], [0, 1, 0.3], [0, 0, 1]])
    source = Domain.of(source_BX)
    turned_BX = (source_BX @ np.array([[0.6, -0.8, 0], [0.8, 0.6, 0], [0, 0, 2.0]])) * 3 + 5
    group_B = np.repeat(["a", "b"], 200)
    for how, same in (("recentre", "mean"), ("normalise", "std"), ("adabn", "std"), ("coral", "covariance")):
        z_BX = moved(turned_BX, group_B, how, source)
        for group in "ab":
            own = z_BX[group_B == group]
            assert own.mean(0) == pytest.approx(source.mean_X)
            if same == "std":
                assert own.std(0) == pytest.approx(source.std_X)
            if same == "covariance":
                wanted = np.cov(source_BX, rowvar=False)
                gap = np.abs(np.cov(own, rowvar=False) - wanted).max()
                assert gap < 0.25 * np.abs(np.cov(turned_BX, rowvar=False) - wanted).max()
    assert np.array_equal(moved(turned_BX, group_B, "none", source), turned_BX)
    kept = Domain.from_tensors(source.tensors())
    assert kept.mean_X == pytest.approx(source.mean_X, abs=1e-6)
    with pytest.raises(Unusable, match="earlier version"):
        Domain.from_tensors({"domain.mean_X": torch.zeros(3), "domain.covariance_XX": torch.eye(3)})


@pytest.mark.parametrize("width", [40, 2000])
def test_coral_is_the_whole_covariance_where_it_has_few_directions(width):
    rng = np.random.default_rng(0)
    z_BX = rng.standard_normal((300, 60)) @ rng.standard_normal((60, width)) + 0.01 * rng.standard_normal((300, width))
    z_BX -= z_BX.mean(0)
    covariance_XX = np.cov(z_BX, rowvar=False)
    size_X, basis_XX = np.linalg.eigh(covariance_XX + 0.1 * np.trace(covariance_XX) / width * np.eye(width))
    for exponent in (-0.5, 0.5):
        whole_BX = z_BX @ (basis_XX * size_X**exponent) @ basis_XX.T
        assert np.abs(Domain.of(z_BX).shaped(z_BX, exponent) - whole_BX).max() < 1e-3 * np.abs(whole_BX).max()


def test_older_files_scale_features_by_nothing_or_are_refused(tmp_path):
    decoder, path = decoder_of("mean"), tmp_path / "old.safetensors"
    for spread, loads in ((1.0, True), (2.0, False)):
        scaling = {"model.centre_X": torch.zeros(32), "model.spread_X": torch.full((32,), spread)}
        save_model(path, decoder, META, scaling)
        if loads:
            again = load_model(path)[0].state_dict()
            assert "centre_X" not in again and torch.equal(again["heads.0.weight"], decoder.heads[0].weight)
        else:
            with pytest.raises(Unusable, match="another version .*spread_X"):
                load_model(path)


def test_a_model_of_zero_phase_signals_is_not_evaluated_on_causal_ones(tmp_path):
    save_model(tmp_path / "m.safetensors", decoder_of("mean"), META | {"signal": {"causal": False}, "unit": "uV"})
    load_model(tmp_path / "m.safetensors", SimpleNamespace(signal={"causal": False}, unit="uV"))
    for signal, unit in (({"causal": True}, "uV"), ({"causal": False}, "V")):
        with pytest.raises(Unusable, match="the cache has (True|V)"):
            load_model(tmp_path / "m.safetensors", SimpleNamespace(signal=signal, unit=unit))


def test_prototypes_tell_classes_within_and_across_subjects():
    rng = np.random.default_rng(0)
    subject_B, y_B = np.repeat(np.arange(6), 40), np.arange(240) % 2
    good_BX = rng.standard_normal((240, 5)) + 2 * y_B[:, None] + 5 * subject_B[:, None]
    bad_BX = rng.standard_normal((240, 5)) + 5 * subject_B[:, None]
    span_B3 = np.stack([subject_B, np.arange(240) * 50, np.arange(240) * 50 + 100], 1)  # neighbours overlap by half
    scored = few_shot({"good": good_BX, "bad": bad_BX}, y_B, subject_B, span_B3, 5, 60, 0)
    for low, high in scored["good"][1:]:
        assert 0.9 < low < scored["good"][0] < high
    assert abs(scored["bad"][0] - 0.5) < 0.08
    of_subject_B = subject_B % 2  # now a label is of a subject: support and queries are of different people
    apart = few_shot({"id": np.eye(6)[subject_B]}, of_subject_B, subject_B, span_B3, 5, 60, 0)
    assert apart["id"][0] < 0.75  # who it is says nothing of others
    assert few_shot({"good": good_BX}, y_B, subject_B, span_B3, 50, 20, 0) is None


def test_more_episodes_say_more_of_the_draw_and_no_more_of_other_people():
    rng = np.random.default_rng(0)
    subject_B, y_B = np.repeat(np.arange(8), 40), np.arange(320) % 2
    clear_B = np.linspace(0, 3, 8)[subject_B]  # classes are as far apart as the subject has it
    z_BX = rng.standard_normal((320, 2)) + (clear_B * y_B)[:, None]
    span_B3 = np.stack([subject_B, np.arange(320) * 100, np.arange(320) * 100 + 100], 1)
    few, many = (few_shot({"z": z_BX}, y_B, subject_B, span_B3, 5, n, 0)["z"] for n in (100, 1600))
    width = [[np.ptp(interval) for interval in told[1:]] for told in (few, many)]
    assert width[1][1] == pytest.approx(width[0][1] / 4, rel=0.2) and width[1][0] == pytest.approx(width[0][0], rel=0.3)
    assert width[1][0] > 0.15


def test_occlusion_finds_the_electrode_and_the_band_that_matter():
    part = part_of(TEN_TWENTY, windows=8)
    t = torch.arange(200) / 100
    part.x_BCT[:, TEN_TWENTY.index("O1")] += 3 * torch.sin(2 * torch.pi * 10 * t)

    def loss_of(part: Part, i: int) -> float:
        alpha = torch.fft.rfft(part.x_BCT)[:, :, 20].abs()[:, TEN_TWENTY.index("O1")]
        return float(-alpha.mean())

    sites, bands = occlusion.occlusion(loss_of, [part], TEN_TWENTY, 100.0)
    assert max(sites, key=sites.get) == "O1" and sum(v > 1e-3 for v in sites.values()) == 1
    assert max(bands, key=bands.get).startswith("alpha") and bands["alpha 8–13 Hz"] > 100 * abs(bands["beta 13–30 Hz"])
    one = part_of(["Oz"])
    assert (occlusion.without_site(one, 0, one.positions_BC3[0]).x_BCT == one.x_BCT).all()  # nothing would be left


def test_an_autopsy_finds_dead_units_and_layers_without_a_gradient():
    decoder, part = decoder_of("mean"), part_of(TEN_TWENTY)
    block = decoder.encoder.blocks[1]
    with torch.no_grad():
        block.wide.weight[:64] = 0  # half of the units
        block.wide.bias[:64] = -1
    decoder.encoder.embed.requires_grad_(False)
    rows = {row["layer"]: row for row in autopsy(decoder, lambda: decoder.loss(decoder(part), torch.zeros(3, 2)).sum())}
    assert rows["encoder.blocks.1.wide"]["dead"] == 0.5 and rows["encoder.blocks.0.wide"]["dead"] == 0
    assert rows["encoder.embed.samples"]["gradient"] == 0 < rows["encoder.blocks.0.wide"]["gradient"]
    assert all(p.grad is None for p in decoder.parameters())
