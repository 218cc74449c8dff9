"""Names of synthetic scenes: "scenes:<seed>" for all of a seed, "scenes:<seed>/<index>" for one."""

from sam2jq.errors import UserError


def scene_seed(name: str) -> int:
    """The seed of the scene called "scenes:<seed>/<index>", unique for each name. Raises UserError for other names."""
    seed, _, index = name.removeprefix("scenes:").partition("/")
    if not (seed.isdecimal() and index.isdecimal()):
        raise UserError(f"{name}: not the name of a scene; write it like scenes:7/0003")
    return (int(seed) << 32) + int(index)


def scene_names(spec: str, num_samples: int | None) -> list[str]:
    """["scenes:7/0000", "scenes:7/0001", ...] for "scenes:7". Raises UserError without a seed or `num_samples`."""
    seed = spec.removeprefix("scenes:")
    if not seed.isdecimal():
        raise UserError(f"{spec}: not scenes:<seed>; the seed is a whole number that is not negative, like scenes:7")
    if num_samples is None:
        raise UserError(f"{spec}: drawn scenes have no end; give num_samples")
    return [f"scenes:{int(seed)}/{index:04d}" for index in range(num_samples)]
