"""Frames read by a thread before they are asked for."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from copy import copy
from typing import Any

AHEAD = 4  # frames, where they are read in rising order
BLOCK = 16  # frames read at once where they are read in falling order


def read_ahead(read: Callable[[int], Any], length: int) -> Callable[[int], Any]:
    """`read`, called by one thread only, that is AHEAD items ahead as soon as two are asked for in rising order.

    Where they are asked for in falling order, blocks of BLOCK are read in rising order, as video files are decoded. At
    most BLOCK + 2 items are kept. An error of `read` is raised for its index only.
    """
    pool, lock = ThreadPoolExecutor(1, "read_ahead"), threading.Lock()
    items: dict[int, Future] = {}
    last, step = 0, 0

    def read_item(index: int):
        nonlocal last, step
        with lock:
            step = index - last if index != last else step
            last = index
            if step == 1:
                wanted, kept = range(index, min(index + AHEAD + 1, length)), range(index - 1, index + AHEAD + 1)
            elif step == -1:
                wanted = range(max(index - BLOCK + 1, 0), index + 1) if index not in items else range(0)
                kept = range(index - BLOCK, index + 2)
            else:
                wanted, kept = range(index, index + 1), range(index, index + 1)
            for old in [i for i in items if i not in kept]:
                items.pop(old).cancel()
            for i in wanted:
                if i not in items:
                    items[i] = pool.submit(read, i)
            found = items[index]
        return copy(found.result())  # which the caller may change

    return read_item
