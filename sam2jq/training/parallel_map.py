"""A function of many items, such as the score of an image, on all devices of all processes."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice, zip_longest
from queue import SimpleQueue
from typing import Any, NamedTuple

import jax
from tqdm import tqdm

from sam2jq.data.loader import prefetched
from sam2jq.training.distributed import all_gather_objects
from sam2jq.training.sharding import own_devices

MISSING = object()


class Replicas(NamedTuple):
    """Equal workers, such as predictors, one for each device of this process; see `replicate`."""

    devices: tuple[jax.Device | None, ...]
    workers: tuple


def replicate(make: Callable[[Any], Any], params: Any) -> Replicas:
    """make(params) for each device of this process, with a copy of the arrays `params` on that device."""
    devices = own_devices()
    if len(devices) == 1:
        return Replicas((None,), (make(params),))

    def make_on(device: jax.Device) -> Any:
        with jax.default_device(device):
            return make(jax.device_put(params, device))

    return Replicas(tuple(devices), tuple(map(make_on, devices)))


def parallel_map(fn: Callable, worker: Any, items: Iterable, unit: str = "image") -> list:
    """[fn(worker, item) for item in items] in every process, with a progress bar in process 0.

    worker: `Replicas`, or one worker for this process. A process gives its next item to the first replica that is free.
    With several processes all of them call this, with the same items, of which each takes one in turn; the results are
    sent as pickles.
    """
    replicas = worker if isinstance(worker, Replicas) else Replicas((None,), (worker,))
    index, processes = jax.process_index(), jax.process_count()
    total = len(items[index::processes]) if isinstance(items, Sequence) else None
    results = map_replicas(fn, replicas, islice(items, index, None, processes))
    own = list(tqdm(results, total=total, unit=unit, leave=False, disable=True if index else None))
    return gather_in_turn(own)


def gather_in_turn(results: list) -> list:
    """The first result of each process, then the second of each, and so on, in every process."""
    in_turn = chain.from_iterable(zip_longest(*all_gather_objects(results), fillvalue=MISSING))
    return [result for result in in_turn if result is not MISSING]


def map_replicas(fn: Callable, replicas: Replicas, items: Iterable) -> Iterator:
    """Yields fn(worker, item) of each item in order; each worker runs in a thread of its own if there are several."""
    if len(replicas.workers) == 1:
        yield from (fn(replicas.workers[0], item) for item in items)
        return
    idle: SimpleQueue = SimpleQueue()
    x64 = jax.config.jax_enable_x64  # threads do not inherit what is set for a block
    for pair in zip(*replicas):
        idle.put(pair)

    def run(item):
        device, worker = idle.get()  # never empty: there are as many threads
        try:
            with jax.default_device(device), jax.enable_x64(x64):
                return fn(worker, item)
        finally:
            idle.put((device, worker))

    number = len(replicas.workers)
    yield from prefetched(run, iter(items), number, 2 * number)
