"""Real processes under torchrun: together they see the epoch, each window once, in the same order however many they are."""

import json
import subprocess
import sys

import pytest

from tests.recipes import ROOT

PROGRAM = """
import json, sys
sys.path.insert(0, {root!r})
from lib.ranks import join
from lib.samplers import SeizureSampler, SubjectSampler, UniformSampler
import numpy as np

ranks = join("cpu")
first = int(sys.argv[1])
samplers = {{
    "uniform": UniformSampler(1000, 40, seed=7),
    "subject": SubjectSampler([np.array([[0, 300]]), np.array([[300, 1000]])], 40, seed=7),
    "seizure": SeizureSampler(np.arange(0, 90), np.arange(90, 200), 1000, 40, seed=7),
}}
seen = {{name: [s.ids(step)[ranks.share(40)].tolist() for step in range(first, 25)] for name, s in samplers.items()}}
json.dump(seen, open(f"{folder}/{{ranks.world}}-{{first}}-{{ranks.rank}}.json", "w"))
ranks.close()
"""


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """Ids by (processes, first step, rank), from torchrun with 2 and 4 gloo processes."""
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
