"""Hadamard matrices h [n, n], with entries +1 and -1 and h h^T = n I, and fast products with them.

All are symmetric, so x -> x h / sqrt(n) is its own inverse, and all are Kronecker products of small ones.
"""

import math
from functools import cache, reduce

import jax
import jax.numpy as jnp
import numpy as np

from sam2jq.errors import UserError
from sam2jq.quant.exact import einsum, matmul

Array = jax.Array
TWO = np.array([[1, 1], [1, -1]], np.int8)
# TWO x TWO sums four channels into one, which after a GELU is a large outlier. The columns of FOUR have equal sums, so
# the mean spreads over all channels.
FOUR = 1 - 2 * np.eye(4, dtype=np.int8)


@cache
def hadamard(n: int) -> np.ndarray:
    """int8 [n, n], read-only: the symmetric Hadamard matrix h of `fast_hadamard`."""
    h = np.kron(*factors(n))
    h.flags.writeable = False
    return h


@jax.jit
def fast_hadamard(x: Array) -> Array:
    """x h / sqrt(n) for x [..., n] and h = a (x) b, n (a + b) multiplications per row, not n^2; its own inverse."""
    a, b = (factor.astype(np.float32) for factor in factors(x.shape[-1]))
    y = x.astype(jnp.float32).reshape(*x.shape[:-1], len(a), len(b)) / math.sqrt(x.shape[-1])
    y = einsum("...ij,ik->...kj", matmul(y, b), a)
    return y.reshape(x.shape).astype(x.dtype)


@cache
def factors(n: int) -> tuple[np.ndarray, np.ndarray]:
    """int8 [a, a] and [b, b] of similar size, whose Kronecker product is h.

    Raises UserError if there is no Hadamard matrix of size n.
    """
    powers = [k for k in reversed(range(n.bit_length())) if n % 2**k == 0]
    core, power = next(((core, k) for k in powers if (core := paley(n >> k)) is not None), (None, 0))
    if core is None:
        raise UserError(
            f"no Hadamard matrix of size {n}: leave such a layer unrotated. Sizes are m 2^k where m is 1, or p + 1 for "
            "a prime p = 3 mod 4 (12, 20, 44, ...), or 2 p + 2 for a prime p = 1 mod 4 (28, 36, 76, ...)"
        )
    fours = min(range(power // 2 + 1), key=lambda i: len(core) * 4**i + 2**power / 4**i)
    rest = [FOUR] * (power // 2 - fours) + [TWO] * (power % 2)
    return reduce(np.kron, [FOUR] * fours, core), reduce(np.kron, rest, paley(1))


def paley(m: int) -> np.ndarray | None:
    """int8 [m, m]: a symmetric Hadamard matrix by one of Paley's constructions over a prime p; None if there is none.

    chi(i) is 1 for squares modulo p, -1 for other numbers, 0 for 0. The first, p = m - 1 = 3 mod 4, is made of
    chi(i - j); its columns in another order, chi(i + j), and a sign for each row make it symmetric. The second, p =
    m / 2 - 1 = 1 mod 4, is symmetric as it stands.
    """
    if m == 1:
        return np.ones((1, 1), np.int8)
    if m % 4 == 0 and is_prime(p := m - 1):
        chi = character(np.add.outer(range(p), range(p)), p)
        return bordered(1, np.where(chi, -chi, -1))
    if m % 8 == 4 and is_prime(p := m // 2 - 1):
        conference = bordered(0, character(np.subtract.outer(range(p), range(p)), p))
        return np.kron(conference, TWO) + np.kron(np.eye(p + 1, dtype=np.int8), TWO[::-1, ::-1])
    return None


def is_prime(p: int) -> bool:
    return p > 1 and all(p % i for i in range(2, math.isqrt(p) + 1))


def character(i: np.ndarray, p: int) -> np.ndarray:
    """int8, as `i`: chi(i) for a prime p."""
    chi = np.full(p, -1, np.int8)
    chi[np.arange(p) ** 2 % p] = 1
    chi[0] = 0
    return chi[i % p]


def bordered(corner: int, inner: np.ndarray) -> np.ndarray:
    """[p + 1, p + 1]: `inner` [p, p] under a row and behind a column of ones that meet in `corner`."""
    whole = np.pad(inner, ((1, 0), (1, 0)), constant_values=1)
    whole[0, 0] = corner
    return whole
