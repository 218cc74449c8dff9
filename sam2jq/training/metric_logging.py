"""Curves for those who watch: Weights & Biases and TensorBoard, where they are asked for."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import jax

from sam2jq.config.distill import DistillConfig
from sam2jq.config.loader import to_dict
from sam2jq.errors import UserError


@contextmanager
def metric_logger(config: DistillConfig, folder: Path) -> Iterator[Callable[[dict], None]]:
    """A function that sends the numbers of a row of metrics.jsonl, under the same keys, to what `track` names.

    ValueError: names the package that is missing.
    """
    with ExitStack() as stack:
        sinks = []
        if config.track.project and jax.process_index() == 0:
            sinks.append(to_wandb(stack, config, folder))
        if config.track.tensorboard and jax.process_index() == 0:
            sinks.append(to_tensorboard(stack, folder))

        def send(row: dict) -> None:
            numbers = {key: value for key, value in row.items() if isinstance(value, int | float)}
            for sink in sinks:
                sink(numbers, row["step"])

        yield send


def to_wandb(stack: ExitStack, config: DistillConfig, folder: Path) -> Callable[[dict, int], None]:
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


def to_tensorboard(stack: ExitStack, folder: Path) -> Callable[[dict, int], None]:
    try:
        from tensorboardX import SummaryWriter
    except ModuleNotFoundError as error:
        raise UserError("track.tensorboard needs tensorboardX: pip install 'sam2jq[tensorboard]'") from error
    writer = stack.enter_context(SummaryWriter(str(folder / "tensorboard")))
    return lambda numbers, step: [writer.add_scalar(key, value, step) for key, value in numbers.items()]
