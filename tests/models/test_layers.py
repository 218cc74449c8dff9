import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from sam2jq.models.attention import KEY_BLOCK, QUERY_CHUNK, attention, blocked_attention, softmax_attention
from sam2jq.models.capture import OUTPUTS
from sam2jq.models.chunking import chunked_map
from sam2jq.models.hiera import Hiera, from_windows, to_windows
from sam2jq.models.layers import Dense, LayerNorm, resize
from sam2jq.models.memory import RotaryAttention
from sam2jq.models.sam2 import build, init_params
from sam2jq.quant import leaves
from sam2jq.quant.algorithms.activations import ActQuantized
from sam2jq.quant.spec import QuantSpec
from sam2jq.tree import flatten
from tests.conftest import nchw, nhwc, relative


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


SHAPES = [(7, 50), (QUERY_CHUNK, KEY_BLOCK), (QUERY_CHUNK + 1, KEY_BLOCK), (2 * QUERY_CHUNK, 2 * KEY_BLOCK + 50)]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("queries", "keys"), SHAPES)
def test_attention_in_parts_equals_torchs(queries, keys, masked):
    """With a mask, all keys of a block are ignored, and some of another."""
    q, k, v = normal(2, queries, 3, 8), normal(2, keys, 3, 8), normal(2, keys, 3, 5)
    key_mask = np.ones((2, keys), bool)
    if masked:
        key_mask[0] = (np.arange(keys) % 3 > 0) & (np.arange(keys) >= keys // 2)
    heads_first = [torch.from_numpy(x).transpose(1, 2) for x in (q, k, v)]
    mask = torch.from_numpy(key_mask)[:, None, None]
    expected = torch.nn.functional.scaled_dot_product_attention(*heads_first, mask).transpose(1, 2)
    got = attention(q, k, v, jnp.asarray(key_mask) if masked else None)
    np.testing.assert_allclose(got, expected.numpy(), atol=3e-6)  # some roundings of values up to 3


@pytest.mark.parametrize(("queries", "keys"), SHAPES[2:])
def test_attention_in_parts_has_torchs_gradients(queries, keys):
    arrays = normal(1, queries, 2, 8), normal(1, keys, 2, 8), normal(1, keys, 2, 8)
    aim, key_mask = normal(1, queries, 2, 8), np.arange(keys)[None] % 3 > 0
    tensors = [torch.from_numpy(x).requires_grad_() for x in arrays]
    heads_first, mask = [x.transpose(1, 2) for x in tensors], torch.from_numpy(key_mask)[:, None, None]
    expected = torch.nn.functional.scaled_dot_product_attention(*heads_first, mask).transpose(1, 2)
    (expected * torch.from_numpy(aim)).sum().backward()
    grads = jax.grad(lambda qkv: (attention(*qkv, jnp.asarray(key_mask)) * aim).sum())(arrays)
    for got, tensor in zip(grads, tensors):
        np.testing.assert_allclose(got, tensor.grad.numpy(), atol=1e-4)  # sums of a thousand terms near 1


def test_a_block_of_masked_keys_is_not_computed():
    """Values that are NaN there would show in a product with weights of 0."""
    q, k, v = normal(1, 2 * QUERY_CHUNK, 1, 8), normal(1, 3 * KEY_BLOCK, 1, 8), normal(1, 3 * KEY_BLOCK, 1, 8)
    key_mask = np.arange(3 * KEY_BLOCK)[None] // KEY_BLOCK != 1
    v[~key_mask] = np.nan
    assert np.isfinite(attention(q, k, v, jnp.asarray(key_mask))).all()


@pytest.mark.parametrize("key_block", [100, 128, 1000])
def test_attention_does_not_depend_on_the_size_of_its_blocks(key_block):
    """Accelerators compute all heads at once, in wider blocks than a CPU."""
    q, k, v = normal(3, 64, 8), normal(3, 300, 8), normal(3, 300, 8)
    got = jax.vmap(lambda q, k, v: blocked_attention(q, k, v, None, 0.5, key_block))(q, k, v)
    np.testing.assert_allclose(got, softmax_attention(q, k, v, None, 0.5), atol=3e-6)


@pytest.mark.parametrize("queries", [16, QUERY_CHUNK])
def test_attention_in_half_precision_is_as_exact_as_jax_s_own(queries):
    """Scores and sums are in float32. The sum over many equal keys overflows in float16, and bfloat16 has 8 bits."""
    many = jnp.ones((1, 28672, 1, 8), jnp.float16)
    np.testing.assert_array_equal(attention(many[:, :4], many, 4 * many), 4)
    arrays = [normal(1, queries, 2, 32), 4 * normal(1, 600, 2, 32), normal(1, 600, 2, 32)]
    half = [jnp.asarray(x, jnp.bfloat16) for x in arrays]
    compiled = jax.jit(attention)
    exact = compiled(*(x.astype(jnp.float32) for x in half))
    ours, jax_s = (relative(fn(*half), exact) for fn in (compiled, jax.jit(jax.nn.dot_product_attention)))
    assert ours < 1.1 * jax_s
    gradient = jax.jit(jax.grad(lambda arrays: jnp.square(attention(*arrays)).mean()))
    for got, expected in zip(gradient(half), gradient([x.astype(jnp.float32) for x in half])):
        assert relative(got, expected) < 0.02  # a few roundings of 2 ** -9


def test_chunks_have_the_gradient_of_the_whole_without_keeping_the_hidden_layer_for_it():
    rows, hidden = 1024, 256
    x, w, v = normal(rows, 8), normal(8, hidden), normal(hidden, 8)

    def gradient(size):
        loss = lambda x, w: jnp.square(chunked_map(lambda part: jnp.tanh(part @ w) @ v, x, size)).mean()
        run = jax.jit(jax.grad(loss, (0, 1))).lower(x, w).compile()
        return run(x, w), run.memory_analysis().temp_size_in_bytes

    (whole, _), (pieces, memory) = gradient(rows), gradient(64)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), whole, pieces)
    assert memory < 4 * rows * hidden


@pytest.mark.parametrize(("size", "stride", "padding"), [(7, 4, 3), (3, 2, 1), (4, 4, 0), (2, 2, 0)])
def test_a_convolution_with_a_stride_is_the_product_of_its_patches(size, stride, padding):
    """On a TPU it is compiled as that product: XLA's compiler aborts on the gradient of some of these convolutions."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 19, 23, 3), np.float32)
    kernel = rng.standard_normal((size, size, 3, 5), np.float32)
    layer = jax.jit(lambda kernel, x: leaves.conv(kernel, x, stride=stride, padding=padding, groups=1))
    expected = torch.nn.functional.conv2d(
        nchw(x), torch.from_numpy(kernel).permute(3, 2, 0, 1), stride=stride, padding=padding
    )
    by_patches = leaves.patches(x, size, stride, padding) @ kernel.reshape(-1, 5)
    for got in (layer(kernel, x), by_patches):
        assert relative(got, nhwc(expected)) < 1e-6
    for_tpu = jax.grad(lambda kernel, x: layer(kernel, x).sum(), (0, 1))
    assert "convolution" not in jax.jit(for_tpu).trace(kernel, x).lower(lowering_platforms=("tpu",)).as_text()


def test_what_is_computed_once_more_has_the_same_gradient_in_less_memory():
    """Captured layer outputs are the same too, and gradients flow through them. A step of distillation maps its loss
    over examples."""
    found, images = {}, normal(2, 1, 128, 128, 3)
    for remat in (False, True):
        trunk = Hiera(8, 2, (4,), (), (4,), 7, remat)
        shapes = jax.eval_shape(trunk.init, jax.random.key(0), images[0])["params"]
        params = jax.tree.map(lambda leaf: 0.1 * normal(*leaf.shape), shapes)

        def loss_of(params, image, trunk=trunk):
            maps, captured = trunk.apply({"params": params}, image, mutable=[OUTPUTS])
            moments = {path: leaf for path, leaf in flatten(captured[OUTPUTS]).items() if path.endswith("moments")}
            squares = [jnp.square(leaf).sum() for leaf in jax.tree.leaves(moments)]
            return jnp.square(maps[0]).mean() + sum(squares), moments

        def loss(params, loss_of=loss_of):
            return jax.tree.map(lambda leaf: leaf.mean(0), jax.vmap(loss_of, (None, 0))(params, images))

        run = jax.jit(jax.grad(loss, has_aux=True)).lower(params).compile()
        found[remat] = (*run(params), run.memory_analysis().temp_size_in_bytes)
    (plain, key_mask, whole), (grads, captured, part) = found[False], found[True]
    assert len(key_mask) == 1 + 4 * 4
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), (plain, key_mask), (grads, captured)
    )
    assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads))
    assert part < whole / 2


def test_moments_and_norms_have_the_gradients_of_their_formulas():
    """Both gradients are written in fewer passes than differentiation gives."""
    x, weights = normal(32, 16) + 3, normal(32, 16)

    def captured(x):
        _, sown = Dense(8).apply({"params": {"kernel": jnp.eye(16, 8), "bias": jnp.zeros(8)}}, x, mutable=[OUTPUTS])
        ((mean, variance),) = sown[OUTPUTS]["moments"]
        return mean @ normal(8) + variance @ normal(8)

    plain = lambda x: x[:, :8].mean(0) @ normal(8) + x[:, :8].var(0) @ normal(8)
    norm = lambda x: (LayerNorm().apply({"params": {"scale": jnp.ones(16), "bias": jnp.zeros(16)}}, x) * weights).sum()
    standard = lambda x: ((x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5) * weights).sum()
    for ours, formula in ((captured, plain), (norm, standard)):
        got, expected = jax.value_and_grad(ours)(x), jax.value_and_grad(formula)(x)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, expected)


@pytest.mark.parametrize("mean", [0, 3, 30, 300])
def test_a_norm_of_bfloat16_numbers_is_as_exact_as_they_are(mean):
    """Its variance is the difference of two sums, of which a large mean leaves few digits: that adds less than a tenth
    of the error that the numbers have from their own rounding."""
    x = (normal(1000, 96) + mean).astype(jnp.bfloat16)
    exact = np.asarray(x, np.float64)
    expected = (exact - exact.mean(-1, keepdims=True)) / np.sqrt(exact.var(-1, keepdims=True) + 1e-5)
    got = LayerNorm().apply({"params": {"scale": jnp.ones(96), "bias": jnp.zeros(96)}}, x)
    rounding = 2**-9  # of a bfloat16, relative; the norm's result is rounded too
    np.testing.assert_allclose(
        np.asarray(got, np.float64), expected, rtol=2 * rounding, atol=0.1 * rounding * mean + 1e-4
    )


@pytest.mark.parametrize(("height", "width", "size"), [(8, 8, 4), (10, 13, 4), (3, 5, 7)])
def test_windows_come_back_whole(height, width, size):
    x = normal(2, height, width, 3)
    windows = to_windows(x, size)
    assert windows.shape[1:] == (size, size, 3)
    np.testing.assert_array_equal(from_windows(windows, height, width), x)


@pytest.mark.parametrize("size", [(16, 16), (40, 30), (9, 12)])
@pytest.mark.parametrize(("method", "mode"), [("bilinear", "bilinear"), ("bicubic-pytorch", "bicubic")])
def test_resize_equals_torchs_interpolate(method, mode, size):
    x = normal(1, 14, 14, 2)
    expected = torch.nn.functional.interpolate(torch.from_numpy(x).permute(0, 3, 1, 2), size, mode=mode)
    np.testing.assert_allclose(resize(x, size, method), expected.permute(0, 2, 3, 1).numpy(), atol=1e-5)


def test_random_params_repeat_by_seed():
    model = build("nano")
    same, other = init_params(model, 0), init_params(model, 1)
    key = "maskmem_tpos_enc"
    assert jnp.array_equal(same[key], init_params(model, 0)[key])
    assert not jnp.array_equal(same[key], other[key])


def test_an_unknown_model_is_named_with_a_suggestion():
    with pytest.raises(ValueError, match="did you mean 'base-plus'"):
        build("baseplus")
    with pytest.raises(ValueError, match=r"2\.0, 2\.1"):
        build("tiny", "3.0")
    with pytest.raises(ValueError, match="image_size is 8192 pixels at most, got 100000: one map .* would take 240 GB"):
        build("tiny", image_size=100_000)
    with pytest.raises(ValueError, match="multiple of 32 pixels, got 1000"):
        build("tiny", image_size=1000)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_memory_values_are_projected_after_the_softmax_only_if_the_layer_is_linear(dtype, monkeypatch):
    layer, frame, memory = RotaryAttention(64), normal(1, 16, 64).astype(dtype), normal(1, 36, 16).astype(dtype)
    settings = {"grid": (4, 4), "num_k_exclude_rope": 4}
    shapes = jax.eval_shape(lambda: layer.init(jax.random.key(0), frame, memory, memory, **settings))["params"]
    params = jax.tree.map(lambda leaf: normal(*leaf.shape), shapes)
    run = lambda params: layer.apply({"params": params}, frame, memory, memory, **settings)
    after = run(params)
    monkeypatch.setattr(Dense, "is_linear", lambda self: False)
    before = run(params)
    assert not np.array_equal(after, before)  # the order of sums differs
    assert relative(after, before) < (1e-6 if dtype == np.float32 else 2e-2)
    monkeypatch.undo()
    kernel = params["v_proj"]["kernel"]
    params["v_proj"]["kernel"] = ActQuantized(kernel, None, None, QuantSpec(4))
    quantized = run(params)
    monkeypatch.setattr(Dense, "is_linear", lambda self: False)
    np.testing.assert_array_equal(quantized, run(params))
