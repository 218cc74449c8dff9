"""The metrics of a run: metrics.jsonl, and Weights & Biases and TensorBoard where the config names them."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import jax

from sam2jq.config.distill import DistillConfig
from sam2jq.config.loader import to_dict
from sam2jq.errors import UserError
from sam2jq.files import atomic_write

Row = dict[str, object]


def open_metrics_file(path: Path, last_step: int, log_fn: Callable[[Row], None]) -> Callable[[Row], None]:
    """A function that appends a row to the JSON lines in `path` and passes it to `log_fn`.

    Rows after `last_step`, which a killed run wrote after its last checkpoint, are deleted first. In processes other
    than 0 the function does nothing.
    """
    if jax.process_index():
        return lambda row: None
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]  # the last line may be cut off
    with atomic_write(path) as temporary:
        temporary.write_text("".join(f"{json.dumps(row)}\n" for row in rows if row["step"] <= last_step))

    def log(row: Row) -> None:
        with path.open("a") as file:
            print(json.dumps(row), file=file)
        log_fn(row)

    return log


@contextmanager
def metric_logger(config: DistillConfig, folder: Path) -> Iterator[Callable[[Row], None]]:
    """A function that sends the numbers in a row of metrics.jsonl, under the same keys, to what `track` names.

    Raises UserError if a package that `track` needs is not installed.
    """
    with ExitStack() as stack:
        sinks = []
        if config.track.project and jax.process_index() == 0:
            sinks.append(open_wandb(stack, config, folder))
        if config.track.tensorboard and jax.process_index() == 0:
            sinks.append(open_tensorboard(stack, folder))

        def send(row: Row) -> None:
            numbers = {key: value for key, value in row.items() if isinstance(value, int | float)}
            for sink in sinks:
                sink(numbers, row["step"])

        yield send


def open_wandb(stack: ExitStack, config: DistillConfig, folder: Path) -> Callable[[dict, int], None]:
    """A function that logs numbers at a step to a new Weights & Biases run, which `stack` closes."""
    try:
        import wandb
    except ModuleNotFoundError as error:
        raise UserError("track.project needs wandb: pip install 'sam2jq[wandb]', or leave it out") from error
    track = config.track
    run = wandb.init(
        project=track.project, entity=track.entity, name=track.run_name, tags=track.tags, mode=track.mode,
        dir=folder, config=to_dict(config), resume="allow",
    )  # fmt: skip
    stack.callback(run.finish)
    return lambda numbers, step: run.log(numbers, step=step)


def open_tensorboard(stack: ExitStack, folder: Path) -> Callable[[dict, int], None]:
    """A function that logs numbers at a step to a TensorBoard event file in folder/tensorboard."""
    try:
        from tensorboardX import SummaryWriter
    except ModuleNotFoundError as error:
        raise UserError("track.tensorboard needs tensorboardX: pip install 'sam2jq[tensorboard]'") from error
    writer = stack.enter_context(SummaryWriter(str(folder / "tensorboard")))
    return lambda numbers, step: [writer.add_scalar(key, value, step) for key, value in numbers.items()]
