from sam2jq.ptq import stats_cache
from sam2jq.ptq.stats_cache import code_fingerprint


def test_statistics_of_other_code_are_not_read(tmp_path, monkeypatch):
    """The key of a cache file follows the source files that make statistics."""
    (tmp_path / "models").mkdir()
    (tmp_path / "__init__.py").write_text("")
    (tmp_path / "models" / "layers.py").write_text("a = 1\n")
    monkeypatch.setattr(stats_cache.sam2jq, "__file__", str(tmp_path / "__init__.py"))
    keys = []
    for text in ("a = 1\n", "a = 2\n", "a = 1\n"):
        (tmp_path / "models" / "layers.py").write_text(text)
        keys.append(code_fingerprint.__wrapped__())
    assert keys[0] == keys[2] != keys[1]


def test_every_pattern_of_the_code_names_a_file():
    root = stats_cache.Path(stats_cache.sam2jq.__file__).parent
    assert all(list(root.glob(pattern)) for pattern in stats_cache.CODE)
    assert len(code_fingerprint()) == 32
