"""Runs what docs/*.md tell users to run: each ```sh and ```python block, page by page, from the repository's root.

Blocks marked ```console need files that only users have; tests/test_docs.py checks that the program takes their flags.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

for left in Path("outputs").glob("docs_*"):  # of an earlier check: a finished job is never overwritten
    shutil.rmtree(left) if left.is_dir() else left.unlink()
for page in sorted(Path("docs").glob("*.md")):
    for language, code in re.findall(r"^```(sh|python)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        print(f"\n== {page}\n{code}", flush=True)
        subprocess.run(["bash", "-euc", code] if language == "sh" else [sys.executable, "-c", code], check=True)
