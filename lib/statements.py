"""What a file says of its rate, unit and channels, against what is stated about it; the reason of a refusal names the mend."""

import math
from collections.abc import Mapping

from lib import channels
from lib.edf_header import UNITS
from lib.errors import Rejected


def settle_rate(own: float | None, stated: float | None, name: str, tolerance: float = 1e-3) -> float:
    """The sampling rate, in Hz. Raises Rejected: `rate_missing`, `rate_impossible`, `rate_conflict`."""
    rates = [rate for rate in (own, stated) if rate is not None]
    if not rates:
        raise Rejected("rate_missing", f"{name} doesn't carry its sampling rate: state rate_hz in dataset.toml")
    if not all(math.isfinite(rate) and rate > 0 for rate in rates):
        raise Rejected("rate_impossible", f"{name}: {rates[0]:g} or {rates[-1]:g} Hz is no sampling rate")
    if max(rates) - min(rates) > tolerance * rates[0]:
        raise Rejected("rate_conflict", f"{name} says {rates[0]:g} Hz, but rate_hz = {stated:g} is stated")
    return float(rates[-1])


ARBITRARY = "a.u."
VIBRATION_UNITS = (
    "g",
    "mg",
    "m/s2",
    "m/s^2",
    "m/s²",
    "mm/s2",
    "mm/s",
    "m/s",
)  # who states one of these means vibration
UNIT_WORDS = {"volts": 1e6, "millivolt": 1e3, "millivolts": 1e3}  # beside those of EDF headers


def settle_unit(own: str | None, stated: str | None, name: str) -> tuple[str, float]:
    """
    (`uV`, factor to microvolts), or (`a.u.`, 1) if it is stated that the unit is unknown.

    A stated unit also replaces one that is no voltage. Raises Rejected: `unit_missing`, `unit_unknown`, `unit_conflict`.
    """
    if stated == ARBITRARY:
        return ARBITRARY, 1.0
    mend = (
        f'state unit = "uV" in dataset.toml (or "mV", "V"; "g" or "m/s2" for vibration; "{ARBITRARY}" if nobody knows)'
    )
    texts = [(text or "").strip() for text in (own, stated)]
    factors = [UNITS.get(t) or UNITS.get(t.lower()) or UNIT_WORDS.get(t.lower()) for t in texts]
    if not any(texts):
        raise Rejected("unit_missing", f"{name} doesn't carry its unit: {mend}")
    if not any(factors) or texts[1] and not factors[1]:
        raise Rejected("unit_unknown", f"{name}: {texts[1] or texts[0]!r} is no unit of voltage: {mend}")
    if all(factors) and factors[0] != factors[1]:
        raise Rejected("unit_conflict", f"{name} says {texts[0]}, but unit = {texts[1]!r} is stated")
    return "uV", factors[0] or factors[1]


def settle_channels(
    own: list[str], stated: tuple[str, ...] | None, count: int, name: str
) -> tuple[list[str], list[int]]:
    """
    (names, columns) of the channels to take: stated ones choose from the file's, or name all columns where it doesn't.

    `own` is empty where the file has no names. Raises Rejected: `channels_missing`, `channels_conflict`.
    """
    everything = list(range(count))
    complete = len(own) == count and all(own)
    has = f"{name} has {count} channels" + (f" ({', '.join(own)})" if complete else "")
    if stated and complete and set(stated) <= set(own):
        return list(stated), [own.index(channel) for channel in stated]
    if stated and (len(stated) != count or complete and any(channels.kind(channel) == "eeg" for channel in own)):
        raise Rejected("channels_conflict", f"{has}, but {', '.join(stated)} are stated")
    if stated:
        return list(stated), everything
    if own and len(own) != count:
        raise Rejected("channels_conflict", f"{has}, but names for {len(own)}: state channels in dataset.toml")
    if count == 1 and not complete:
        return ["ch1"], everything  # one channel can't be mistaken for another; its place stays unknown
    if not complete:
        raise Rejected("channels_missing", f"{has} without names: state channels in dataset.toml")
    return own, everything


def settle_shaft(columns: Mapping[str, object]) -> float:
    """Turns per second of a machine's shaft that columns of a recording state, as `shaft_hz` or `rpm`; NaN where they don't."""
    from lib.labels import number  # here: it needs readers, which need this module

    hz, per_minute = (number(str(columns.get(name, ""))) for name in ("shaft_hz", "rpm"))
    return hz or (per_minute or math.nan) / 60
