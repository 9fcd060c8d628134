"""
What every operation of kernels/ means, in plain PyTorch; it runs wherever the C++ isn't built.

Shapes: B windows, C channels of the batch, T samples.
"""

import errno
import os

import torch


class UnreadableWindow(OSError):
    """Window number `window` of a batch could not be read: the system's error, or a file that ended too early."""

    def __init__(self, window: int, code: int, got_bytes: int, wanted_bytes: int):
        why = os.strerror(code) if code else f"the file ends after {got_bytes} of its {wanted_bytes} bytes"
        super().__init__(code or errno.ENODATA, f"window {window} of the batch: {why}")
        self.window = window


def gather_windows(fds_B, offsets_B, file_channels_B, map_BC, gain_BC, bias_BC, clip, out_BCT) -> None:
    """Fills out_BCT; arguments and errors as for kernels.gather_windows."""
    samples = out_BCT.shape[-1]
    for b in range(len(fds_B)):
        fd, offset, channels = int(fds_B[b]), int(offsets_B[b]), int(file_channels_B[b])
        if channels < 1:
            raise ValueError(f"window {b}: a file of {channels} channels")
        if offset < 0:
            raise ValueError(f"window {b}: byte offset {offset}")
        out_of_file = map_BC[b][(map_BC[b] < -1) | (map_BC[b] >= channels)]
        if len(out_of_file):
            raise ValueError(f"window {b}: channel {out_of_file[0]} of a file of {channels} channels")

        x_TC = read_samples(b, fd, offset, samples, channels)
        x_CT = x_TC.T.float().clamp(-clip, clip).index_select(0, map_BC[b].clamp(min=0))
        if gain_BC is not None:
            x_CT = x_CT * gain_BC[b, :, None]
        if bias_BC is not None:
            x_CT = x_CT + bias_BC[b, :, None]
        out_BCT[b] = x_CT.where(map_BC[b, :, None] >= 0, 0.0)


def read_samples(window: int, fd: int, offset: int, samples: int, channels: int) -> torch.Tensor:
    """Float16 x_TC at byte `offset` of a time-major file; raises UnreadableWindow."""
    x_TC = torch.empty(samples, channels, dtype=torch.float16)
    left = memoryview(x_TC.numpy()).cast("B") if samples else memoryview(b"")
    while left:
        try:
            n = os.preadv(fd, [left], offset)
        except OSError as e:
            raise UnreadableWindow(window, e.errno, x_TC.nbytes - len(left), x_TC.nbytes) from e
        if n == 0:
            raise UnreadableWindow(window, 0, x_TC.nbytes - len(left), x_TC.nbytes)
        left, offset = left[n:], offset + n
    return x_TC
