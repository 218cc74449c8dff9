"""Products that decide which weights are chosen ask for whole float32 themselves, whatever the program's default is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam2jq.models.prompt import fourier
from sam2jq.quant.algorithms import bit_allocation, smooth
from sam2jq.quant.algorithms.gptq import GptqConfig, gptq_round, ldl_factor
from sam2jq.quant.algorithms.hadamard import fast_hadamard
from sam2jq.quant.error import output_error
from sam2jq.quant.spec import QuantSpec
from sam2jq.quant.stats import fold_gram

SPEC = QuantSpec(8)
X, W, GRAM = np.ones((32, 16), np.float32), np.ones((16, 8), np.float32), np.eye(16, dtype=np.float32)


def gptq(w, gram):
    return gptq_round(w, *ldl_factor(gram, 16, 0.01, 1), SPEC, jnp.float32(4), GptqConfig())


CASES = {
    "the Gram matrix": (lambda x: fold_gram(None, (x, None)), X),
    "the output error": (output_error, W, GRAM),
    "bits of weights": (lambda w, gram: bit_allocation._error_by_width(w, gram, SPEC), W, GRAM),
    "bits of inputs": (lambda w, x: bit_allocation._input_error_by_width(w, x, SPEC), W, X),
    "smoothing": (lambda w, x: smooth.errors(w, x, jnp.ones((2, 16)), weights=SPEC, inputs=None, size=16), W, X),
    "rotation": (fast_hadamard, X),
    "GPTQ": (gptq, W, GRAM),
    "positions of points": (fourier, X[:, :2], np.ones((2, 8), np.float32)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_choice_does_not_depend_on_the_precision_that_products_have_by_default(name):
    fn, *arrays = CASES[name]
    text = jax.jit(fn).trace(*arrays).lower(lowering_platforms=("tpu",)).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert products
    assert all("HIGHEST" in line for line in products)
