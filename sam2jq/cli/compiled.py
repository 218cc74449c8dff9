"""The cache of compiled programs: where it is, how large it may grow, and what happens when it cannot be used."""

import logging
import os
import tempfile
import warnings
from contextlib import suppress
from pathlib import Path

import jax

from sam2jq.config.run import CacheConfig

FOLDER = "JAX_COMPILATION_CACHE_DIR"  # jax's own variable; where it is set, it names the folder
log = logging.getLogger("sam2jq")


def use_compilation_cache(config: CacheConfig) -> None:
    """Lets jax read and write compiled programs in <cache.root>/compiled, or in the folder that FOLDER names.

    A run whose cache cannot be written or read logs one warning and goes on without it.
    """
    folder = Path(os.environ.get(FOLDER) or Path(config.root).absolute() / "compiled")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        log.warning("warning     compiled programs are not kept: %s", error)
        jax.config.update("jax_compilation_cache_dir", None)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # otherwise the folder's path is part of every key, and a copied cache serves nobody
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # small programs are many
    if FOLDER not in os.environ and config.max_compiled_mb >= 0:
        delete_oldest(folder, config.max_compiled_mb * 10**6)
    warn_once()


def delete_oldest(folder: Path, limit: int) -> None:
    """Deletes the programs in `folder` that were not used for longest, until all files take at most `limit` bytes.

    Another process may do the same at the same time. jax's own limit fails on a folder that was filled without one.
    """
    entries = []
    for path in filter(Path.is_file, folder.iterdir()):
        with suppress(FileNotFoundError):  # the other process was faster
            entries.append((path.stat(), path))
    total = sum(entry.st_size for entry, _ in entries)
    for entry, path in sorted(entries, key=lambda pair: max(pair[0].st_atime, pair[0].st_mtime)):
        if total <= limit:
            break
        path.unlink(missing_ok=True)
        total -= entry.st_size


def warn_once() -> None:
    """Logs the first of jax's warnings about the cache in one line, and drops the others, one for each program."""
    show, seen = warnings.showwarning, []

    def show_first(message, *args, **kwargs) -> None:
        text = " ".join(str(message).split())
        if "persistent compilation cache" not in text:
            show(message, *args, **kwargs)
        elif not seen:
            seen.append(text)
            log.warning("warning     compiled programs are not all kept: %s", text)

    if getattr(show, "__name__", "") != show_first.__name__:
        warnings.showwarning = show_first
