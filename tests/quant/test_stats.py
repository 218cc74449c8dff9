from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam2jq import build
from sam2jq.models.hiera import Block
from sam2jq.models.layers import MLP, Conv, ConvTranspose, Dense
from sam2jq.models.sam2 import abstract_params
from sam2jq.ptq.calibration import fold_clip, to_stats
from sam2jq.quant.stats import FOLDS, TOKENS
from sam2jq.tree import flatten, layer_name


def run(module: nn.Module, *calls) -> tuple[dict, dict]:
    """The params of `module` and what entered its layers over all calls."""
    params = jax.eval_shape(module.init, jax.random.key(0), calls[0])["params"]
    params = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(1), leaf.shape), params)
    see = jax.jit(lambda folded, x: module.apply({"params": params, **folded}, x, mutable=tuple(FOLDS))[1])
    folded = {}
    for x in calls:
        folded = see(folded, x)
    return params, flatten(folded)


def stats(folded: dict, path: str, kernel) -> tuple:
    name = f"{path}input"
    return to_stats(*(folded[f"{fold}/{name}"] for fold in FOLDS), inputs=int(np.prod(kernel.shape[:-1])))


def images(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_sums_over_calls_are_those_over_all_tokens():
    calls = [images(2, 30, 6, seed=s) + 0.5 for s in range(3)]
    params, folded = run(Dense(4), *calls)
    got, x = stats(folded, "", params["kernel"]), np.concatenate(calls).reshape(-1, 6)
    np.testing.assert_allclose(got.mean, x.mean(0), rtol=1e-5)
    np.testing.assert_allclose(got.gram, x.T @ x / len(x), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(got.low, x.min(0))
    np.testing.assert_array_equal(got.high, x.max(0))


def test_every_token_is_as_likely_to_be_in_the_sample():
    """8 calls of 4096 numbered tokens: each call gets an eighth of the slots, give or take 4 deviations."""
    calls = [np.full((4096, 1), c, np.float32) + np.arange(4096)[:, None] / 4096 for c in range(8)]
    _, folded = run(Dense(1), *calls)
    tokens = np.asarray(folded["tokens/input"].tokens)[:, 0]
    per_call = np.bincount(tokens.astype(int), minlength=8)
    assert np.abs(per_call - TOKENS / 8).max() < 4 * (TOKENS * 7 / 64) ** 0.5
    assert abs((tokens % 1).mean() - 0.5) < 4 * (1 / 12 / TOKENS) ** 0.5
    assert len(set(tokens.tolist())) > 0.9 * TOKENS


@pytest.mark.parametrize(
    "layer",
    [Conv(5), Conv(5, size=3, stride=2, padding=1), Conv(5, size=7, stride=4, padding=3), ConvTranspose(5)],
    ids=["1x1", "3x3", "7x7", "transposed"],
)
def test_the_gram_matrix_tells_the_power_of_the_output(layer):
    """mean |y|^2 = tr(w^T G w) for Dense, Conv and ConvTranspose, without the bias."""
    x = images(2, 16, 16, 3)
    params, folded = run(layer, x)
    params["bias"] = jnp.zeros_like(params["bias"])
    y = layer.apply({"params": params}, x)
    w = params["kernel"].reshape(-1, 5)
    got = stats(folded, "", params["kernel"])
    np.testing.assert_allclose(jnp.einsum("kn,kl,ln->n", w, got.gram, w), jnp.square(y).mean((0, 1, 2)), rtol=1e-4)
    np.testing.assert_allclose(got.mean @ w, y.mean((0, 1, 2)), rtol=1e-3, atol=1e-4)


def test_the_groups_of_a_convolution_share_one_gram_matrix():
    x = images(1, 8, 8, 4)
    params, folded = run(Conv(4, size=3, padding=1, groups=4), x)
    alone = [stats(run(Conv(4, size=3, padding=1), x[..., i : i + 1])[1], "", params["kernel"]).gram for i in range(4)]
    np.testing.assert_allclose(stats(folded, "", params["kernel"]).gram, np.mean(alone, 0), rtol=1e-5, atol=1e-6)


def test_the_padding_of_windows_does_not_count():
    """A 6 x 6 map in windows of 4 is padded to 8 x 8: 36 tokens are counted, and none of the padding."""
    _, folded = run(Block(8, 1, 4), images(1, 6, 6, 8))
    for layer in ("attn/qkv", "attn/proj", "mlp/layers.0", "mlp/layers.1"):
        assert folded[f"range/{layer}/input"].count == 36
        assert jnp.abs(folded[f"tokens/{layer}/input"].tokens).max(1).min() > 0
    _, folded = run(Block(16, 2, 4), images(1, 6, 6, 8))  # pooled
    assert folded["range/attn/qkv/input"].count == 36
    assert folded["range/attn/proj/input"].count == 9


def test_collecting_changes_no_output():
    """Chunks are not run one by one then; MLPs of 2**21 numbers or more would be."""
    module, x = MLP((4096, 8)), images(1024, 8)
    params = module.init(jax.random.key(0), x[:1])
    folded, _ = module.apply(params, x, mutable=tuple(FOLDS))
    np.testing.assert_allclose(folded, module.apply(params, x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("version", [pytest.param("2.0", marks=pytest.mark.slow), "2.1"])
def test_calibration_reaches_every_layer_of_the_model(version):
    model = build("nano", version)
    params, clip = abstract_params(model), jax.ShapeDtypeStruct((1, 256, 256, 3), jnp.float32)
    folded = flatten(jax.eval_shape(partial(fold_clip, model, ("range",), None), params, {}, clip))
    expected = {f"range/{path.removesuffix('kernel')}input" for path in flatten(params) if path.endswith("/kernel")}
    assert expected == folded.keys()


def test_statistics_are_collected_of_the_given_layers_only():
    model, layers = build("nano"), frozenset({"image_encoder.trunk.blocks.0.attn.qkv", "memory_encoder.out_proj"})
    clip = jax.ShapeDtypeStruct((1, 256, 256, 3), jnp.float32)
    fold = partial(fold_clip, model, ("gram", "range"), layers)
    folded = jax.eval_shape(fold, abstract_params(model), {}, clip)
    assert {layer_name(path.partition("/")[2]) for path in flatten(folded)} == layers
    assert jax.tree.all(
        jax.tree.map(
            lambda a, b: a.shape == b.shape, folded, jax.eval_shape(fold, abstract_params(model), folded, clip)
        )
    )
