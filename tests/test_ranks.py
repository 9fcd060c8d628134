"""Real processes under torchrun: together they see the epoch, each window once, and a loss of all windows is that of one process."""

import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.recipes import ROOT

PROGRAM = """
import json, sys
sys.path.insert(0, {root!r})
from lib.ranks import join
from lib.samplers import SeizureSampler, SubjectSampler, UniformSampler
from tests.test_ranks import contrast, small_model
import numpy as np
import torch

ranks = join("cpu")
first = int(sys.argv[1])
samplers = {{
    "uniform": UniformSampler(1000, 40, seed=7),
    "subject": SubjectSampler([np.array([[0, 300]]), np.array([[300, 1000]])], 40, seed=7),
    "seizure": SeizureSampler(np.arange(0, 90), np.arange(90, 200), 1000, 40, seed=7),
}}
seen = {{name: [s.ids(step)[ranks.share(40)].tolist() for step in range(first, 25)] for name, s in samplers.items()}}
json.dump(seen, open(f"{folder}/{{ranks.world}}-{{first}}-{{ranks.rank}}.json", "w"))

x_BS, model, temperature = small_model()
own = ranks.share(len(x_BS))
with torch.no_grad():
    z_SD = model(x_BS[own])
z_BD = ranks.gather(z_SD, len(x_BS)).requires_grad_()
loss = contrast(z_BD, temperature)
g_BD = ranks.gradient(loss, z_BD)
(model(x_BS[own]) * g_BD[own]).sum().backward()  # the second forward pass, with a graph
gradients = [p.grad for p in (*model.parameters(), temperature)]
ranks.sum(gradients, [0.0])
torch.save([z_BD.detach(), loss.detach(), *gradients], f"{folder}/{{ranks.world}}-{{first}}-{{ranks.rank}}.pt")
ranks.close()
"""


def small_model() -> tuple[torch.Tensor, nn.Module, nn.Parameter]:
    """Seven windows, which neither 2 nor 4 processes share evenly, a model, and the temperature of a loss."""
    torch.manual_seed(0)
    return (
        torch.randn(7, 6),
        nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)),
        nn.Parameter(torch.tensor(0.5)),
    )


def contrast(z_BD: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """A loss in which every window takes part in every other's."""
    return F.cross_entropy(z_BD @ z_BD.roll(1, 0).T / temperature, torch.arange(len(z_BD)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What processes wrote: one, and 2 and 4 under torchrun with gloo."""
    folder = tmp_path_factory.mktemp("ranks")
    script = folder / "ids.py"
    script.write_text(PROGRAM.format(root=str(ROOT), folder=folder))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    for words in (
        [sys.executable, script, "0"],
        [*launch, "2", script, "0"],
        [*launch, "4", script, "10"],
        [*launch, "4", script, "0"],
    ):
        done = subprocess.run([str(w) for w in words], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-2000:]
    return folder


@pytest.fixture(scope="module")
def seen(folder) -> dict:
    """Ids by (processes, first step, rank)."""
    return {tuple(map(int, p.stem.split("-"))): json.loads(p.read_text()) for p in folder.glob("*.json")}


@pytest.mark.parametrize("sampler", ["uniform", "subject", "seizure"])
@pytest.mark.parametrize("world", [2, 4])
def test_the_ranks_together_see_what_one_process_sees(seen, sampler, world):
    for step in range(25):
        parts = [seen[world, 0, rank][sampler][step] for rank in range(world)]
        woven = [parts[i % world][i // world] for i in range(40)]
        assert woven == seen[1, 0, 0][sampler][step]
    if sampler == "uniform":
        every = [i for rank in range(world) for ids in seen[world, 0, rank][sampler] for i in ids]
        assert sorted(every) == list(range(1000))


@pytest.mark.parametrize("sampler", ["uniform", "subject", "seizure"])
def test_going_on_from_step_ten_equals_never_having_stopped(seen, sampler):
    for rank in range(4):
        assert seen[4, 10, rank][sampler] == seen[4, 0, rank][sampler][10:]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_loss_of_all_windows_has_the_same_gradient_however_they_are_shared(folder, world):
    x_BS, model, temperature = small_model()
    loss = contrast(model(x_BS), temperature)
    expected = torch.autograd.grad(loss, [*model.parameters(), temperature])
    for rank in range(world):
        z_BD, its_loss, *gradients = torch.load(folder / f"{world}-0-{rank}.pt")
        torch.testing.assert_close(z_BD, model(x_BS).detach())  # in the order of the global batch
        torch.testing.assert_close(its_loss, loss.detach())
        for ours, theirs in zip(gradients, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


REUSE = """
import resource, sys
sys.path.insert(0, {root!r})
import torch
from lib.ranks import join

join("cpu")
for step in range(30):
    if step == 25:  # the heap has found its size
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24).sum()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's way to keep memory")
def test_memory_of_one_step_is_still_there_in_the_next():
    """64 MB are 16,384 pages: given back and fetched anew, as glibc does by itself, they would cost a fault each in each of five steps."""
    words = [sys.executable, "-c", REUSE.format(root=str(ROOT))]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert int(done.stdout) < 16384, done.stderr
