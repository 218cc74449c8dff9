from pathlib import Path

import pytest

from sam2jq import files
from sam2jq.distillation import target_cache
from sam2jq.ptq import stats_cache


def test_what_other_code_made_is_not_read(tmp_path, monkeypatch):
    """The name of a cache file follows the source files that make its content."""
    monkeypatch.setattr(files, "__file__", str(tmp_path / "files.py"))
    keys = []
    for text in ("a = 1\n", "a = 2\n", "a = 1\n"):
        (tmp_path / "layers.py").write_text(text)
        keys.append(files.code_fingerprint.__wrapped__("*.py"))
    assert keys[0] == keys[2] != keys[1]
    assert len(keys[0]) == 32


@pytest.mark.parametrize("patterns", [stats_cache.CODE, target_cache.CODE])
def test_every_pattern_of_the_code_names_a_file(patterns):
    root = Path(files.__file__).parent
    assert all(list(root.glob(pattern)) for pattern in patterns)
