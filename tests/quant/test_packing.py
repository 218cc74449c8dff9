import dataclasses
from itertools import cycle

import jax
import numpy as np
import pytest

from sam2jq.errors import UserError
from sam2jq.models.sam2 import build, init_params
from sam2jq.quant.algorithms.activations import ActQuantized, OutQuantized
from sam2jq.quant.algorithms.lowrank import LowRank
from sam2jq.quant.algorithms.rotate import Rotated
from sam2jq.quant.algorithms.smooth import Smoothed
from sam2jq.quant.leaves import LEAVES
from sam2jq.quant.package import complete_metadata, is_native, pack_params, read_package, write_package
from sam2jq.quant.packing import leaf_classes, pack_bits, pack_leaf, unpack_bits, unpack_leaf
from sam2jq.quant.qtensor import quantize
from sam2jq.quant.spec import QuantSpec
from sam2jq.tree import flatten, kernels, unflatten

METADATA = {"model": {"name": "nano", "version": "2.1", "image_size": 256}}
SPECS = [
    QuantSpec(4, group_size=16),
    QuantSpec(3, symmetric=False),
    QuantSpec(5, per_tensor=True),
    QuantSpec(4, codes="float", scales="e4m3", group_size=16),
    QuantSpec(8, codes="float"),
    QuantSpec(7, scales="bfloat16"),
]


def nested(spec: QuantSpec):
    """A weight [32, 24] inside every class of leaf."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    act = ActQuantized(quantize(draw(32, 24), spec), np.float32(0.1), np.float32(3), QuantSpec(8, False), True)
    smoothed = Smoothed(LowRank(act, draw(32, 4), draw(4, 24)), np.abs(draw(32)))
    return OutQuantized(Rotated(smoothed, np.sign(draw(32))), QuantSpec(8))


def same(a, b) -> bool:
    """Whether two trees have the same structure, and arrays that are equal in dtype and values."""
    equal = lambda x, y: np.array_equal(x, y) and x.dtype == y.dtype
    return jax.tree.structure(a) == jax.tree.structure(b) and all(map(equal, jax.tree.leaves(a), jax.tree.leaves(b)))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("count", [1, 7, 8, 1000])
def test_packing_keeps_every_bit_pattern(bits, count):
    codes = (np.arange(count) % 2**bits).astype(np.uint8)
    packed = pack_bits(codes, bits)
    assert len(packed) == -(-count * bits // 8)
    np.testing.assert_array_equal(unpack_bits(packed, bits, count), codes)


@pytest.mark.parametrize("spec", SPECS)
def test_unpacking_inverts_packing(spec):
    leaf = nested(spec)
    assert same(unpack_leaf(pack_leaf(leaf)), leaf)


def test_every_registered_leaf_class_can_be_unpacked():
    assert leaf_classes().items() >= LEAVES.items()
    assert {"Smoothed", "Rotated", "LowRank", "ActQuantized", "OutQuantized"} <= leaf_classes().keys()


def test_a_leaf_of_an_unknown_class_or_field_is_one_error():
    stored = pack_leaf(nested(QuantSpec(4)))
    with pytest.raises(UserError, match="unknown weight leaf 'Path'; known: ActQuantized"):
        unpack_leaf(stored | {"kind": "Path"})
    with pytest.raises(UserError, match="weight leaf OutQuantized has no field shell"):
        unpack_leaf(stored | {"shell": "rm"})


@pytest.fixture(scope="module")
def quantized():
    """nano with leaves of every spec, and one leaf of all classes."""
    flat = flatten(jax.device_get(init_params(build("nano"), 0)))
    leaves = {path: quantize(w, spec) for (path, w), spec in zip(list(kernels(flat).items())[:24], cycle(SPECS))}
    some = next(path for path in kernels(flat) if path not in leaves)
    return unflatten(flat | leaves | {some: nested(SPECS[0])})


def test_a_native_package_holds_the_params_bit_for_bit(tmp_path, quantized):
    path = tmp_path / "p.safetensors"
    write_package(path, pack_params(quantized, {}, METADATA))
    assert is_native(path)
    package = read_package(path)
    assert same(package.params(), quantized)
    assert package.metadata == complete_metadata(METADATA, path)
    assert list(tmp_path.iterdir()) == [path]
    summary = package.summary()
    assert summary["parameters"] == sum(np.size(w) for w in package.arrays.values()) + summary["quantized_weights"]


def test_a_flipped_bit_anywhere_is_one_line_that_names_the_file(tmp_path, quantized):
    path = tmp_path / "p.safetensors"
    few = dict(list(flatten(quantized).items())[:12])
    write_package(path, pack_params(unflatten(few), {}, METADATA))
    content, rng = path.read_bytes(), np.random.default_rng(0)
    header = int.from_bytes(content[:8], "little") + 8
    places = [*range(12), *rng.integers(header, size=300), *rng.integers(len(content), size=60), len(content) - 1]
    for place in places:
        flipped = bytearray(content)
        flipped[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(flipped)
        with pytest.raises(UserError, match="p.safetensors") as error:
            read_package(path)
        assert "\n" not in str(error.value)


def test_a_cut_file_and_another_format_or_version_are_named(tmp_path, quantized):
    from safetensors.numpy import save_file

    path = tmp_path / "p.safetensors"
    write_package(path, pack_params(quantized, {}, METADATA))
    content = path.read_bytes()
    for length in (len(content) - 1, len(content) // 2, 100, 3, 0):
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match="p.safetensors is not a readable safetensors file"):
            read_package(path)
    save_file({"a": np.zeros(3)}, path)
    with pytest.raises(UserError, match="is not a sam2jq package"):
        read_package(path)
    save_file({"a": np.zeros(3)}, path, {"format": "sam2jq", "format_version": "99"})
    with pytest.raises(UserError, match="package version 99, this sam2jq reads 1"):
        read_package(path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model": {}}, "model.name, model.version, model.image_size"),
        ({"model": {"name": "nano", "version": "2.1", "image_size": "256"}}, "model.image_size"),
        ({"names": "theirs"}, "names"),
        ({"random_weights": None}, "random_weights"),
    ],
)
def test_metadata_that_lacks_something_names_it(tmp_path, quantized, change, named):
    with pytest.raises(UserError, match=f"lacks a valid {named}: write it with sam2jq.save"):
        write_package(tmp_path / "p.safetensors", pack_params(quantized, {}, METADATA | change))
    assert not list(tmp_path.iterdir())


def test_fields_of_packed_leaves_are_those_of_the_classes():
    stored = pack_leaf(nested(QuantSpec(4)))
    assert stored.keys() - {"kind"} == {field.name for field in dataclasses.fields(OutQuantized)}
