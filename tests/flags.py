"""Flags of commands in tests."""

from sam2jq.config.flags import split_flags


def override(flags: list[str], *more: str) -> list[str]:
    """`flags` with the settings `more` in place of those with the same keys, or with keys in the same section."""
    new = tuple(flag.key for flag in split_flags(list(more)))
    is_new = lambda key: key in new or key.startswith(tuple(f"{section}." for section in new))
    return [part for flag in split_flags(flags) if not is_new(flag.key) for part in flag.parts] + list(more)
