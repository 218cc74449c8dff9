import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam2jq.errors import ConfigError, UserError
from sam2jq.quant.algorithms.reconstruct import BlockData, ReconstructConfig, reconstruct_block
from sam2jq.quant.leaves import materialize, matmul
from sam2jq.quant.qtensor import QTensor, quantize
from sam2jq.quant.spec import QuantSpec

SPECS = {
    "uint2 in groups": QuantSpec(2, False, 8, scales="bfloat16"),
    "sint3 per channel": QuantSpec(3),
}


def forward(block: dict, x: jax.Array) -> jax.Array:
    hidden = jax.nn.relu(matmul(block["first"]["kernel"], x) + block["first"]["bias"])
    return matmul(block["second"]["kernel"], hidden)


def full_block() -> dict:
    keys = jax.random.split(jax.random.key(0))
    kernel = lambda key: jax.random.normal(key, (16, 16)) / 4
    return {"first": {"kernel": kernel(keys[0]), "bias": jnp.ones(16)}, "second": {"kernel": kernel(keys[1])}}


def block_data(images: int, scale: float = 1.0) -> BlockData:
    x = jax.random.normal(jax.random.key(1), (images, 32, 16))
    noisy = x + 0.02 * jax.random.normal(jax.random.key(2), x.shape)
    return BlockData(*map(np.asarray, (noisy, scale * forward(full_block(), x))))


def rounded_block(spec: QuantSpec) -> dict:
    block = full_block()
    return block | {"first": block["first"] | {"kernel": quantize(block["first"]["kernel"], spec)}}


@pytest.fixture(scope="module", params=SPECS)
def reconstructed(request) -> tuple[dict, dict, float, float]:
    block = rounded_block(SPECS[request.param])
    return block, *reconstruct_block(forward, block, block_data(8), ReconstructConfig(steps=60, batch_size=4))


def test_the_error_on_held_out_images_falls(reconstructed):
    _, after, was, now = reconstructed
    assert now < 0.9 * was
    noisy, outputs = block_data(8)
    measured = np.square(forward(after, noisy[7:]) - outputs[7:]).mean() / np.var(outputs[7:])
    assert now == pytest.approx(measured, rel=1e-4)  # of the block as it is returned


def test_no_code_is_more_than_one_step_from_where_it_began(reconstructed):
    before, after = (block["first"]["kernel"] for block in reconstructed[:2])
    moved = np.abs(np.asarray(after.qvalue, int) - np.asarray(before.qvalue, int))
    assert moved.max() == 1
    spec = before.spec
    assert after.spec == spec
    assert after.qvalue.dtype == before.qvalue.dtype
    assert spec.qmin <= after.qvalue.min() <= after.qvalue.max() <= spec.qmax


def test_scales_stay_positive_and_keep_their_dtype_and_other_weights_stay(reconstructed):
    before, after, *_ = reconstructed
    scale = np.asarray(after["first"]["kernel"].scale)
    assert (scale > 0).all()
    if before["first"]["kernel"].spec.scales == "bfloat16":
        assert (scale == scale.astype(jnp.bfloat16).astype(np.float32)).all()
    np.testing.assert_array_equal(after["second"]["kernel"], before["second"]["kernel"])


@pytest.mark.parametrize("scale", [np.nan, 1e30])
def test_a_block_whose_error_does_not_fall_is_returned_as_it_came(scale):
    block = rounded_block(QuantSpec(2))
    after, was, now = reconstruct_block(forward, block, block_data(2, scale), ReconstructConfig(steps=2))
    assert not now < was
    assert after is block


def test_one_image_is_too_few():
    with pytest.raises(UserError, match="at least two images are needed, one of them held out, got 1"):
        reconstruct_block(forward, rounded_block(QuantSpec(2)), block_data(1), ReconstructConfig())


def test_float_codes_are_refused():
    spec = QuantSpec(4, codes="float")
    with pytest.raises(UserError, match="sintN and uintN, not fp4"):
        reconstruct_block(forward, rounded_block(spec), block_data(2), ReconstructConfig())


@pytest.mark.parametrize("setting", [{"steps": 0}, {"batch_size": 0}, {"blocks": "decoder"}])
def test_impossible_settings_name_the_key(setting):
    with pytest.raises(ConfigError, match=next(iter(setting))):
        ReconstructConfig(**setting)


def test_equal_runs_give_equal_bits():
    run = lambda: reconstruct_block(forward, rounded_block(QuantSpec(2)), block_data(4), ReconstructConfig(steps=3))
    first, second = (jax.tree.leaves(run()) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first, second))
    assert isinstance(run()[0]["first"]["kernel"], QTensor)
    assert materialize(run()[0]["first"]["kernel"]).shape == (16, 16)
