"""
What the service is judged by: what a chunk costs, how late a prediction is, how many streams it carries, and what overload does.

    python tests/bench_realtime.py                                    # all of it, some minutes on two quiet cores
    python tests/bench_realtime.py --parts ingest                     # one part
    python tests/bench_realtime.py --encoder runs/supervised-1        # this encoder, not an untrained one

`ingest`: parse, filter and cut 64 channels x 8 samples at 500 Hz, in turns with scipy.signal.sosfilt of the same sections on the same chunk, and,
where mne-lsl is installed, with its acquire-and-filter; process CPU time, hot. `latency`: a stream in real time, from the send of the chunk that
completes a window to its line; the same frames go at the same moment to a server that does nothing but answer, in a process of its own like the
service: what the machine does to both is not the service's. `load`: many streams, all in step; CPU time of the service's process, windows shed. `overload`: as many
streams as keep the model busy twice over; latency in steps, memory at the end against the middle.

Prints tables and, last, one JSON line.
"""

import asyncio
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

if __name__ == "__main__":
    os.environ |= {name: "1" for name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS")}

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, only this folder is on the path

from lib import pipelines, sockets, states, wire
from lib.channels import PROFILES
from lib.intake import Intake
from lib.intake import Path as SignalPath
from lib.riemann import learn
from lib.session import Model, Session
from serve_realtime import Config as ServiceConfig
from serve_realtime import Limits, Service

CHANNELS, RATE_HZ, CHUNK = PROFILES["hbn128"].channels[:64], 500.0, 8
PATH = SignalPath(channels=CHANNELS, reference="average", band_hz=(4.0, 40.0), rate_hz=RATE_HZ, settle_s=0.0)


@dataclass(frozen=True)
class Config:
    parts: tuple[Literal["ingest", "latency", "load", "overload"], ...] = ("ingest", "latency", "load", "overload")
    encoder: Path | None = (
        None  # model of train_supervised.py for 64 channels at 500 Hz; none: an untrained one, which is as fast
    )
    seconds: float = 30.0  # of signal in each case
    speed: float = 1.0  # times real time; below 1 on a busy machine: CPU time is per second of signal
    rounds: int = 40  # turns of ingest
    streams: tuple[int, ...] = (1, 16, 32)  # of load
    serve: str | None = None  # what a child process serves: noop, none, or a folder


def main(cfg: Config) -> dict | None:
    if cfg.serve:
        return asyncio.run(noop() if cfg.serve == "noop" else serve(cfg.serve))
    results: dict = {"load": os.getloadavg()[0], "machine": os.uname().machine, "cores": os.cpu_count()}
    with tempfile.TemporaryDirectory() as folder:
        models = {"none": "none", "riemann": trained_riemann(Path(folder) / "riemann")}
        models["encoder"] = str(cfg.encoder or untrained_encoder(Path(folder) / "encoder"))
        if "ingest" in cfg.parts:
            results["ingest"] = ingest(cfg)
        if "latency" in cfg.parts:
            results["latency"] = {name: latency(cfg, model) for name, model in models.items()}
        if "load" in cfg.parts:
            results["streams"] = {n: {k: load(cfg, models[k], n) for k in ("riemann", "encoder")} for n in cfg.streams}
        if "overload" in cfg.parts:
            results["overload"] = load(cfg, "slow", 32)
    return results


# ----------------------------------------------------------------------------------------------------------------------
# models


def trained_riemann(folder: Path) -> str:
    """A pipeline of 64 channels told apart by noise of two shapes, its transport fitted."""
    rng = np.random.default_rng(0)
    y_N, subject_N = np.arange(160) % 2, np.arange(160) // 40
    x_NCT = rng.normal(0, 10, (160, len(CHANNELS), PATH.window))
    x_NCT[y_N == 1, :8] *= 1.5
    made = learn(x_NCT, y_N, subject_N, ("left", "right"), PATH)
    pipelines.save(made.fit({"BACKGROUND": list(x_NCT[:20].astype(np.float32))}), folder)
    return str(folder)


def untrained_encoder(folder: Path) -> Path:
    """A transformer of 4 layers of 128 that sees 64 channels x 2 patches, as train_supervised.py leaves one."""
    from lib.models import Architecture, build_encoder
    from lib.readouts import Decoder, Reading, save_model
    from lib.targets import Target

    architecture = Architecture(rate_hz=RATE_HZ, patch=125)
    decoder = Decoder(build_encoder(architecture), Reading("attention", 2, 4), [Target("task", ("a", "b"), (1.0, 1.0))])
    signal = {"kind": "eeg", "rate_hz": RATE_HZ, "band_hz": [4.0, 40.0], "notch_hz": None, "reference": "average"}
    signal |= {"scale": "none", "causal": True}
    meta = {"signal": signal, "rate_hz": RATE_HZ, "channels": list(CHANNELS), "window_s": 0.5, "lineage": []}
    folder.mkdir()
    save_model(folder / "model.safetensors", decoder, meta)
    return folder


@dataclass(frozen=True)
class Slow:
    """A model that takes 15.6 ms: 32 streams of 4 windows a second are twice what it can do."""

    path: SignalPath = PATH
    name, classes, ready = "slow", ("a", "b"), None

    def warm(self, compile: str) -> dict:
        """Nothing to warm up."""
        return {}

    def predict_proba(self, x_NCT: np.ndarray) -> np.ndarray:
        """The same every time, late."""
        time.sleep(0.0156)
        return np.array([[0.5, 0.5]])


@dataclass(frozen=True)
class Prompt(Slow):
    """A model that takes no time: what is left is the service."""

    name = "prompt"

    def predict_proba(self, x_NCT: np.ndarray) -> np.ndarray:
        """The same every time."""
        return np.array([[0.5, 0.5]])


async def serve(what: str) -> None:
    """A service without the limits that 64 streams would meet, until it is killed."""
    pipeline = {"none": Prompt(), "slow": Slow()}.get(what) or pipelines.load(what, acausal=True)
    cfg = ServiceConfig(listen="127.0.0.1:0", start="INFERENCE", partial_fit=0)
    service = Service(cfg, pipeline, states.load(), Limits(clients=200, producers=128, accept_burst=1000))
    print(json.dumps({"listen": sockets.shown(await service.start())}), flush=True)
    await asyncio.Event().wait()


async def noop() -> None:
    """The same sockets and frames, and a line for each step: nothing is looked at."""
    consumers: list[asyncio.StreamWriter] = []

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        hello = wire.read_handshake(await reader.readuntil(b"\n"))
        writer.write(wire.SERVICE_HANDSHAKE)
        if hello.role == "consumer":
            consumers.append(writer)
            return
        try:
            while True:
                header = wire.parse_header(await reader.readexactly(32), len(CHANNELS))
                await reader.readexactly(header.payload)
                for stop in completed(header.seq, header.samples):
                    metadata = {"stream": hello.stream.name, "stop": stop, "padding": "x" * 200}
                    line = wire.line({"type": "data", "prediction": 0, "window_metadata": metadata})
                    for consumer in consumers:
                        consumer.write(line)
        except asyncio.IncompleteReadError:
            pass

    server = await asyncio.start_server(accept, sock=sockets.listening("127.0.0.1", 0, "noop"))
    print(json.dumps({"listen": sockets.shown(server.sockets[0].getsockname())}), flush=True)
    await asyncio.Event().wait()


def completed(seq: int, samples: int) -> list[int]:
    """Where the windows end that a chunk completes."""
    return (
        [s for s in range(PATH.window, seq + samples + 1, PATH.step) if s > seq] if seq + samples >= PATH.window else []
    )


# ----------------------------------------------------------------------------------------------------------------------
# what a chunk costs


def cpu_us(work, times: int) -> float:
    """CPU time of one call."""
    began = time.process_time()
    for _ in range(times):
        work()
    return (time.process_time() - began) / times * 1e6


def ingest(cfg: Config) -> dict:
    """Medians of CPU us a chunk, and ratios of neighbours in time."""
    from scipy.signal import sosfilt, sosfilt_zi

    stream = wire.Stream("amp", CHANNELS, RATE_HZ)
    rows = {}
    for C, T in ((64, 1), (64, 8), (64, 32)):
        x_TC = np.random.default_rng(0).normal(0, 10, (T, C)).astype(np.float32)
        table = states.load()
        path = Intake(stream, PATH)
        session = Session(stream, path, table, table.states["INFERENCE"], Model(Prompt(), 0), 16, 0)
        sos = path.causal.sos
        state = [sosfilt_zi(sos)[:, None, :].repeat(C, 1) * 1.0]
        x_CT = np.ascontiguousarray(x_TC.T, np.float64)
        seq = [0]

        def ours() -> None:
            frame = wire.HEADER.pack(b"EEG1", 1, 0, C, T, 4 * C * T, seq[0], seq[0] / RATE_HZ) + payload  # noqa: B023
            header = wire.parse_header(frame[:32], C)  # noqa: B023
            for _ in session.samples(wire.parse_frame(header, frame[32:], C), 0.0):  # noqa: B023
                pass
            seq[0] += T  # noqa: B023

        def theirs() -> None:
            _, state[0] = sosfilt(sos, x_CT, axis=1, zi=state[0])  # noqa: B023

        payload = x_TC.tobytes()
        turns = [(cpu_us(ours, 300), cpu_us(theirs, 300)) for _ in range(cfg.rounds)]
        filter_us = [cpu_us(lambda: path.causal.process(x_CT), 300) for _ in range(cfg.rounds)]  # noqa: B023
        rows[f"{C} x {T}"] = {
            "parse_filter_window_us": round(statistics.median(a for a, _ in turns), 1),
            "filter_us": round(statistics.median(filter_us), 1),
            "sosfilt_us": round(statistics.median(b for _, b in turns), 1),
            "sosfilt_per_filter": round(
                statistics.median(b / f for (_, b), f in zip(turns, filter_us, strict=True)), 1
            ),
            "sosfilt_per_ours": round(statistics.median(b / a for a, b in turns), 2),
        }
        print(f"ingest {C} x {T}: {rows[f'{C} x {T}']}", flush=True)
    rows["mne_lsl"] = mne_lsl_us(cfg)
    return rows


def mne_lsl_us(cfg: Config) -> float | str:
    """CPU us of mne-lsl's acquire with a filter, 64 x 8, from an outlet in this process; or why there is none."""
    with tempfile.NamedTemporaryFile("w", suffix=".cfg", delete=False) as file:  # nothing leaves this machine
        file.write("[multicast]\nResolveScope = machine\n[lab]\nKnownPeers = {127.0.0.1}\n")
    os.environ["LSLAPICFG"] = file.name
    try:
        from mne_lsl.lsl import StreamInfo, StreamOutlet
        from mne_lsl.stream import StreamLSL
    except ImportError:
        return "mne-lsl is not installed"
    outlet = StreamOutlet(StreamInfo("bench", "eeg", len(CHANNELS), RATE_HZ, "float32", "bench"), chunk_size=CHUNK)
    stream = StreamLSL(4.0, name="bench", source_id="bench").connect(acquisition_delay=None)
    stream.filter(4.0, 40.0, iir_params={"order": 4, "ftype": "butter", "output": "sos"}, picks="all")
    x_TC = np.random.default_rng(0).normal(0, 10, (CHUNK, len(CHANNELS))).astype(np.float32)
    taken = []
    for _ in range(20 * cfg.rounds):
        outlet.push_chunk(x_TC)
        time.sleep(0.002)
        taken.append(cpu_us(stream.acquire, 1))
    stream.disconnect()
    return round(statistics.median(taken), 1)


# ----------------------------------------------------------------------------------------------------------------------
# from a sample to its prediction


class Child:
    """A server in a process of its own."""

    def __init__(self, what: str):
        words = [sys.executable, __file__, "--serve", what]
        self.process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        self.address = sockets.address(json.loads(self.process.stdout.readline())["listen"], "")

    def cpu_s(self) -> float:
        """CPU time so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory_kib(self) -> int:
        """Resident memory."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("VmRSS"))

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *_) -> None:
        self.process.kill()
        self.process.wait()


async def connect(child: Child, role: str, stream: wire.Stream | None = None):
    reader, writer = await asyncio.open_connection(*child.address, limit=2**20)
    writer.write(wire.handshake("bench", role, None, stream))
    assert b"handshake" in await reader.readline()
    return reader, writer


async def receive(reader: asyncio.StreamReader, arrived: dict) -> None:
    """When each window's line came."""
    while line := await reader.readline():
        now = time.perf_counter()
        message = json.loads(line)
        if message["type"] == "data":
            metadata = message["window_metadata"]
            arrived[metadata["stream"], metadata["stop"]] = now


async def play(
    children: list[Child], streams: int, seconds: float, speed: float, marks: tuple
) -> tuple[list[dict], list[dict], list]:
    """Send the same frames to all children in real time; for each when windows were sent and their lines came; what `marks` saw."""
    writers, tasks, arrived, kept = [], [], [], []
    for child in children:
        arrived.append({})
        reader, writer = await connect(child, "consumer")
        kept.append(writer)  # or it would be closed
        tasks.append(asyncio.create_task(receive(reader, arrived[-1])))
    for i in range(streams):
        stream = wire.Stream(f"s{i}", CHANNELS, RATE_HZ)
        writers.append([(await connect(child, "producer", stream))[1] for child in children])
    x_TC = np.random.default_rng(1).normal(0, 10, (CHUNK, len(CHANNELS))).astype(np.float32)
    sent, seen, marks = [{} for _ in children], [], list(marks)
    began = time.perf_counter()
    for n in range(int(seconds * RATE_HZ / CHUNK)):
        await asyncio.sleep(max(0.0, began + n * CHUNK / RATE_HZ / speed - time.perf_counter()))
        frame, stops = wire.frame_samples(n * CHUNK, n * CHUNK / RATE_HZ, x_TC), completed(n * CHUNK, CHUNK)
        for i in range(streams):
            for writer, own in zip(writers[i], sent, strict=True):
                now = time.perf_counter()  # before it is sent, which takes its time too
                writer.write(frame)
                own |= {(f"s{i}", stop): now for stop in stops}
        while marks and n * CHUNK / RATE_HZ >= marks[0] * seconds:
            marks.pop(0)
            seen.append([(child.cpu_s(), child.memory_kib(), time.perf_counter()) for child in children])
    await asyncio.sleep(1.0)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return sent, arrived, seen


def percentiles(late_ms: list[float]) -> dict:
    """p50, p99 and the longest, ms."""
    return {f"p{q}": round(float(np.percentile(late_ms, q)), 2) for q in (50, 99)} | {"max": round(max(late_ms), 2)}


def latency(cfg: Config, model: str) -> dict:
    """One stream to the service and to the server that does nothing, side by side."""
    with Child(model) as child, Child("noop") as idle:
        (sent, sent_idle), (ours, theirs), seen = asyncio.run(
            play([child, idle], 1, cfg.seconds, cfg.speed, (0.1, 0.99))
        )
    both = [key for key in list(sent)[8:] if key in ours and key in theirs]
    a = {key: (ours[key] - sent[key]) * 1e3 for key in both}
    b = {key: (theirs[key] - sent_idle[key]) * 1e3 for key in both}
    calm_ms = 3 * statistics.median(b.values())
    quiet = [key for key in both if b[key] <= calm_ms]  # when the machine let the server that does nothing answer
    row = {
        "windows": f"{len(both)} of {len(sent) - 8}",
        "service": percentiles([a[k] for k in both]),
        "noop": percentiles([b[k] for k in both]),
        "service_when_quiet": percentiles([a[k] for k in quiet]),
        "quiet": f"{len(quiet)} of {len(both)}",
        "ratio_p50": round(statistics.median(a.values()) / statistics.median(b.values()), 2),
        "core": round((seen[1][0][0] - seen[0][0][0]) / (seen[1][0][2] - seen[0][0][2]) / cfg.speed, 3),
    }
    print(f"latency {Path(model).name}: {row}", flush=True)
    return row


def load(cfg: Config, model: str, streams: int) -> dict:
    """Many streams in step; windows of the last two steps don't count, because what follows them sheds nothing any more."""
    with Child(model) as child:
        (sent,), (ours,), seen = asyncio.run(play([child], streams, cfg.seconds, cfg.speed, (0.1, 0.5, 0.99)))
    newest = max(stop for _, stop in sent)
    sent = {key: at for key, at in sent.items() if key[1] <= newest - 2 * PATH.step}
    late_ms = [(ours[key] - sent[key]) * 1e3 for key in sent if key in ours]
    first, middle, last = (mark[0] for mark in seen)
    row = {
        "answered": f"{len(late_ms)} of {len(sent)}",
        "shed": round(1 - len(late_ms) / len(sent), 4),
        **percentiles(late_ms),
        "steps_behind": round(float(np.percentile(late_ms, 99)) * cfg.speed / (PATH.step / RATE_HZ * 1e3), 2),
        "core": round((last[0] - first[0]) / (last[2] - first[2]) / cfg.speed, 3),
        "grown_kib": last[1] - middle[1],
    }
    print(f"load {Path(model).name} x {streams}: {row}", flush=True)
    return row


if __name__ == "__main__":
    config = tyro.cli(Config, description=__doc__)
    if (found := main(config)) is not None:
        print(json.dumps(found | {"config": json.loads(json.dumps(dataclasses.asdict(config), default=str))}))
