"""
Serve predictions in real time: samples and markers in, one JSON object a line out, for hours.

    python serve_realtime.py --models runs/motor --replay S001R04.edf --speed 20   # a recording as if it were live
    python serve_realtime.py --action client --to 127.0.0.1:7373                   # prints each line as it comes
    python serve_realtime.py --models runs/motor --lsl BrainAmp                    # a stream of the lab, in a process of its own
    python serve_realtime.py --models runs/motor --connect 127.0.0.1:8080          # dials out as well, retries for ever
    python serve_realtime.py --amplifier --page 127.0.0.1:0                        # no model: synthetic EEG, and a page to watch
    python serve_realtime.py --action fit --cache cache/motor --target task --save runs/motor   # a model for all that

One process: the event loop reads, filters and cuts windows; one thread predicts, one fits copies that then replace what predicts. The
protocol, the states and every limit are in docs/realtime.md. Ends on SIGTERM, and with the --replay or --amplifier that it started.
"""

import os

if __name__ == "__main__":  # before NumPy is imported: threads that spin cost more than windows this small give back
    os.environ |= {name: "1" for name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS")}

import asyncio
import contextlib
import dataclasses
import logging
import math
import signal
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from lib import children, command, intake, journal, sockets, states, wire
from lib.errors import Failed, Unusable
from lib.journal import say
from lib.lanes import Lane, Turns, Worker
from lib.listener import Limits, Listener
from lib.outbox import Outbox, dial
from lib.peers import Peer
from lib.session import Fit, Model, NoModel, Outcome, Predict, Session, predict, refit, warm
from lib.vitals import HIGH_BUDGET, Vitals, health, live_line

Action = Literal["serve", "fit", "client", "replay", "lsl", "amplifier"]


@dataclass(frozen=True)
class Config:
    action: Action = "serve"  # fit: a model of a cache; client: print what is served; else what serve starts itself
    # in and out
    listen: str = "127.0.0.1:7373"  # HOST:PORT for producers, consumers and control; port 0 means any
    connect: tuple[str, ...] = ()  # servers HOST:PORT to send predictions to; retried for ever
    to: str = "127.0.0.1:7373"  # the service that --action replay, lsl, amplifier and client talk to
    token_file: Path | None = None  # what peers must know; none: the environment's BERGER_TOKEN, if there is one
    tls_cert: Path | None = None  # PEM; with --tls-key, peers speak TLS
    tls_key: Path | None = None  # PEM
    tls_ca: Path | None = None  # PEM that vouches for the servers of --connect and --to; none: plain TCP
    silence_s: float = 60.0  # a producer that sends nothing for so long is closed, s; a ping is enough
    # what predicts
    models: Path | None = None  # a saved session or pipeline, or a training run; none: every prediction is null
    acausal: bool = False  # serve a model that was trained on a zero-phase cache all the same
    compile: Literal["auto", "on", "off"] = "auto"  # an encoder; auto: where it pays; off with --sync
    step: int | None = None  # samples between windows; none: what the model says
    settle_s: float | None = None  # after a start or gap, before windows count, s; none: what the model says
    bad_channels: tuple[str, ...] = ()  # zero in every window, and in no average
    missing: Literal["reject", "mask"] = "reject"  # channels that the model wants and a stream lacks; mask: as bad ones
    partial_fit: int = 10  # windows that don't overlap per partial fit; 0: none
    collect_s: float = 300.0  # most that is kept of each group of windows, s; and at most 32 MiB
    sync: bool = False  # predict and fit inline: the same predictions, to the bit, however the samples came in
    save: Path | None = None  # folder for the pipeline: of --action fit; of a session, at its end or when asked
    # session
    states: Path | None = None  # TOML that replaces the table of states; docs/realtime.md has the default
    start: str = "auto"  # state that a stream begins in; auto: INFERENCE with --replay or --amplifier, else the table's
    # sources that the service starts, each in a process of its own
    replay: Path | None = None  # a recording of any kind that build_cache.py reads, or a recorded session
    speed: float = 1.0  # of --replay: times real time; 0: as fast as acknowledged
    lsl: str | None = None  # name or source id of an LSL stream; needs pip install -e '.[lsl]'
    lsl_markers: str = "auto"  # its marker stream: auto, none, or a name
    lsl_unit: str | None = None  # unit of its samples, where the stream doesn't say
    lsl_channels: str | None = None  # names of its channels, comma-separated, where the stream doesn't say
    lsl_scope: Literal["machine", "network"] = "machine"  # where to look for it
    amplifier: bool = False  # synthetic EEG with known truth
    seconds: float = 0.0  # length of --amplifier, s, with which the service ends; 0: for ever
    seed: int = 0  # of --amplifier
    framing: Literal["binary", "ndjson"] = "binary"  # how these sources send
    chunk: int = 0  # samples they send at a time; 0: 40 ms of them
    wait: int = 0  # consumers to wait for before a source starts
    stay: bool = False  # go on when --replay or --amplifier has ended
    # --action fit: from a cache to a folder for --models
    cache: tuple[Path, ...] = ()  # of --action fit, built with --causal
    target: str | None = None  # column or event label to tell
    pipeline: Literal["riemann", "encoder", "hybrid"] = "riemann"  # what to make
    encoder: Path | None = None  # model.safetensors of train_supervised.py, for encoder and hybrid
    where: tuple[str, ...] = ()  # which recordings, such as task=fist
    window_s: float | None = None  # of windows, s; none: the target's or the encoder's
    stride_s: float | None = None  # between windows, s
    after_s: float = 0.0  # from an event to its first window, s
    event_s: float = 0.0  # how long an event lasts that doesn't say so, s
    remove_eyes: bool = False  # leave room for eye movements to be removed, as fitted in each session
    transport_min: int = 10  # windows of a subject before parallel transport counts as fitted
    allow_leak: bool = False  # calibrate and score on people that the --encoder was trained on
    # what people see
    lines: int = 0  # that --action client prints; 0: for ever
    record: Path | None = None  # file for everything that producers send; --replay plays it again
    page: str | None = None  # HOST:PORT of a page that shows it all, on loopback; port 0 means any
    log_level: Literal["debug", "info", "warning", "error"] = "info"  # on stderr and in --log-file
    log_file: Path | None = None  # JSON lines, rotated


MOST_BYTES = 2**25  # of the windows kept of a group, whatever --collect-s says


def signal_path(cfg: Config, path: intake.Path) -> intake.Path:
    """What the model needs of the signal, with what may differ from stream to stream as the flags say. Raises Unusable."""
    if cfg.step is not None and cfg.step < 1:
        raise Unusable(f"--step {cfg.step} must be at least one sample")
    settle_s = path.settle_s if cfg.settle_s is None else cfg.settle_s
    step = path.step if cfg.step is None else cfg.step
    return dataclasses.replace(path, step=step, settle_s=settle_s, bad=cfg.bad_channels, partial=cfg.missing == "mask")


class Service:
    """Sockets, threads and queues around sessions; everything but `predict` and `refit` runs on the event loop."""

    def __init__(self, cfg: Config, pipeline: Any, table: states.Table, limits: Limits):
        self.cfg, self.table, self.limits = cfg, table, limits
        self.model = Model(pipeline, 0)  # what every stream begins with
        self.token, self.tls = sockets.read_token(cfg.token_file), sockets.server_tls(cfg.tls_cert, cfg.tls_key)
        self.dial_tls = sockets.client_tls(cfg.tls_ca)
        self.host, self.port = sockets.address(cfg.listen, "--listen")
        sockets.check_exposure(self.host, self.token, self.tls)
        self.sinks = [sockets.address(text, "--connect") for text in cfg.connect]
        self.vitals, self.complain = Vitals(), journal.Complaints()
        self.lanes: dict[str, Lane] = {}
        self.outboxes: set[Outbox] = set()
        self.turns = Turns(limits.slots)
        roles = {"producer": self._produce, "consumer": self._consume, "control": self._control}
        self.listener = Listener(limits, self.token, self.vitals, self.complain, roles)
        self.inferring: float | None = None  # since when
        self.recorder = self.page = None
        self.warmed: dict | None = None
        self.unsaved: Unusable | None = None  # why --save came to nothing at the end
        self.tasks: set[asyncio.Task] = set()

    # ------------------------------------------------------------------------
    # beginning and end

    async def start(self) -> tuple[str, int]:
        """Warm up, listen, dial; the address it got. Raises Unusable."""
        sys.setswitchinterval(0.0005)  # s; a fit in another thread holds up a sample for no longer
        self.loop = asyncio.get_running_loop()
        self.inference, self.fitter = Worker(self.loop, "inference"), Worker(self.loop, "fit")
        link = sockets.listening(self.host, self.port, "--listen", self.limits.stall_s)
        self.address = link.getsockname()[:2]
        await self._warm_up()
        if self.cfg.record:
            from lib.recorder import Recorder

            self.recorder = Recorder(self.cfg.record)
        if self.cfg.page:
            from lib.page import Page

            self.page = Page(*sockets.address(self.cfg.page, "--page"))
        await self.listener.open(link, self.tls)
        for host, port in self.sinks:
            outbox, counts, limits = Outbox(f"--connect {host}:{port}"), self.vitals.counts, self.limits
            self.outboxes.add(outbox)
            call = dial(host, port, self.dial_tls, outbox, limits.stall_s, limits.backoff_s, counts, self.complain)
            self._task(call)
        self._task(self._watch())
        return self.address

    async def close(self) -> dict:
        """Stop taking, work off what waits, say bye; the totals."""
        self.listener.stop()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._idle(), self.limits.drain_s)
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._flushed(), self.limits.drain_s)
        saved = None
        try:
            saved = self._save() if self.cfg.save else None
        except Unusable as error:  # a full disk must not cost the recording its end, nor the peers theirs
            self.unsaved = error
        await self.listener.close()
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        self.inference.close()
        self.fitter.close()
        recorded = self.recorder.close() if self.recorder else None
        if self.page:
            self.page.close()
        total = self.vitals.spans["total"]
        return {
            "listen": sockets.shown(self.address),
            "streams": len(self.lanes),
            "windows": sum(lane.session.counts["windows"] for lane in self.lanes.values()),
            **{name: self.vitals.counts[name] for name in ("predicted", "shed", "fits", "partial_fits")},
            "skipped": dict(self.vitals.skipped),
            "latency_p50_ms": total.summary()["p50_ms"],
            "latency_p99_ms": total.summary()["p99_ms"],
            "saved": saved,
            "recorded": recorded,
            "seconds": round(time.monotonic() - self.vitals.began_s, 3),
        }

    def _task(self, work) -> asyncio.Task:
        task = asyncio.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self._task_done)
        return task

    def _task_done(self, task: asyncio.Task) -> None:
        self.tasks.discard(task)
        if not task.cancelled() and task.exception():
            self.vitals.counts["bugs"] += 1
            journal.LOG.error("a task died", exc_info=task.exception())

    async def _idle(self) -> None:
        for lane in list(self.lanes.values()):
            await lane.idle.wait()

    async def _flushed(self) -> None:
        for outbox in list(self.outboxes):
            await outbox.empty.wait()

    async def _warm_up(self) -> None:
        """Windows of noise, so that the first real one isn't the slow one."""
        done = self.loop.create_future()
        compile = "off" if self.cfg.sync else self.cfg.compile
        self.inference.submit(partial(warm, self.model.pipeline, compile), done.set_result)
        self.warmed, error = await done
        if error:
            raise Unusable(f"--models {self.cfg.models}: the model fails on a window of noise: {error}") from error

    # ------------------------------------------------------------------------
    # producers: samples and events in

    async def _produce(self, peer: Peer) -> None:
        stream, lane = peer.stream, self._lane(peer, peer.stream)
        number, name = self.vitals.counts["producers"], stream.name
        say(logging.INFO, f"stream {name}: {len(stream.channels)} channels at {stream.rate_hz:g} Hz", stream=name)
        if self.recorder:
            self.recorder.opened(number, stream)
        try:
            peer.writer.write(wire.SERVICE_HANDSHAKE)
            async for message, head, payload in peer.messages(stream):
                peer.quiet_s, arrived_s = 0.0, time.monotonic()
                if self.recorder:
                    keep = self.recorder.frame if stream.framing == "binary" else self.recorder.line
                    keep(number, *filter(None, (head, payload)))
                if isinstance(message, wire.Samples):
                    lane.heard(len(message.x_TC) / stream.rate_hz)
                    began_s = time.perf_counter()
                    await self._act(lane, lane.session.samples(message, arrived_s), arrived_s)
                    self.vitals.counts["samples"] += len(message.x_TC)
                    self.vitals.spans["ingest"].add(time.perf_counter() - began_s)
                    if self.page:
                        self.page.samples(name, stream.rate_hz, stream.channels, message.seq, message.x_TC)
                elif isinstance(message, wire.Event):
                    self.vitals.counts["events"] += 1
                    await self._act(lane, lane.session.event(message), arrived_s)
                elif isinstance(message, wire.Ping):
                    await self._pong(lane, peer, message.id)
                else:
                    return
        finally:
            if lane.peer is peer:
                lane.peer, lane.left_s = None, time.monotonic()
            if self.recorder:
                self.recorder.closed(number, peer.reason or "end")

    def _lane(self, peer: Peer, stream: wire.Stream) -> Lane:
        """The lane of a stream: a new one, or the one of a producer that has gone or is replaced. Raises Malformed."""
        lane = self.lanes.get(stream.name)
        if lane and lane.peer and self.token is None:
            raise wire.Malformed(
                "name_in_use", f"there is a stream {stream.name}; only with a token it can be replaced"
            )
        live = sum(other.peer is not None for other in self.lanes.values() if other is not lane)
        if live >= self.limits.producers:
            raise wire.Malformed("too_many_producers", f"there are {live} producers already")
        if lane is None or lane.session.stream != stream:
            session = self._session(stream)
            while len(self.lanes) >= 2 * self.limits.producers:
                absent = [n for n, kept in self.lanes.items() if kept.peer is None]
                del self.lanes[min(absent, key=lambda n: self.lanes[n].left_s)]
            old, lane = lane, Lane(session)
        else:
            old = lane
        if old and old.peer:
            old.peer.end("replaced", wire.error("replaced", "another connection took over this stream"))
        lane.peer, lane.pause_s, lane.paused = peer, 0.0, False
        lane.session.attach()
        lane.settle()
        self.lanes[stream.name] = lane
        self.vitals.counts["producers"] += 1
        return lane

    def _session(self, stream: wire.Stream) -> Session:
        try:
            path = intake.Intake(stream, self.model.pipeline.path)
        except Unusable as error:
            raise wire.Malformed("mismatch", str(error)) from None
        cfg, start = self.cfg, self.table.start
        if cfg.start != "auto":
            start = cfg.start
        elif cfg.replay or cfg.amplifier:
            start = self.table.predicting() or start
        window_bytes = 4 * len(path.names) * path.path.window
        most = max(1, min(int(cfg.collect_s * path.out_hz / path.path.window), MOST_BYTES // window_bytes))
        state = self.table.states[start]
        partial_every = 0 if isinstance(self.model.pipeline, NoModel) else cfg.partial_fit
        return Session(stream, path, self.table, state, self.model, most, partial_every)

    async def _act(self, lane: Lane, actions, arrived_s: float) -> None:
        """Do what a session asks for, in its order."""
        for action in actions:
            if isinstance(action, Fit):
                self._fit(lane, action)
            elif self.cfg.sync:
                model = lane.session.model
                self._publish(lane, action, model, predict(model, action.window), 0.0)
                await self._flushed()
            else:
                self._queue(lane, action)

    async def _pong(self, lane: Lane, peer: Peer, id: int) -> None:
        """Answer a ping once all that came before it has been predicted and sent: what a quick replay is paced by."""
        paused_s, lane.pause_s, peer.quiet_s = lane.pause_s, -math.inf, -math.inf  # its silence is our doing
        await lane.idle.wait()
        await self._flushed()
        lane.pause_s, peer.quiet_s = paused_s, 0.0
        pong = {"type": "pong", "id": id, "seq": lane.session.next_seq}
        await peer.answer(wire.line(pong), self.limits.stall_s)

    # ------------------------------------------------------------------------
    # windows to predictions: one thread, streams take turns, of each the newest windows

    def _queue(self, lane: Lane, job: Predict) -> None:
        if self.turns.put(lane, job):
            self.vitals.counts["shed"] += 1
            name = lane.session.stream.name
            self.complain("shed", f"stream {name}: more windows than can be predicted, the oldest are dropped")
        lane.settle()
        self._dispatch()

    def _dispatch(self) -> None:
        if self.inferring is not None or (turn := self.turns.take()) is None:
            return
        lane, job = turn
        model = lane.session.model
        lane.predicting, self.inferring = True, time.monotonic()
        done = partial(self._predicted, lane, job, model, self.inferring - job.arrived_s)
        self.inference.submit(partial(predict, model, job.window), done)

    def _predicted(self, lane: Lane, job: Predict, model: Model, queue_s: float, outcome: Outcome) -> None:
        lane.predicting, self.inferring = False, None
        try:
            self._dispatch()
            self._publish(lane, job, model, outcome, queue_s)
        finally:
            lane.settle()

    def _publish(self, lane: Lane, job: Predict, model: Model, outcome: Outcome, queue_s: float) -> None:
        """A data line to every consumer."""
        message = lane.session.message(job, model, outcome, lane.shed)
        data = wire.line(message)
        for outbox in self.outboxes:
            outbox.offer(message, data)
        total_s = time.monotonic() - job.arrived_s
        if outcome.reason is None:
            self.vitals.predicted(queue_s, outcome.seconds, total_s)
        else:
            code = outcome.reason.partition(":")[0]
            self.vitals.skipped[code] += 1
            text = f"stream {lane.session.stream.name}: no prediction, {outcome.reason}"
            self.complain(f"skipped {code}", text, outcome.error)
        if self.page:
            self.page.prediction(
                lane.session.stream.name, job.window.stop, job.state, message["prediction"], message["probability"],
                outcome.reason, total_s, message["window_metadata"].get("label"),
            )  # fmt: skip

    # ------------------------------------------------------------------------
    # fits: another thread, one at a time and stream, on copies

    def _fit(self, lane: Lane, fit: Fit) -> None:
        if self.cfg.sync:
            self._refitted(lane, fit, refit(lane.session.model.pipeline, fit))
        else:
            lane.want(fit)
            self._next_fit(lane)

    def _next_fit(self, lane: Lane) -> None:
        if lane.fits and not lane.fitting:
            lane.fitting, fit = True, lane.fits.pop(0)
            self.fitter.submit(partial(refit, lane.session.model.pipeline, fit), partial(self._refitted, lane, fit))
        lane.settle()

    def _refitted(self, lane: Lane, fit: Fit, result: tuple[Any, BaseException | None]) -> None:
        pipeline, error = result
        kind, name = "fit" if fit.groups is not None else "partial_fit", lane.session.stream.name
        if error:
            self.vitals.counts[f"{kind}_errors"] += 1
            known = isinstance(error, (Unusable, ValueError))
            text = f"stream {name}: {kind} failed, the model stays: {error}"
            self.complain(f"{kind} error", text, None if known else error)
        else:
            lane.session.adopt(pipeline)
            self.vitals.counts[f"{kind}s"] += 1
            level = logging.INFO if fit.groups is not None else logging.DEBUG
            say(level, f"stream {name}: {kind}, model version {lane.session.model.version}", stream=name)
        if not self.cfg.sync:
            lane.fitting = False
            self._next_fit(lane)

    # ------------------------------------------------------------------------
    # consumers: predictions out

    async def _consume(self, peer: Peer) -> None:
        outbox = Outbox(f"consumer {peer.name}")
        peer.writer.write(wire.SERVICE_HANDSHAKE)
        self.outboxes.add(outbox)
        try:
            await outbox.deliver(peer.reader, peer.writer, self.limits.stall_s)
        finally:
            self.outboxes.remove(outbox)
            self.vitals.counts["lines_dropped"] += outbox.dropped

    # ------------------------------------------------------------------------
    # control, and what people see

    async def _control(self, peer: Peer) -> None:
        peer.writer.write(wire.SERVICE_HANDSHAKE)
        answers = {"stats": self.stats, "health": self.health}
        while True:
            try:
                message = wire.read_line(await peer.line())
            except asyncio.IncompleteReadError as error:
                if error.partial:
                    raise
                return
            kind = message.get("type")
            if kind == "save" and self.cfg.save:
                data = await self._saved()
            elif isinstance(kind, str) and kind in answers:
                data = wire.line(answers[kind]())
            else:
                raise wire.Malformed("bad_request", '"type" must be stats, health, or with --save save')
            await peer.answer(data, self.limits.stall_s)

    def stats(self) -> dict:
        """Everything that is counted."""
        streams = [lane.stats() for lane in self.lanes.values()]
        boxes = [{"name": b.name, "waiting": len(b.lines), "dropped": b.dropped} for b in self.outboxes]
        now_s = time.monotonic()
        return {
            "type": "stats",
            **self.vitals.summary(),
            "warm": self.warmed is not None,
            "budget": round(self.budget(), 4),
            "predicting_s": 0.0 if self.inferring is None else round(now_s - self.inferring, 3),
            "peers": {role: len(self.listener.of(role)) for role in (*wire.ROLES, "nobody")},
            "streams": streams,
            "consumers": boxes,
        }

    def budget(self) -> float:
        """Share of the time that predicting takes; above 1 windows are shed."""
        lanes = [lane.session for lane in self.lanes.values() if lane.peer and lane.session.state.predict]
        return self.vitals.budget(sum(s.intake.out_hz / s.intake.path.step for s in lanes))

    def health(self) -> dict:
        """Whether it is ready, and what is wrong."""
        problems = [self.recorder.error] if self.recorder and self.recorder.error else []
        return health(self.stats(), problems + ["stopping"] * self.listener.stopping, self.listener.stopping)

    def _save(self) -> str | None:
        """The newest session's pipeline, as fitted."""
        fitted = [lane for lane in self.lanes.values() if lane.session.model.version]
        if not fitted:
            return None
        lane = max(fitted, key=lambda lane: (lane.peer is not None, lane.left_s))
        from lib import pipelines  # takes a second: only who saves or loads a model waits for it

        pipelines.save(lane.session.model.pipeline, self.cfg.save)
        return str(self.cfg.save)

    async def _saved(self) -> bytes:
        """Save when control asks, and what it is told."""
        try:
            return wire.line({"type": "saved", "path": await self.loop.run_in_executor(None, self._save)})
        except Unusable as error:
            self.complain("not saved", f"control asked for a save: {error}")
            return wire.error("not_saved", str(error))

    async def _watch(self) -> None:
        """Twice a second: silent producers, streams without samples, the channels of one stream after the other, the live line, the page."""
        turn_s, turn = 0.5, 0
        while True:
            await asyncio.sleep(turn_s)
            for peer in self.listener.of("producer"):
                peer.quiet_s += turn_s
                if peer.quiet_s > self.limits.silence_s:
                    why = f"nothing came for {self.limits.silence_s:g} s (--silence-s): send a ping now and then"
                    peer.end("silent", wire.error("silent", why))
            present = [lane for lane in self.lanes.values() if lane.peer]
            for lane in present:
                lane.wait(turn_s, self.limits.pause_s)
            if (budget := self.budget()) > HIGH_BUDGET:
                self.complain("budget", f"predicting takes {budget:.0%} of the time between windows")
            if not (self.page or sys.stderr.isatty()):
                continue
            turn += 1
            for lane in present[turn % max(len(present), 1) :][:1]:  # some ms each, in which no sample is read
                lane.session.quality = lane.session.intake.quality()
            stats = self.stats()
            journal.live(live_line(stats))
            if self.page:
                self.page.update({"streams": stats["streams"], "stats": stats, "health": self.health()})


# ----------------------------------------------------------------------------------------------------------------------
# The command


async def serve(cfg: Config, pipeline: Any, table: states.Table) -> tuple[dict, bool]:
    """Run until a signal, or until a source it started has ended: totals, and whether Ctrl-C ended it. Raises Unusable."""
    service = Service(cfg, pipeline, table, Limits(silence_s=cfg.silence_s))
    stop, caught = asyncio.Event(), []
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, lambda number=number: (caught.append(number), stop.set()))
    listen = sockets.shown(await service.start())
    watched = service.page and f"http://{sockets.shown(service.page.address)}/"
    command.emit({"ready": True, "listen": listen, "connect": cfg.connect, "page": watched, "pid": os.getpid()})
    kinds = [kind for kind in ("replay", "lsl", "amplifier") if getattr(cfg, kind)]
    sources = [asyncio.create_task(source(cfg, service, kind, stop)) for kind in kinds]
    await stop.wait()
    for task in sources:
        task.cancel()
    ended = await asyncio.gather(*sources, return_exceptions=True)
    totals = await service.close()
    for problem in ended:
        if problem is not None and not isinstance(problem, asyncio.CancelledError):
            raise problem
    if service.unsaved:
        command.emit(totals)
        raise service.unsaved
    return totals, signal.SIGINT in caught


async def source(cfg: Config, service: Service, kind: str, stop: asyncio.Event) -> None:
    """
    A source in a process of its own, so that whatever it imports or dies of is not ours; started again when it dies.

    One that ends by itself (a replay, an amplifier after --seconds) ends the service. Raises Unusable or Failed, as the process did.
    """
    while len(service.outboxes) - len(cfg.connect) < cfg.wait:
        await asyncio.sleep(0.05)
    host, port = service.address
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    same = "framing chunk speed seconds seed lsl_markers lsl_unit lsl_channels lsl_scope".split()  # flags of its own
    given = {"action": kind, "to": sockets.shown((host, port)), "tls_ca": cfg.tls_ca or cfg.tls_cert}
    given |= {name: getattr(cfg, name) for name in (*same, *([kind] if kind != "amplifier" else []))}
    flags = [w for name, value in given.items() if value is not None for w in (f"--{name.replace('_', '-')}", value)]
    variables = {sockets.TOKEN_VARIABLE: service.token} if service.token else {}
    try:
        await children.keep(Path(__file__), flags, kind, variables, kind != "replay", service.vitals.counts)
    except (Unusable, Failed):
        stop.set()
        raise
    if not cfg.stay:
        stop.set()


def main(cfg: Config) -> dict | None:
    """Serve, or be one of the processes that talk to a service."""
    command.check_signs(
        cfg,
        positive="window_s stride_s silence_s",
        not_negative="settle_s partial_fit collect_s speed seconds seed chunk wait event_s transport_min lines",
    )
    journal.start(cfg.log_level, cfg.log_file)
    if cfg.action == "fit":
        return fit(cfg)
    if cfg.action != "serve":
        return talk(cfg)
    table = states.load(cfg.states)
    if cfg.start != "auto" and cfg.start not in table.states:
        raise Unusable(f"--start {cfg.start} is no state of {', '.join(table.states)}")
    if cfg.models is None:
        pipeline = NoModel(signal_path(cfg, NoModel().path))
    else:
        from lib import pipelines

        pipeline = pipelines.load(cfg.models, cfg.acausal)
        pipeline = pipelines.with_path(pipeline, signal_path(cfg, pipeline.path))
        if cfg.save:
            pipelines.check_folder(cfg.save)
    if cfg.save and cfg.models is None:
        raise Unusable("--save keeps a model as fitted: it needs --models")
    totals, interrupted = asyncio.run(serve(cfg, pipeline, table))
    if interrupted:
        command.emit(totals)
        raise KeyboardInterrupt("the service has stopped")
    return totals


def fit(cfg: Config) -> dict:
    """Make a pipeline from a cache, for --models. Raises Unusable."""
    from lib import served

    if not cfg.cache or not cfg.target or not cfg.save:
        raise Unusable("--action fit needs --cache DIR, --target COLUMN and --save DIR")
    return served.fit(
        cfg.cache, cfg.target, cfg.pipeline, cfg.save, encoder=cfg.encoder, where=cfg.where, window_s=cfg.window_s,
        stride_s=cfg.stride_s, after_s=cfg.after_s, event_s=cfg.event_s, remove_eyes=cfg.remove_eyes,
        transport_min=cfg.transport_min, allow_leak=cfg.allow_leak,
    )  # fmt: skip


def talk(cfg: Config) -> dict:
    """The other side of the connection. Raises Unusable."""
    to, token, tls = sockets.address(cfg.to, "--to"), sockets.read_token(cfg.token_file), cfg.tls_ca and str(cfg.tls_ca)
    if cfg.action == "client":
        from lib import consumer

        return consumer.run(to, token, tls, cfg.lines)
    if cfg.action == "replay":
        from lib import replay

        if cfg.replay is None:
            raise Unusable("--action replay needs --replay FILE")
        return replay.run(cfg.replay, to, cfg.speed, framing=cfg.framing, chunk=cfg.chunk, token=token, tls=tls)
    if cfg.action == "lsl":
        from lib import lsl

        if cfg.lsl is None:
            raise Unusable("--action lsl needs --lsl NAME")
        return lsl.run(
            cfg.lsl, to, cfg.lsl_markers, cfg.lsl_unit, cfg.lsl_scope,
            stated=tuple(cfg.lsl_channels.split(",")) if cfg.lsl_channels else None,
            framing=cfg.framing, token=token, tls=tls,
        )  # fmt: skip
    from lib import amplifier

    return amplifier.run(
        to,
        seconds=cfg.seconds,
        speed=cfg.speed,
        seed=cfg.seed,
        chunk=cfg.chunk,
        framing=cfg.framing,
        token=token,
        tls=tls,
    )


if __name__ == "__main__":
    sys.exit(command.run(main, Config, __doc__))
