"""Runs what README.md and docs/*.md tell users to run: each ```sh and ```python block, page by page.

Blocks marked ```console need files that only users have, or long; tests/test_docs.py checks that `sam2jq` accepts
their arguments.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

INDEX = Path("docs/README.md")
BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def pages() -> list[Path]:
    """README.md, then the pages of the guide in its order."""
    return [Path("README.md"), *(INDEX.parent / name for name in re.findall(r"\]\((\w+\.md)\)", INDEX.read_text()))]


def main() -> None:
    for old in Path("outputs").glob("docs_*"):  # of an earlier check, since a finished job is never overwritten
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    Path("outputs").mkdir(exist_ok=True)
    for page in pages():
        for language, code in BLOCK.findall(page.read_text()):
            print(f"\n== {page}\n{code}", flush=True)
            subprocess.run(["bash", "-euc", code] if language == "sh" else [sys.executable, "-c", code], check=True)


if __name__ == "__main__":
    main()
