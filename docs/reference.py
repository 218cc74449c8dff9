"""Builds the API reference of `sam2jq` from its docstrings: every name in `sam2jq.__all__`, nothing else.

python docs/reference.py build/docs
"""

import sys
import warnings
from pathlib import Path

import pdoc

import sam2jq


def build(folder: Path) -> Path:
    """The path of the written page. Raises an error for a public name that does not exist or has no docstring."""
    for name in sam2jq.__all__:  # `sam2jq` may import its names on first use, and pdoc looks only at those in place
        setattr(sam2jq, name, getattr(sam2jq, name))
    bare = [name for name in sam2jq.__all__ if callable(vars(sam2jq)[name]) and not vars(sam2jq)[name].__doc__]
    if bare:
        raise SystemExit(f"public names without a docstring: {', '.join(bare)}")
    warnings.simplefilter("error")  # pdoc only warns of what it cannot document
    pdoc.render.configure(show_source=False, footer_text=f"sam2jq {sam2jq.__version__}")
    pdoc.pdoc("sam2jq", output_directory=folder)
    return folder / "sam2jq.html"


if __name__ == "__main__":
    print(build(Path(sys.argv[1])))
