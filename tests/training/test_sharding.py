import jax
import pytest

from sam2jq.cli.loading import configure_jax
from sam2jq.config.run import CacheConfig
from sam2jq.training.sharding import compute_devices


@pytest.mark.parametrize("named", ["cpu", "device"])
def test_a_default_device_is_the_only_one_that_is_used(named):
    (first, *_) = jax.devices()
    with jax.default_device(first if named == "device" else named):
        assert compute_devices() == [first]
    assert compute_devices() == jax.devices()


def test_naming_jax_s_first_platform_keeps_all_of_its_devices(tmp_path):
    """The first one alone was set as the default device."""
    configure_jax("cpu", CacheConfig(str(tmp_path)))
    assert jax.config.jax_default_device is None
