"""kernels/: the C++ against its plain-PyTorch meaning, the errors of both, the build, and the life without a compiler."""

import errno
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.library import opcheck

import kernels
from kernels import build, ops, plain, reference

ROOT = Path(__file__).resolve().parent.parent
SIZES = [
    (1, 1),
    (7, 1),
    (8, 8),
    (16, 16),
    (17, 3),
    (31, 13),
    (400, 21),
    (401, 21),
    (251, 129),
    (64, 256),
    (33, 260),
    (3001, 19),
]


@pytest.fixture(params=["reference", "c++"])
def gather(request, monkeypatch):
    """kernels.gather_windows on one of its two paths."""
    if request.param == "reference":
        monkeypatch.setattr(ops, "path", lambda: "reference")
    elif kernels.path() == "reference":
        pytest.skip("no C++ here: python kernels/build.py says why")
    return kernels.gather_windows


@pytest.fixture
def needs_cpp():
    if kernels.path() == "reference":
        pytest.skip("no C++ here: python kernels/build.py says why")


class Case:
    """Files of random float16 with every kind of value in them, and windows at random places."""

    def __init__(self, folder: Path, samples=64, channels=(5,), windows=6, seed=0, header=128, out_channels=None):
        rng = np.random.default_rng(seed)
        self.samples, self.files, self.signals = samples, [], []
        for i, width in enumerate(channels):
            x_TC = rng.normal(0, 8, (samples + 50, width)).astype(np.float16)
            x_TC.reshape(-1)[rng.integers(0, x_TC.size, 1 + x_TC.size // 20)] = rng.choice(
                np.array([np.nan, np.inf, -np.inf, -0.0, 6e-8, -3e-5, 65504, 15, -15], np.float16), 1 + x_TC.size // 20
            )
            path = folder / f"{samples}-{width}-{i}-{seed}.bin"
            path.write_bytes(b"h" * header + x_TC.tobytes())
            self.files.append(os.open(path, os.O_RDONLY))
            self.signals.append(torch.from_numpy(x_TC))
        self.file_B = torch.from_numpy(rng.integers(0, len(channels), windows))
        self.start_B = torch.from_numpy(rng.integers(0, 51, windows))
        width_B = torch.tensor(channels)[self.file_B]
        width = max(channels) if out_channels is None else out_channels
        low_high = (torch.full((windows, 1), -1), width_B[:, None])
        map_BC = torch.from_numpy(rng.integers(*low_high, (windows, width)))
        gain_BC, bias_BC = (torch.from_numpy(rng.normal(size=(windows, width)).astype(np.float32)) for _ in range(2))
        fds_B = torch.tensor(self.files, dtype=torch.int64)[self.file_B]
        offsets_B = header + 2 * width_B * self.start_B
        self.args = [fds_B, offsets_B, width_B, map_BC.to(torch.int32), gain_BC, bias_BC, samples]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for fd in self.files:
            os.close(fd)


def bits(x: torch.Tensor) -> torch.Tensor:
    """The bit pattern, with every NaN the same."""
    return torch.where(x.isnan(), torch.nan, x).view(torch.int32 if x.dtype == torch.float32 else torch.int16)


def meaning(case: Case, clip: float = 15.0, dtype=torch.float32) -> torch.Tensor:
    """What comes out, written once more and without any reading."""
    _, _, _, map_BC, gain_BC, bias_BC, samples = case.args
    x_BCT = torch.zeros(*map_BC.shape, samples)
    for b, (file, start) in enumerate(zip(case.file_B, case.start_B, strict=True)):
        for c, channel in enumerate(map_BC[b].tolist()):
            if channel >= 0:
                x_T = case.signals[file][start : start + samples, channel].float().clamp(-clip, clip)
                x_T = x_T if gain_BC is None else x_T * gain_BC[b, c]
                x_BCT[b, c] = x_T if bias_BC is None else x_T + bias_BC[b, c]
    return x_BCT.to(dtype)


@pytest.mark.parametrize("samples, width", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_its_meaning_bit_for_bit(gather, tmp_path, samples, width, dtype):
    with Case(tmp_path, samples, (width,), windows=3, seed=width) as case:
        torch.testing.assert_close(
            bits(gather(*case.args, clip=15.0, dtype=dtype)), bits(meaning(case, dtype=dtype)), rtol=0, atol=0
        )


@pytest.mark.parametrize("header", [0, 1, 63, 127, 4095])
def test_any_byte_offset(gather, tmp_path, header):
    with Case(tmp_path, 123, (7, 21), windows=5, header=header) as case:
        assert torch.equal(bits(gather(*case.args, clip=15.0)), bits(meaning(case)))


def test_batches_mix_files_of_any_width(gather, tmp_path):
    with Case(tmp_path, 77, (1, 2, 19, 64, 129), windows=40, out_channels=32) as case:
        assert torch.equal(bits(gather(*case.args, clip=15.0)), bits(meaning(case)))


def test_windows_larger_than_a_block(gather, tmp_path):
    with Case(tmp_path, 5003, (129,), windows=2) as case:
        assert torch.equal(bits(gather(*case.args, clip=15.0)), bits(meaning(case)))


def test_every_map(gather, tmp_path):
    with Case(tmp_path, 50, (21,), windows=5) as case:
        whole = torch.arange(21, dtype=torch.int32)
        case.args[3] = torch.stack(
            [whole, whole.flip(0), torch.full_like(whole, -1), torch.full_like(whole, 20), whole // 2]
        )
        x_BCT = gather(*case.args, clip=15.0)
        assert torch.equal(bits(x_BCT), bits(meaning(case)))
        assert not x_BCT[2].any(), "an absent channel is zero, whatever its bias"


def test_gain_and_bias_are_optional_and_keep_the_sign_of_zero(gather, tmp_path):
    for gain, bias in ((False, False), (True, False), (False, True)):
        with Case(tmp_path, 60, (3,), windows=4) as case:
            case.args[4:6] = [case.args[4] if gain else None, case.args[5] if bias else None]
            assert torch.equal(bits(gather(*case.args, clip=15.0)), bits(meaning(case)))


def test_clip(gather, tmp_path):
    with Case(tmp_path, 200, (5,)) as case:
        case.args[4:6] = [None, None]
        assert torch.equal(bits(gather(*case.args)), bits(meaning(case, clip=float("inf"))))
        x_BCT = gather(*case.args, clip=0.5)
        assert x_BCT.isnan().any() and x_BCT.nan_to_num().abs().max() == 0.5  # NaN stays, infinity is clipped


def test_bfloat16_rounds_to_nearest_even(gather, tmp_path):
    path = tmp_path / "all"
    path.write_bytes(np.arange(65536, dtype=np.uint16).tobytes())  # every float16 there is
    gain = torch.tensor([[1.0, 1 + 2**-8, 3.0, 1e38, 1e-40]])
    with open(path, "rb") as file:
        one = torch.ones(1, dtype=torch.int64)
        args = [one * file.fileno(), one * 0, one, torch.zeros(1, 5, dtype=torch.int32), gain, None, 65536]
        x_BCT = gather(*args, dtype=torch.bfloat16)
    x_T = torch.arange(65536).to(torch.uint16).view(torch.float16).float()
    assert torch.equal(bits(x_BCT[0]), bits((x_T * gain[0, :, None]).bfloat16()))


@pytest.mark.parametrize("windows, channels, samples", [(0, 5, 10), (2, 0, 10), (2, 5, 0), (0, 0, 0)])
def test_empty(gather, tmp_path, windows, channels, samples):
    with Case(tmp_path, samples, (5,), windows=windows, out_channels=channels) as case:
        assert gather(*case.args, clip=15.0).shape == (windows, channels, samples)


def test_inputs_may_be_strided_and_out_is_filled(gather, tmp_path):
    with Case(tmp_path, 90, (6,), windows=4) as case:
        expected = meaning(case)
        fds, offsets, widths, map_BC, gain, bias, samples = case.args
        wide = [torch.stack([x, x + 9], -1)[..., 0] for x in (fds, offsets, widths)]
        turned = [x.T.contiguous().T for x in (map_BC, gain, bias)]
        assert not any(x.is_contiguous() for x in wide + turned)
        out = torch.full((4, 6, 90), torch.nan)
        assert gather(*wide, *turned, samples, clip=15.0, out=out) is out
        assert torch.equal(bits(out), bits(expected))
        one_recording = [fds[:1].expand(4), widths[:1].expand(4)]
        assert torch.equal(
            bits(gather(one_recording[0], offsets, one_recording[1], *case.args[3:], clip=15.0)), bits(expected)
        )


@pytest.mark.parametrize("samples", [4096, 4095])
def test_large_batches_are_written_past_the_caches(needs_cpp, tmp_path, samples):
    """Whole cache lines at a time where rows are aligned, and all the same where they aren't."""
    with Case(tmp_path, samples, (21, 8), windows=52) as case:
        x_BCT = kernels.gather_windows(*case.args, clip=15.0)
        assert x_BCT.nbytes >= 16 << 20
        assert torch.equal(bits(x_BCT), bits(meaning(case)))


def test_a_file_that_ends_too_early_is_named(gather, tmp_path):
    with Case(tmp_path, 64, (5,), windows=6) as case:
        case.args[1][[2, 4]] += 2 * 5 * 100
        with pytest.raises(
            kernels.UnreadableWindow, match=r"window 2 of the batch: the file ends after \d+ of its 640 bytes"
        ) as info:
            gather(*case.args, clip=15.0)
        assert info.value.window == 2 and info.value.errno == errno.ENODATA
        case.args[1][2] = 1 << 40
        with pytest.raises(kernels.UnreadableWindow, match="after 0 of"):
            gather(*case.args, clip=15.0)


def test_a_bad_file_is_named(gather, tmp_path):
    with Case(tmp_path, 64, (5,), windows=6) as case, open(tmp_path / "w", "wb") as unreadable:
        for fd, code in ((-1, errno.EBADF), (99999, errno.EBADF), (unreadable.fileno(), errno.EBADF)):
            case.args[0][3] = fd
            with pytest.raises(kernels.UnreadableWindow, match="window 3 of the batch") as info:
                gather(*case.args, clip=15.0)
            assert (info.value.window, info.value.errno) == (3, code)


@pytest.mark.parametrize(
    "place, change, error, says",
    [
        (0, lambda x: x.int(), TypeError, "fds must be torch.int64"),
        (1, lambda x: x.float(), TypeError, "offsets must be torch.int64"),
        (3, lambda x: x.long(), TypeError, "map must be torch.int32"),
        (4, lambda x: x.double(), TypeError, "gain must be torch.float32"),
        (4, lambda x: x.to("meta"), TypeError, "gain must be torch.float32 on the CPU, not torch.float32 on meta"),
        (0, lambda x: x[:-1], ValueError, "fds must have one entry for each of the 6 windows"),
        (2, lambda x: x[:, None], ValueError, "file_channels must have one entry"),
        (3, lambda x: x[0], ValueError, "map must be B x C"),
        (5, lambda x: x[:, :-1], ValueError, "bias must be B x C"),
        (1, lambda x: x - 10**6, ValueError, "window 0: byte offset -"),
        (2, lambda x: x * 0, ValueError, "window 0: a file of 0 channels"),
        (3, lambda x: x * 0 + 5, ValueError, "window 0: channel 5 of a file of 5 channels"),
        (3, lambda x: x * 0 - 2, ValueError, "window 0: channel -2 of a file of 5 channels"),
        (3, lambda x: x * 0 + 2**31 - 1, ValueError, "window 0: channel 2147483647"),
    ],
)
def test_wrong_arguments_are_named(gather, tmp_path, place, change, error, says):
    with Case(tmp_path, 64, (5,), windows=6) as case:
        case.args[place] = change(case.args[place])
        with pytest.raises(error, match=re.escape(says)):
            gather(*case.args, clip=15.0)


def test_wrong_outputs_are_named(gather, tmp_path):
    with Case(tmp_path, 64, (5,), windows=6) as case:
        with pytest.raises(TypeError, match="float32 or bfloat16, not torch.float16"):
            gather(*case.args, dtype=torch.float16)
        with pytest.raises(ValueError, match=r"out must be contiguous and \(6, 5, 64\), not \(6, 5, 63\)"):
            gather(*case.args, out=torch.empty(6, 5, 63))
        with pytest.raises(ValueError, match="out must be contiguous"):
            gather(*case.args, out=torch.empty(5, 6, 64).transpose(0, 1))
        for clip in (0.0, -1.0, float("nan")):
            with pytest.raises(ValueError, match="clip must be positive"):
                gather(*case.args, clip=clip)


def test_any_number_of_threads_agrees(needs_cpp, tmp_path):
    before = torch.get_num_threads()
    try:
        with Case(tmp_path, 400, (64, 21), windows=100, out_channels=40) as case:
            expected = bits(meaning(case))
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                assert torch.equal(bits(kernels.gather_windows(*case.args, clip=15.0)), expected)
    finally:
        torch.set_num_threads(before)


def test_operators_use_torchs_threads(needs_cpp):
    """A loop over threads is a plain loop in a library that was compiled without OpenMP, and nothing else tells."""
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.ops.berger.threads() == threads
    finally:
        torch.set_num_threads(before)


def test_many_python_threads_at_once(gather, tmp_path):
    torch.set_num_threads(2)
    try:
        with Case(tmp_path, 400, (21, 64), windows=60, out_channels=30) as case:
            expected, same = bits(meaning(case)), []

            def read():
                same.extend(torch.equal(bits(gather(*case.args, clip=15.0)), expected) for _ in range(3))

            threads = [threading.Thread(target=read) for _ in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert same == [True] * 24
    finally:
        torch.set_num_threads(1)


def test_the_gil_is_free_while_windows_are_read(needs_cpp, tmp_path):
    """Another Python thread's longest pause is shorter than the read; on a busy machine not every time, with the GIL held never."""
    with Case(tmp_path, 4000, (200,), windows=60) as case:
        out = torch.empty(*case.args[3].shape, 4000)
        kernels.gather_windows(*case.args, out=out)
        ticks, stop = [], threading.Event()
        clock = threading.Thread(target=lambda: [ticks.append(time.perf_counter()) for _ in iter(stop.is_set, True)])
        clock.start()
        shares = []
        for _ in range(10):
            ticks.clear()
            began = time.perf_counter()
            torch.ops.berger.gather_windows(*case.args[:6], 15.0, out)
            ended = time.perf_counter()
            inside = [began, *(t for t in list(ticks) if began < t < ended), ended]
            shares.append(np.diff(inside).max() / (ended - began))
            if shares[-1] < 0.5:
                break
        stop.set()
        clock.join()
        assert min(shares) < 0.5, shares


def test_a_forked_process_reads_too(needs_cpp, tmp_path):
    """A DataLoader's workers are forked after the parent has used its threads."""
    torch.set_num_threads(2)
    try:
        with Case(tmp_path, 5000, (2,), windows=40) as case:
            for _ in range(8):
                expected = kernels.gather_windows(*case.args, clip=15.0).numpy()
                child = os.fork()
                if child == 0:  # no torch operation but ours: OpenMP is what hangs after a fork
                    signal.alarm(30)
                    got = [kernels.gather_windows(*case.args, clip=15.0).numpy() for _ in range(3)]
                    os._exit(0 if all(np.array_equal(x_BCT, expected, equal_nan=True) for x_BCT in got) else 1)
                assert os.waitpid(child, 0)[1] == 0
    finally:
        torch.set_num_threads(1)


def test_cold_files(gather, tmp_path):
    with Case(tmp_path, 3000, (21, 8), windows=20) as case:
        for fd in case.files:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        assert torch.equal(bits(gather(*case.args, clip=15.0)), bits(meaning(case)))


def test_opcheck(needs_cpp, tmp_path):
    with Case(tmp_path, 40, (5,), windows=3) as case:
        out = torch.empty(3, 5, 40)
        opcheck(torch.ops.berger.gather_windows.default, (*case.args[:6], 15.0, out))
        opcheck(torch.ops.berger.gather_windows.default, (*case.args[:4], None, None, 15.0, out.bfloat16()))


def test_the_operator_checks_for_itself(needs_cpp, tmp_path):
    """torch.ops.berger can be called without the wrapper; it must not be able to read or write elsewhere."""
    operator = torch.ops.berger.gather_windows
    with Case(tmp_path, 40, (5,), windows=3) as case:
        out, args = torch.empty(3, 5, 40), case.args[:6]
        wrong = [
            [*args, 15.0, out[:2]],
            [*args, 15.0, out.transpose(0, 1)],
            [*args, 15.0, out.double()],
            [*args, 0.0, out],
            [args[0][:1], *args[1:], 15.0, out],
            [*args[:3], args[3][:, :2], *args[4:], 15.0, out],
            [*args[:4], args[4][:1], args[5], 15.0, out],
            [args[0] + 2**40, *args[1:], 15.0, out],
            [*args[:2], args[2] * 2**60, *args[3:], 15.0, out],
            [args[0], args[1] + 2**62, *args[2:], 15.0, out],
        ]
        for arguments in wrong:
            with pytest.raises((ValueError, RuntimeError)):
                operator(*arguments)


READ = """
import sys, torch, kernels
assert "kernels.ops" not in sys.modules, "importing compiles nothing"
one = torch.ones(1, dtype=torch.int64)
with open("LICENSE", "rb") as f:
    for _ in range(2):
        x = kernels.gather_windows(one * f.fileno(), one * 0, one * 3, torch.arange(3, dtype=torch.int32)[None], None, None, 50)
print(kernels.path(), x.double().nan_to_num().sum().item())
"""


def run(*arguments: str, **env) -> subprocess.CompletedProcess:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ | env, capture_output=True, text=True, timeout=600)


def test_without_kernels_everything_works_and_says_so_once(needs_cpp):
    off, on = run("-c", READ, BERGER_KERNELS="0"), run("-c", READ, CXX="no-such-compiler")
    assert off.returncode == on.returncode == 0, off.stderr + on.stderr
    assert (
        off.stdout.split()[0] == "reference" and off.stderr.count("kernels: ") == 1 and "BERGER_KERNELS=0" in off.stderr
    )
    assert on.stdout.startswith("c++ (") and on.stderr.count("kernels: C++") == 1, (
        "a library that is there needs no compiler"
    )
    assert off.stdout.split()[-1] == on.stdout.split()[-1]


WRONG = """
import torch, kernels
x, space, time, ids = torch.zeros(2, 12, 7), torch.zeros(2, 3, 7), torch.zeros(4, 7), torch.zeros(2, 5, dtype=torch.int64)
tokens = [(x[0], space, time, ids), (x[:1], space, time, ids), (x, space, time[:, :6], ids), (x[:, :9], space, time, ids)]
tokens += [(x, space, time, ids, True), (x, space, time, ids.int()), (x, space, time, ids - 1), (x, space, time, ids + 12)]
t, s = torch.zeros(3), torch.zeros(2)
averages = [([t], [t, t], 0.5), ([t], [t], 0.5, [t, t]), ([t, t], [t, s], 0.5), ([t], [t], 0.5, [s])]
there = torch.device("meta")
tokens.append((x, space.to(there), time, ids))
averages += [([t], [t.to(there)], 0.5), ([t], [t], 0.5, [t.to(there)])]
x, sos, state = torch.zeros(3, 5), torch.ones(2, 6).double(), torch.zeros(2, 2, 3).double()
filters = [(x[0], sos, state), (x, sos[:, :5], state), (x, sos.repeat(33, 1), state), (x, sos, state[..., :2]), (x, sos[:1], state)]
filters += [(x, sos, state.mT.contiguous().mT), (x, sos.float(), state), (x, sos, state.float()), (x.half(), sos, state)]
filters += [(x, sos * 2, state), (x, sos, state.to(there)), (x.to(there), sos, state)]
u, b = torch.zeros(2, 9, 5), torch.zeros(2, 9, 3)
scans = [(u[0], u[0], b, b), (u, u[:, :8], b, b), (u, u, b, b[..., :2]), (u, u, b[:1], b[:1]), (u, u, b, b, 6), (u, u, b, b, -1)]
scans += [(u[0, 0, 0], u, b, b), (u, u, b, b.to(there))]
q, k, real = torch.zeros(2, 3, 5, 8), torch.zeros(2, 3, 7, 8), torch.ones(2, 7, dtype=torch.bool)
heads = [(q[0], k, k), (q, k, k[:, :2]), (q[:1], k, k), (q[..., :7], k, k), (q, k, k.double()), (q.half(), k.half(), k.half())]
heads += [(q, k, k, real[:, :6]), (q, k, k, real[None]), (q, k, k, real.float()), (q, k, k, real.to(there))]
calls = {"embed_tokens": tokens, "ema_": averages, "sos_stream": filters, "selective_scan": scans, "attend": heads}
for name, arguments in [(name, arguments) for name, some in calls.items() for arguments in some]:
    try:
        print(name, "took it", getattr(kernels, name)(*arguments))
    except (ValueError, TypeError, IndexError) as error:
        print(name, type(error).__name__, error)
"""


def test_with_and_without_kernels_the_same_is_refused_in_the_same_words(needs_cpp):
    off, on = run("-c", WRONG, BERGER_KERNELS="0"), run("-c", WRONG)
    assert off.stdout == on.stdout and "took it" not in on.stdout and len(on.stdout.splitlines()) == 45, off.stderr


GRADIENTS = """
import torch, kernels
from kernels import reference
leaves = [torch.rand(2, 9, n, generator=torch.Generator().manual_seed(n)).double().requires_grad_() for n in (5, 5, 3, 3)]
both = [torch.autograd.grad(f(*leaves, 2).square().sum(), leaves) for f in (kernels.selective_scan, reference.selective_scan)]
print(kernels.path(), all(torch.allclose(a, b) and a.any() for a, b in zip(*both)))
"""


def test_without_kernels_the_scan_has_gradients():
    done = run("-c", GRADIENTS, BERGER_KERNELS="0")  # torch records none inside an operator
    assert done.stdout == "reference True\n", done.stderr


def test_one_rank_speaks(monkeypatch, capsys):
    for rank, said in (("0", "kernels: hello\n"), ("1", "")):
        monkeypatch.setenv("LOCAL_RANK", rank)
        plain.say("hello")
        assert capsys.readouterr().err == said


def test_processors_without_avx2(needs_cpp):
    """The tests of this file that compare values, on the path that any processor can run."""
    some = "c++ and (meaning or offset or block or map or zero or clip or even)"
    done = run("-m", "pytest", "-q", "-s", __file__, "-k", some, BERGER_KERNELS="generic")
    assert done.returncode == 0 and " passed" in done.stdout and "skipped" not in done.stdout, done.stdout
    assert "kernels: C++, generic" in done.stderr


@pytest.fixture
def empty_build(tmp_path, monkeypatch):
    """A checkout in which nothing has been compiled, with a small source in it."""
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "a.cpp").write_text('extern "C" int answer() { return 42; }\n')
    monkeypatch.setattr(build, "HERE", tmp_path)
    monkeypatch.setattr(build, "FOLDERS", {"torch": tmp_path / "csrc", "plain": tmp_path / "csrc"})
    if build.compiler() is None:
        pytest.skip("no g++")
    return tmp_path


def test_many_processes_compile_once(empty_build):
    said = []
    threads = [threading.Thread(target=lambda: build.build("plain", said.append)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum("compiling" in line for line in said) == 1
    assert build.library("plain").exists() and not list(empty_build.glob("*.so.*"))


def test_a_changed_source_or_torch_is_another_library(empty_build, monkeypatch):
    first = build.build("torch")
    (empty_build / "csrc" / "a.cpp").write_text('extern "C" int answer() { return 43; }\n')
    second = build.library("torch")
    (empty_build / "csrc" / "a.h").write_text("// a header counts too\n")
    third, plain = build.library("torch"), build.library("plain")
    monkeypatch.setattr(torch, "__version__", "0.0")
    assert len({first, second, third, build.library("torch")}) == 4 and not second.exists()
    assert build.library("plain") == plain


def test_what_cannot_be_compiled_is_said_in_one_line(empty_build, monkeypatch):
    (empty_build / "csrc" / "a.cpp").write_text("int answer() { return nothing; }\n")
    with pytest.raises(build.BuildFailed, match=r"failed: .*error: .*nothing") as info:
        build.build("plain")
    assert "\n" not in str(info.value) and not build.library("plain").exists() and not list(empty_build.glob("*.so.*"))
    for name in ("no-such-compiler", "g++ -m64"):
        monkeypatch.setenv("CXX", name)
        with pytest.raises(build.BuildFailed, match=f"CXX={re.escape(name)} .*without flags"):
            build.build("plain")
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(empty_build))
    with pytest.raises(build.BuildFailed, match="there is no g\\+\\+"):
        build.build("plain")


def test_half_a_library_is_compiled_again(empty_build):
    """What a crash has left of one: to load it would end the process."""
    target, size = build.build("plain"), build.build("plain").stat().st_size
    assert build.whole(target)
    for left in (0, 20, 64, size // 2, size - 1):
        os.truncate(target, left)
        said = []
        assert not build.whole(target) and build.build("plain", said.append) == target
        assert "compiling" in said[0] and target.stat().st_size == size


def test_words_that_mean_nothing_are_named():
    done = run("-c", "import kernels; kernels.path(); kernels.path('cpu:0')", BERGER_KERNELS="avx")
    assert done.returncode == 0 and done.stderr.count("BERGER_KERNELS=avx means nothing") == 1, done.stderr


def test_errors_of_windows_come_back_from_other_processes():
    error = kernels.UnreadableWindow(3, 0, 10, 20)
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.errno, again.window) == (str(error), error.errno, 3)


def test_the_reference_is_what_runs_without_a_library(monkeypatch, tmp_path, capsys):
    def fail(kind, say):
        raise build.BuildFailed("there is no g++")

    monkeypatch.setattr(build, "build", fail)
    monkeypatch.setattr(ops, "_path", None)
    with Case(tmp_path, 30, (4,)) as case:
        assert torch.equal(bits(kernels.gather_windows(*case.args, clip=15.0)), bits(meaning(case)))
    assert kernels.path() == "reference"
    assert capsys.readouterr().err == "kernels: plain PyTorch, slower, because there is no g++\n"


def test_reference_reads_on_after_a_partial_read(monkeypatch, tmp_path):
    """The system may return less than asked for, without the file having ended."""
    path = tmp_path / "x"
    path.write_bytes(np.arange(600, dtype=np.float16).tobytes())
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: whole(fd, [buffers[0][:100]], offset))
    with open(path, "rb") as file:
        x_TC = reference.read_samples(0, file.fileno(), 200, 100, 3)
    assert torch.equal(x_TC.flatten(), torch.arange(100, 400).half())


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ("kernels/bench.py", "--rounds", "1", "--megabytes", "32", "--phase-steps", "0"),
        ("tests/bench_cache.py", "--rounds", "1", "--megabytes", "32", "--minutes", "1", "--recordings", "50"),
    ],
)
def test_benchmarks_end_in_one_json_line(command):
    done = run(*command)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["machine"]


@pytest.mark.slow
def test_a_phase_logs_the_same_with_kernels_and_without(needs_cpp):
    done = run("kernels/bench.py", "--only", "none", "--phase-steps", "3")
    assert done.returncode == 0, done.stderr
    phases = json.loads(done.stdout.splitlines()[-1])["phases"]
    assert [p["phase"] for p in phases] == ["train_jepa transformer", "train_jepa mamba"]
    assert all(p["apart"] < 1e-4 for p in phases), phases
