"""The outputs of one object in a long clip: the newest in memory, all others in a temporary file."""

from collections.abc import Iterator, MutableMapping
from itertools import chain
from typing import Any

import numpy as np

from sam2jq.files import ScratchFile
from sam2jq.predictors.bank_arrays import FrameOutput

IN_MEMORY = 32  # outputs; tracking needs POINTERS before a frame


class SpilledOutputs(MutableMapping[int, FrameOutput]):
    """Outputs by frame number. All have equal shapes and types; the file is deleted together with this object."""

    def __init__(self):
        self._newest: dict[int, FrameOutput] = {}
        self._slots: dict[int, int] = {}  # the file holds records of one size
        self._free: list[int] = []
        self._like: Any = None  # an output of zeros
        self._file = ScratchFile("outputs of earlier frames")

    def __getitem__(self, frame: int) -> FrameOutput:
        return self._newest[frame] if frame in self._newest else self._read(self._slots[frame])

    def __setitem__(self, frame: int, output: FrameOutput) -> None:
        if frame in self:
            del self[frame]
        self._newest[frame] = output
        if len(self._newest) > IN_MEMORY:
            oldest = next(iter(self._newest))
            self._slots[oldest] = self._write(self._newest[oldest])
            del self._newest[oldest]

    def __delitem__(self, frame: int) -> None:
        if frame in self._newest:
            del self._newest[frame]
        else:
            self._free.append(self._slots.pop(frame))

    def __contains__(self, frame) -> bool:
        return frame in self._newest or frame in self._slots

    def __iter__(self) -> Iterator[int]:
        return chain(self._slots, self._newest)

    def __len__(self) -> int:
        return len(self._slots) + len(self._newest)

    def _read(self, slot: int) -> FrameOutput:
        place, parts = slot * record_size(self._like), []
        for like in self._like:
            parts.append(np.frombuffer(self._file.read(place, like.nbytes), like.dtype).reshape(like.shape))
            place += like.nbytes
        return FrameOutput(*parts)

    def _write(self, output: FrameOutput) -> int:
        """The slot that `output` is written to. Raises WriteError if the disk is full."""
        if self._like is None:
            self._like = FrameOutput(*map(np.zeros_like, output))
        slot = self._free.pop() if self._free else len(self._slots)
        content = b"".join(np.asarray(part, like.dtype).tobytes() for part, like in zip(output, self._like))
        self._file.write(slot * len(content), content)
        return slot


def record_size(output: FrameOutput) -> int:
    """Bytes of an output."""
    return sum(part.nbytes for part in output)
