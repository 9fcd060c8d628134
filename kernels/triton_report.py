"""
What the Triton kernels take of GPUs that needn't be here: compiled ahead of time for what the real sizes launch.

    python kernels/triton_report.py            # sm_80, sm_90 and sm_100; the first time takes minutes
    python kernels/triton_report.py 90

Registers, shared memory and spills are ptxas's. Bytes are what an operation reads and writes by design, per element of z, teacher, y
or u; tests/test_triton.py counts them. Each distinct launch of an operation is a row.

Shapes: B windows, C channels, P patches per channel, N = C * P tokens, K tokens taken, D width, T samples, S sections or states,
R rows, L steps, E channels of a scan.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, only this folder is on the path

from kernels import triton_ema, triton_scan, triton_sos, triton_tokens

ARCHITECTURES = (80, 90, 100)


@dataclass(frozen=True)
class Case:
    """An operation at one size: `run` launches it; it moves `bytes` for `elements`."""

    name: str
    run: Callable
    bytes: int
    elements: int


def token_cases(B: int, C: int, P: int, K: int, D: int) -> Iterator[Case]:
    """K tokens of each window, and gradients of the tokens and of the channels' codes."""
    x_BND, space_BCD, time_PD, grad_BKD = (torch.randn(s) for s in ((B, C * P, D), (B, C, D), (P, D), (B, K, D)))
    ids_BK = torch.rand(B, C * P, generator=torch.Generator().manual_seed(0)).argsort(1)[:, :K].contiguous()
    used = len((ids_BK // P + C * torch.arange(B)[:, None]).unique()) + len((ids_BK % P).unique())
    forward, backward = (
        8 * B * K + 4 * D * (2 * B * K + used),
        8 * (B * K + B * C * P + 1) + 4 * D * B * (K + C * P + C),
    )
    args = (ids_BK, C, P, True, True, False)
    yield Case(
        "embed_tokens", lambda: triton_tokens.embed_tokens(x_BND, space_BCD, time_PD, ids_BK, False), forward, B * K * D
    )
    yield Case(
        "embed_tokens backward", lambda: triton_tokens.embed_tokens_backward(grad_BKD, *args), backward, B * K * D
    )


def ema_cases(*sizes: int) -> Iterator[Case]:
    """A float32 teacher of float32 weights, and a float32 master of bfloat16 weights."""
    teacher, student = [torch.randn(n) for n in sizes], [torch.randn(n) for n in sizes]
    half, copies = [s.bfloat16() for s in student], [s.bfloat16() for s in student]
    n, blocks = sum(sizes), sum(-(-size // triton_ema.BLOCK) for size in sizes)
    yield Case("ema_ float32", lambda: triton_ema.ema_(teacher, student, 0.99, []), 12 * n + 24 * blocks, n)
    yield Case("ema_ bfloat16", lambda: triton_ema.ema_(teacher, half, 0.99, copies), 12 * n + 32 * blocks, n)


def sos_cases(C: int, T: int, S: int) -> Iterator[Case]:
    """A chunk of float32."""
    x_CT, sos_S6, state_S2C = torch.randn(C, T), torch.rand(S, 6).double() / 4, torch.zeros(S, 2, C).double()
    width, launches = triton_sos.BLOCK + 2 * S, (T >= triton_sos.BLOCK) + (T % triton_sos.BLOCK > 0)
    maps = 24 * width**2 + 40 * S if T >= triton_sos.BLOCK else 0
    coefficients = 40 * S if T % triton_sos.BLOCK else 0
    moved = 8 * C * T + 32 * S * C * launches + coefficients + maps
    yield Case(f"sos_stream, {T} samples", lambda: triton_sos.sos_stream(x_CT, sos_S6, state_S2C), moved, C * T)


def scan_cases(R: int, L: int, E: int, S: int) -> Iterator[Case]:
    """Half of the channels forwards, half backwards, in slices of one tensor."""
    grad_RLE, inputs = torch.randn(R, L, E), torch.rand(R, L, 2 * E + 2 * S).split((E, E, S, S), 2)
    forward, backward = 4 * R * L * (3 * E + 2 * S), 4 * R * L * (5 * E + 4 * S)
    chunks = 1 if L <= 16 else -(-L // 32)
    if chunks > 1:
        backward += 4 * R * L * (4 * E + 2 * S) + 16 * R * chunks * S * E
    yield Case(f"selective_scan, {L} steps", lambda: triton_scan.selective_scan(*inputs, E // 2), forward, R * L * E)
    args = (grad_RLE, *inputs, None, E // 2)
    yield Case(
        f"selective_scan backward, {L} steps", lambda: triton_scan.selective_scan_backward(*args), backward, R * L * E
    )


def real_cases() -> list[Case]:
    """Sizes as in pretraining on 64 windows of 21 channels and as in a stream of 64, few where more change nothing."""
    found = [*token_cases(64, 21, 4, 34, 128), *ema_cases(128, 128 * 512), *sos_cases(64, 8, 6), *sos_cases(64, 512, 6)]
    return [*found, *scan_cases(64, 16, 64, 16), *scan_cases(8, 512, 64, 16)]


class Nowhere:
    """The driver of a GPU that isn't there."""

    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_device(self) -> int:
        return -1

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


@contextmanager
def recorded(target: GPUTarget) -> Iterator[list]:
    """Launches within are neither compiled nor run but listed: (kernel, how it would have been compiled)."""
    launches = []

    def record(*, fn, compile, **_) -> bool:
        launches.append((fn.jit_function, compile))
        return True  # go no further

    driver.set_active(Nowhere(target))
    knobs.runtime.jit_cache_hook, before = record, knobs.runtime.jit_cache_hook
    try:
        yield launches
    finally:
        knobs.runtime.jit_cache_hook = before
        driver.set_active(None)  # Triton looks for the real one again


def machine_code(kernel, how: dict, target: GPUTarget):
    """A recorded launch, compiled."""
    options = {name: how[name] for name in ("num_warps", "num_stages", "enable_fp_fusion")}
    source = ASTSource(kernel, how["signature"], how["constants"], how["configs"][0])
    return triton.compile(source, target=target, options=options)


def resources(code) -> dict:
    """Registers, shared bytes and spilled bytes of machine code, which a second run of Triton's ptxas tells."""
    assert code.asm["cubin"][:4] == b"\x7fELF"
    ptxas = getattr(knobs.nvidia, "ptxas_blackwell", knobs.nvidia.ptxas).path  # the newer one, where there are two
    name = re.search(r"\.target (\w+)", code.asm["ptx"])[1]  # sm_90a for 90
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "ptx").write_text(code.asm["ptx"])
        command = [ptxas, "-v", "--regAllocOptLevel=2", f"--gpu-name={name}", "ptx", "-o", "cubin"]
        log = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stderr
    spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill", log))
    registers = int(re.search(r"Used (\d+) registers", log)[1])
    return {
        "warps": code.metadata.num_warps,
        "registers": registers,
        "shared": code.metadata.shared,
        "spilled": spilled,
    }


def report(cases: list[Case] | None = None, architectures: tuple[int, ...] = ARCHITECTURES) -> Iterator[dict]:
    """A row for each case, kernel and architecture: op, kernel, sm, warps, registers, shared, spilled, bytes_per_element."""
    for case in real_cases() if cases is None else cases:
        for sm in architectures:
            target = GPUTarget("cuda", sm, 32)
            with recorded(target) as launches:
                case.run()
            for kernel, how in {how["key"]: (kernel, how) for kernel, how in launches}.values():
                row = {"op": case.name, "kernel": kernel.__name__, "sm": sm} | resources(
                    machine_code(kernel, how, target)
                )
                yield row | {"bytes_per_element": round(case.bytes / case.elements, 2)}


def main() -> None:
    architectures = tuple(int(word.removeprefix("sm_")) for word in sys.argv[1:]) or ARCHITECTURES
    for i, row in enumerate(report(architectures=architectures)):
        if i == 0:
            print("| " + " | ".join(row) + " |\n|" + " - |" * len(row))
        print("| " + " | ".join(map(str, row.values())) + " |", flush=True)


if __name__ == "__main__":
    main()
