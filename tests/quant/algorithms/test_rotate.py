import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam2jq.quant.algorithms.activations import ActQuantized, fake_quantize, quantize_activations, quantize_inputs
from sam2jq.quant.algorithms.hadamard import fast_hadamard, hadamard
from sam2jq.quant.algorithms.rotate import Rotated, fold_heads, rotate, rotate_kernel
from sam2jq.quant.algorithms.rtn import rtn
from sam2jq.quant.error import relative_error
from sam2jq.quant.leaves import materialize, matmul
from sam2jq.quant.qtensor import QTensor, dequantize, quantize
from sam2jq.quant.spec import QuantSpec
from sam2jq.quant.stats import Stats
from sam2jq.quant.transform import chain, each_layer, map_base_weight

WIDTH, OUTPUTS = 96, 10
PLAIN, RANDOM = None, 7  # seeds of the signs
both = pytest.mark.parametrize("spec", [PLAIN, RANDOM], ids=["plain", "random"])


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.array(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def matrix(w: Rotated) -> np.ndarray:
    """R, float64 [K, K]."""
    r = hadamard(len(w.inner)) / np.sqrt(len(w.inner))
    return r if w.signs is None else np.asarray(w.signs, np.float64)[:, None] * r


@pytest.fixture
def x():
    return normal(0, 5, 20, WIDTH) + 0.3


@pytest.fixture
def w():
    return normal(1, WIDTH, OUTPUTS)


@both
@pytest.mark.parametrize("width", [64, 72, 96, 1792])
def test_a_rotated_layer_computes_and_stands_for_the_same(width, spec):
    """To 1e-5, in float32; compiled, as layers are."""
    w, x = normal(0, width, OUTPUTS), normal(1, 2, 9, width)
    layer = rotate_kernel(w, spec)
    assert relative_error(layer.inner, w) > 0.5
    assert relative_error(jax.jit(matmul)(layer, x), x @ w) <= 1e-5
    assert relative_error(materialize(layer), w) <= 1e-5


@both
def test_the_inner_weight_is_the_rotation_transposed_times_the_weight(w, spec):
    layer = rotate_kernel(w, spec)
    assert relative_error(layer.inner, matrix(layer).T @ np.asarray(w, np.float64)) <= 1e-6


@both
def test_the_inner_part_is_told_of_rotated_inputs(x, w, spec):
    """To 1e-5 of the largest: sums of float32 in other orders."""
    tokens = x.reshape(-1, WIDTH)
    gram = lambda tokens: tokens.T @ tokens / len(tokens)
    stats = Stats(tokens.mean(0), tokens.min(0), tokens.max(0), gram(tokens), tokens, jnp.float32(7))
    layer, inner_stats = rotate_kernel(w, spec), []
    map_base_weight(layer, stats, lambda w, stats: inner_stats.append(stats) or w)
    rotated = np.asarray(tokens, np.float64) @ matrix(layer)
    expected = Stats(rotated.mean(0), rotated.min(0), rotated.max(0), gram(rotated), rotated, np.float32(7))
    for name, got, right in zip(Stats._fields, inner_stats[0], expected):
        np.testing.assert_allclose(got, right, atol=1e-5 * abs(right).max(), err_msg=name)


def test_without_statistics_the_inner_part_is_told_nothing(w):
    assert map_base_weight(rotate_kernel(w, RANDOM), None, lambda w, stats: stats).inner is None


@both
def test_rounding_inside_a_rotation_is_the_hand_written_product(x, w, spec):
    inputs, weights = QuantSpec(4), QuantSpec(4, False, 32)
    rotation = each_layer(lambda w, stats, seed: rotate_kernel(w, seed), {"a": spec})
    layer = chain(rotation, quantize_activations(inputs), rtn(weights)).apply({"a": {"kernel": w}}, {})["a"]["kernel"]
    assert [type(part) for part in (layer, layer.inner, layer.inner.inner)] == [Rotated, ActQuantized, QTensor]
    plain = rotate_kernel(w, spec)
    rotated = fast_hadamard(x if spec is PLAIN else x * plain.signs)
    by_hand = fake_quantize(rotated, inputs) @ dequantize(quantize(plain.inner, weights))
    assert relative_error(matmul(layer, x), by_hand) <= 1e-6
    assert relative_error(materialize(layer), matrix(plain) @ dequantize(quantize(plain.inner, weights))) <= 1e-6
    integer = Rotated(ActQuantized(layer.inner.inner, None, None, inputs, integer=True), layer.signs)
    assert relative_error(matmul(integer, x), by_hand) <= 1e-5


@both
def test_a_rotation_inside_other_leaves_changes_nothing(x, w, spec):
    outside = map_base_weight(quantize_inputs(w, None, QuantSpec(8)), None, lambda w, stats: rotate_kernel(w, spec))
    assert isinstance(outside, ActQuantized)
    assert relative_error(matmul(outside, x), fake_quantize(x, QuantSpec(8)) @ w) <= 1e-5
    twice = map_base_weight(rotate_kernel(w, RANDOM), None, lambda w, stats: rotate_kernel(w, spec))
    assert isinstance(twice.inner, Rotated)
    assert relative_error(matmul(twice, x), x @ w) <= 1e-5


@both
def test_activations_keep_their_dtype(x, w, spec):
    y = matmul(rotate_kernel(w, spec), x.astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    assert relative_error(y, x @ w) <= 0.02  # 8 bits of mantissa, rounded four times


def test_random_signs_come_from_the_seed_and_differ_with_it(w):
    signs = [rotate_kernel(w, seed).signs for seed in (0, 0, 1, 2**32 - 1)]
    assert set(np.unique(signs)) == {-1.0, 1.0}
    np.testing.assert_array_equal(signs[0], signs[1])
    for other in signs[2:]:
        assert 0.2 < np.mean(signs[0] != other) < 0.8
    assert rotate_kernel(w, PLAIN).signs is None


@both
@pytest.mark.parametrize("width", [96, 1152])
def test_rotation_spares_4_bit_inputs_their_outlier_channels(width, spec):
    """Four channels 25 times as large cost the others nearly all their bits; rotated they cost each a little."""
    w = normal(1, width, OUTPUTS)
    x = normal(0, 200, width) * jnp.ones(width).at[jnp.array([3, 17, 50, 77])].set(25)
    error = lambda w: relative_error(matmul(quantize_inputs(w, None, QuantSpec(4)), x), matmul(w, x))
    rotated = rotate_kernel(w, spec)
    rotated = Rotated(quantize_inputs(rotated.inner, None, QuantSpec(4)), rotated.signs)
    assert relative_error(matmul(rotated, x), x @ w) < 0.6 * error(w)


@both
def test_rotation_spares_4_bit_inputs_what_a_gelu_lets_through(spec):
    """Outputs of a GELU are positive, and large in a few channels: Sylvester's matrix makes their mean an outlier."""
    x = jax.nn.gelu(normal(0, 200, 1536) + 0.7 * normal(1, 1536) - 0.5)
    signs = rotate_kernel(x.T, spec).signs
    error = lambda x: relative_error(fake_quantize(x, QuantSpec(4)), x)
    assert error(fast_hadamard(x if signs is None else x * signs)) < 0.75 * error(x)


@pytest.mark.parametrize("kind", ["", ".outlier"])
def test_rotated_inputs_round_as_well_as_by_the_reference_matrix(shared, kind):
    """To 10 %: by the signs drawn the error of rounded inputs varies about as much."""
    folder = shared / "golden" / "ptq"
    inputs, peer = (np.load(folder / f"blocks.0.attn.qkv{kind}.{part}.npz") for part in ("inputs", "peer"))
    x, theirs = jnp.array(inputs["xe"]), peer["hadamard"]
    np.testing.assert_allclose(theirs.T @ theirs, np.eye(len(theirs)), atol=1e-6)
    error = lambda x: relative_error(fake_quantize(x, QuantSpec(4)), x)
    ours = error(fast_hadamard(x))
    assert ours < 1.1 * error(x @ theirs)
    assert ours < (0.5 if kind else 1.0) * error(x)


HEADS, SIZE = 3, 12
DIM = HEADS * SIZE


def attention(x: jax.Array, qkv: jax.Array, bias: jax.Array, proj: jax.Array) -> jax.Array:
    """[T, C] -> [T, N]: softmax attention over all tokens, then proj."""
    q, k, v = jnp.moveaxis((x @ qkv + bias).reshape(len(x), 3, HEADS, SIZE), 1, 0)
    weights = jax.nn.softmax(jnp.einsum("qhd,khd->hqk", q, k) / np.sqrt(SIZE))
    return jnp.einsum("hqk,khd->qhd", weights, v).reshape(len(x), -1) @ proj


@pytest.fixture
def layers():
    return normal(2, 20, 3 * DIM), normal(3, 3 * DIM), normal(4, DIM, 15)


@pytest.mark.parametrize("signs", [None, SIZE, DIM])
def test_folding_a_rotation_into_the_values_leaves_attention_as_it_was(layers, signs):
    """To 1e-5; queries and keys to the bit. What enters proj is rotated, head by head."""
    x, drawn = normal(0, 30, 20), signs and jnp.sign(normal(5, signs))
    folded = fold_heads(*layers, heads=HEADS, signs=drawn)
    assert relative_error(attention(x, *folded), attention(x, *layers)) <= 1e-5
    for new, old in zip(folded, layers):
        assert new.shape == old.shape
        assert relative_error(new, old) > 0.3
    for new, old in zip(folded[:2], layers[:2]):
        np.testing.assert_array_equal(new[..., : 2 * DIM], old[..., : 2 * DIM])
    enters = lambda layers: attention(x, *layers[:2], jnp.eye(DIM)).reshape(-1, HEADS, SIZE)
    by_head = 1 if drawn is None else drawn.reshape(-1, SIZE)
    np.testing.assert_allclose(enters(folded), fast_hadamard(enters(layers) * by_head), atol=1e-4)


@pytest.mark.parametrize("heads", [5, 7])
def test_heads_that_do_not_divide_the_width_are_refused(layers, heads):
    with pytest.raises(ValueError, match=rf"{heads} heads expected, got \[20, 108\], \[108\] and \[36, 15\]"):
        fold_heads(*layers, heads=heads)


def test_layers_of_other_widths_are_refused(layers):
    with pytest.raises(ValueError, match=r"got \[20, 108\], \[108\] and \[12, 15\]"):
        fold_heads(*layers[:2], layers[2][:12], heads=3)


@pytest.mark.parametrize(
    ("w", "message"),
    [
        (np.ones((3, 3, 12, 5)), r"kernel \[inputs, outputs\] of a Dense .* got shape \[3, 3, 12, 5\]"),
        (quantize(np.ones((12, 5), np.float32), QuantSpec(4)), "before it is rounded, got a QTensor"),
        (np.full((12, 5), np.nan), "holds NaN or infinity: look at the checkpoint"),
        (np.ones((52, 5)), "no Hadamard matrix of size 52"),
    ],
)
def test_what_cannot_be_rotated_is_refused_by_name(w, message):
    with pytest.raises(ValueError, match=f"layer a: .*{message}"):
        rotate(layers=["a"]).apply({"a": {"kernel": w}}, {})


def test_each_layer_gets_signs_of_its_own_from_one_seed(w):
    params = {"a": {"kernel": w}, "b": {"kernel": w}}
    first, again = (rotate(random=True, seed=1).apply(params, {}) for _ in range(2))
    signs = lambda params, name: np.asarray(params[name]["kernel"].signs)
    np.testing.assert_array_equal(signs(first, "a"), signs(again, "a"))
    assert 0.2 < np.mean(signs(first, "a") != signs(first, "b")) < 0.8
