"""The Python API: sam2jq.load and save, what needs torch, and what `import sam2jq` loads."""

import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import jax
import numpy as np
import pytest

import sam2jq
from converters.checkpoint import load_checkpoint, save_checkpoint
from sam2jq.api import open_package

ROOT = Path(__file__).parents[1]
W4 = sam2jq.QuantSpec(4, group_size=64)


def same(a, b) -> bool:
    """Whether two trees have the same structure, and arrays that are equal in dtype and values."""
    equal = lambda x, y: np.array_equal(x, y) and x.dtype == y.dtype
    return jax.tree.structure(a) == jax.tree.structure(b) and all(map(equal, jax.tree.leaves(a), jax.tree.leaves(b)))


def run(program: str) -> str:
    """What a program prints in a fresh interpreter."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def demo():
    model, params = sam2jq.load("demo")
    return model, sam2jq.round_weights(params, dict.fromkeys(sam2jq.layers(params), W4))


def test_importing_sam2jq_loads_no_framework():
    modules = ("torch", "jax", "flax", "draccus", "yaml", "numpy")
    assert run(f"import sys, sam2jq; print([m for m in {modules} if m in sys.modules])") == "[]"


def test_every_public_name_is_listed_and_no_other_exists():
    assert {*sam2jq.__all__} == {*sam2jq._NAMES, "__version__"}
    assert set(sam2jq.__all__) <= set(dir(sam2jq))
    assert sam2jq.UserError is import_module("sam2jq.errors").UserError
    with pytest.raises(AttributeError, match="module 'sam2jq' has no attribute 'quantise'"):
        _ = sam2jq.quantise


def test_the_demo_model_and_native_packages_load_and_save_without_torch(tmp_path):
    program = f"""
import sys
sys.modules["torch"] = None
import sam2jq
model, params = sam2jq.load("demo")
small = sam2jq.round_weights(params, dict.fromkeys(sam2jq.layers(params), sam2jq.QuantSpec(4)))
sam2jq.save({str(tmp_path / "small.safetensors")!r}, model, small)
again, _ = sam2jq.load({str(tmp_path / "small.safetensors")!r})
assert again == model
for path, call in (("small.pt", lambda p: sam2jq.save(p, model, small)), ("there.pt", sam2jq.load)):
    open({str(tmp_path / "there.pt")!r}, "wb").write(b"PK\\3\\4")
    try:
        call({str(tmp_path)!r} + "/" + path)
    except sam2jq.UserError as error:
        print(error)
"""
    lines = run(program).splitlines()
    assert len(lines) == 2
    assert all("needs torch: pip install 'sam2jq[torch]'" in line for line in lines)


def test_the_demo_model_is_that_of_the_checkpoint_loader():
    model, params = sam2jq.load("demo")
    assert model == sam2jq.build("nano")
    assert same(params, load_checkpoint("demo", model).params)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype("float32")}


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("as_folder", [False, True])
def test_a_saved_package_loads_to_the_same_model_and_params(tmp_path, demo, suffix, as_folder):
    path = tmp_path / f"package{suffix}"
    sam2jq.save(path, *demo, metadata={"random_weights": True, "relative_errors": {"memory_encoder.out_proj": 0.5}})
    model, params = sam2jq.load(tmp_path if as_folder else path)
    assert model == demo[0]
    assert same(params, demo[1])
    summary = open_package(tmp_path if as_folder else path).summary()
    assert summary["random_weights"] is True
    errors = {row["name"]: row["relative_error"] for row in summary["layers"]}
    assert errors["memory_encoder.out_proj"] == 0.5
    assert np.isnan(errors["mask_downsample"])


def test_a_tilde_is_the_users_folder_in_the_names_of_packages(tmp_path, demo, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    sam2jq.save("~/a.safetensors", *demo)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    assert sam2jq.load("~/a.safetensors")[0] == demo[0]


def test_both_packages_hold_the_same(tmp_path, demo):
    for suffix in (".pt", ".safetensors"):
        sam2jq.save(
            tmp_path / f"p{suffix}", *demo, metadata={"relative_errors": dict.fromkeys(sam2jq.layers(demo[1]), 0)}
        )
    one, other = (open_package(tmp_path / f"p{suffix}").summary() for suffix in (".pt", ".safetensors"))
    by_name = lambda rows: {row["name"]: row for row in rows}
    assert by_name(one.pop("layers")) == by_name(other.pop("layers"))
    assert one == other


def test_a_package_knows_its_image_size_and_another_is_an_error(tmp_path):
    model = sam2jq.build("nano", "2.0", 192)
    sam2jq.save(tmp_path / "p.safetensors", model, sam2jq.init_params(model, 0))
    for size in (None, 192):
        assert sam2jq.load(tmp_path / "p.safetensors", image_size=size)[0] == model
    assert sam2jq.ImagePredictor.from_pretrained(str(tmp_path / "p.safetensors")).model == model
    with pytest.raises(sam2jq.UserError, match="holds a model of image_size 192, not 128: leave out"):
        sam2jq.load(tmp_path / "p.safetensors", image_size=128)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("version", ["2.0", "2.1"])
def test_plain_checkpoints_are_recognized_from_their_tensors(tmp_path, suffix, version):
    params = sam2jq.init_params(sam2jq.build("nano", version), 0)
    save_checkpoint(tmp_path / f"c{suffix}", params)
    model, loaded = sam2jq.load(tmp_path / f"c{suffix}")
    assert model == sam2jq.build("nano", version)
    assert same(loaded, params)


def test_what_fits_no_size_says_what_to_give(tmp_path):
    params = sam2jq.init_params(sam2jq.build("nano"), 0)
    del params["no_obj_ptr"]
    save_checkpoint(tmp_path / "c.safetensors", params)
    with pytest.raises(
        sam2jq.UserError,
        match=r"fit no size .*tiny.*; nano 2.1 is closest: 1 tensor does not fit: missing no_obj_ptr$",
    ):
        sam2jq.load(tmp_path / "c.safetensors")
    with pytest.raises(sam2jq.UserError, match="does not fit the model: 1 tensor does not fit: missing no_obj_ptr$"):
        sam2jq.load(tmp_path / "c.safetensors", name="nano")


def test_a_version_that_does_not_fit_is_named_with_the_one_that_does(tmp_path, demo):
    save_checkpoint(tmp_path / "c.safetensors", sam2jq.load("demo")[1])
    for name in (None, "nano"):
        with pytest.raises(sam2jq.UserError, match="the model; it is nano 2.1: give --model.name nano --model.v"):
            sam2jq.load(tmp_path / "c.safetensors", name=name, version="2.0")


def test_a_name_that_contradicts_the_package_is_an_error(tmp_path, demo):
    sam2jq.save(tmp_path / "p.safetensors", *demo)
    with pytest.raises(
        sam2jq.UserError, match=r"holds a model of name 'nano', not 'tiny' and version '2.1', not '2.0'"
    ):
        sam2jq.load(tmp_path / "p.safetensors", name="tiny", version="2.0")


def test_random_weights_need_a_name():
    model, params = sam2jq.load("random:3", name="nano")
    assert same(params, sam2jq.init_params(model, 3))
    with pytest.raises(sam2jq.UserError, match="random:3 needs the name of a model"):
        sam2jq.load("random:3")


def test_other_endings_and_models_of_other_sizes_are_refused(tmp_path, demo):
    model, params = demo
    with pytest.raises(sam2jq.UserError, match="give a name that ends in .safetensors"):
        sam2jq.save(tmp_path / "p.zip", model, params)
    other = model.clone(variant=sam2jq.VARIANTS["nano"].__class__(16, 1, (1, 1, 1, 1), (0,)))
    with pytest.raises(sam2jq.UserError, match="a package holds a model of a known size"):
        sam2jq.save(tmp_path / "p.safetensors", other, params)
    with pytest.raises(FileNotFoundError, match="no package at"):
        open_package(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def scene():
    from sam2jq.data.images import read_image

    return read_image("scenes:7/0000")


@pytest.mark.end_to_end
def test_quantize_runs_a_transform_and_reports_every_layer(scene):
    """As many images as given; a folder, names and arrays mean the same pixels, and a recipe runs too."""
    model, params = sam2jq.load("demo", image_size=64)
    match = r"image_encoder\.trunk\.blocks\.0\..*"
    transform = sam2jq.gptq(W4, match=match)
    small, report = sam2jq.quantize(model, params, transform, [scene])
    by_name, _ = sam2jq.quantize(model, params, transform, "scenes:7", num_images=1)
    assert same(small, by_name)
    assert len(report.layers) == 4
    assert all(0 < error.relative_error < 0.3 and error.output_error < error.relative_error * 2
               for error in report.layers.values())  # fmt: skip
    nearest, nearest_report = sam2jq.quantize(model, params, sam2jq.rtn(W4, match=match))
    assert same(nearest, sam2jq.round_weights(params, dict.fromkeys(report.layers, W4)))
    assert nearest_report.relative_errors.keys() == report.relative_errors.keys()


@pytest.mark.slow
def test_quantize_computes_in_float32_where_a_program_around_it_has_set_float64(scene):
    model, params = sam2jq.load("demo", image_size=64)
    transform = sam2jq.gptq(W4, match=r"image_encoder\.trunk\.blocks\.0\..*")
    expected, _ = sam2jq.quantize(model, params, transform, [scene])
    with jax.enable_x64(True):
        small, _ = sam2jq.quantize(model, params, transform, [scene])
    assert same(small, expected)


@pytest.mark.parametrize(("setting", "value"), [("dtype", "strict"), ("rank", "raise")])
def test_settings_of_jax_that_refuse_the_model_are_named(setting, value):
    with (
        getattr(jax, f"numpy_{setting}_promotion")(value),
        pytest.raises(sam2jq.UserError, match=f"^jax_numpy_{setting}_promotion is '{value}': sam2jq needs '"),
    ):
        sam2jq.build("nano")


def test_a_layer_that_is_none_is_not_passed_over():
    _, params = sam2jq.load("demo")
    with pytest.raises(sam2jq.UserError, match="no layer image_encoder.neck.convs.0.convx; did you mean"):
        sam2jq.round_weights(params, {"image_encoder.neck.convs.0.convx": W4})


def test_quantize_takes_a_recipe(scene):
    from sam2jq.config.quant import WeightsConfig

    model, params = sam2jq.load("demo")
    recipe = sam2jq.QuantConfig(wgts=WeightsConfig(dtype="sint4"))
    small, report = sam2jq.quantize(model, params, recipe)
    assert report.layers.keys() == set(sam2jq.layers(params))
    assert isinstance(small["memory_encoder"]["out_proj"]["kernel"], sam2jq.QTensor)


def test_quantize_names_what_is_wrong_with_its_images():
    model, params = sam2jq.load("demo")
    transform = sam2jq.gptq(W4)
    with pytest.raises(sam2jq.UserError, match="needs calibration images"):
        sam2jq.quantize(model, params, transform)
    with pytest.raises(sam2jq.UserError, match=r"got float32 \[3, 8, 8\]"):
        sam2jq.quantize(model, params, transform, [np.zeros((3, 8, 8), np.float32)])


def test_every_public_name_resolves():
    assert all(getattr(sam2jq, name) is not None for name in sam2jq.__all__)


def test_a_chain_of_nothing_changes_nothing():
    model, params = sam2jq.load("demo")
    for empty in (sam2jq.chain(), sam2jq.named_chain()):
        same_params, report = sam2jq.quantize(model, params, empty)
        assert same(same_params, params)
        assert report.layers == {}


def test_quantize_refuses_what_is_no_transform():
    model, params = sam2jq.load("demo")
    for wrong in (None, "gptq", sam2jq.gptq, W4):
        with pytest.raises(sam2jq.UserError, match="expected a transform"):
            sam2jq.quantize(model, params, wrong)


def test_a_recipe_takes_the_bits_of_the_package_that_it_names(tmp_path, demo):
    model, small = demo
    sam2jq.save(tmp_path / "p.safetensors", model, small)
    recipe = sam2jq.QuantConfig(bits_from=str(tmp_path / "p.safetensors"))  # sint8 otherwise
    again, _ = sam2jq.quantize(model, sam2jq.load("demo")[1], recipe)
    specs = [leaf.spec.bits for leaf in jax.tree.leaves(again, is_leaf=is_quantized) if is_quantized(leaf)]
    assert set(specs) == {4}


def is_quantized(leaf) -> bool:
    return isinstance(leaf, sam2jq.QTensor)


def test_a_loaded_package_takes_half_a_byte_for_a_code_of_4_bits(tmp_path, demo):
    sam2jq.save(tmp_path / "p.safetensors", *demo)
    _, small = sam2jq.load(tmp_path / "p.safetensors")
    assert all(any(x is array for array in jax.live_arrays()) for x in jax.tree.leaves(small))
    # what XLA allocates for a program's arguments: the `nbytes` of an array counts such a code as a byte
    memory = jax.jit(lambda params: params).lower(small).compile().memory_analysis()
    codes = sum(leaf.qvalue.size for leaf in jax.tree.leaves(small, is_leaf=is_quantized) if is_quantized(leaf))
    others = sum(x.nbytes for x in jax.tree.leaves(small) if x.dtype == np.float32)
    assert codes > 1e6
    assert memory.argument_size_in_bytes == pytest.approx(codes / 2 + others, rel=1e-3)  # an odd number is padded


@pytest.mark.slow
def test_masks_of_packed_codes_are_those_of_codes_in_bytes_to_the_bit():
    model, params = sam2jq.load("random:0", name="nano", image_size=64)
    small = sam2jq.rtn(sam2jq.QuantSpec(4, group_size=64)).apply(params, {})
    in_bytes = lambda leaf: replace(leaf, qvalue=leaf.qvalue.astype(np.int8)) if is_quantized(leaf) else leaf
    results = []
    for tree in (small, jax.tree.map(in_bytes, small, is_leaf=is_quantized)):
        predictor = sam2jq.ImagePredictor(model, tree)
        predictor.set_image(np.arange(64 * 64 * 3).astype(np.uint8).reshape(64, 64, 3))
        results.append(predictor.predict(point_coords=[[30, 30]], point_labels=[1], return_logits=True))
    assert all(map(np.array_equal, *results))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_package_with_one_wrong_bit_is_not_loaded(tmp_path, demo, suffix):
    path = tmp_path / f"p{suffix}"
    sam2jq.save(path, *demo)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    for read in (sam2jq.load, open_package):
        with pytest.raises(sam2jq.UserError, match="is damaged"):
            read(path)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_metadata_that_is_not_plain_is_refused_before_it_is_written(tmp_path, demo, suffix):
    path = tmp_path / f"p{suffix}"
    for metadata in ({"config": {"path": tmp_path}}, {"results": {"a": np.float32(1)}}, {"model": None}):
        with pytest.raises(sam2jq.UserError, match="metadata"):
            sam2jq.save(path, *demo, metadata)
    assert not path.exists()


@pytest.mark.parametrize("name", ["package", "p.sam2jq", "P.SAFETENSORS"])
def test_a_native_package_is_known_by_its_content(tmp_path, demo, name):
    sam2jq.save(tmp_path / "p.safetensors", *demo)
    (tmp_path / "p.safetensors").rename(tmp_path / name)
    model, params = sam2jq.load(tmp_path / name)
    assert model == demo[0]
    assert same(params, demo[1])
    assert open_package(tmp_path / name).summary()["quantized_weights"]


def test_a_text_file_is_no_torch_file(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(sam2jq.UserError, match="not a readable torch file"):
        sam2jq.load(tmp_path / "notes.txt")


@pytest.mark.parametrize("size", [0, -64, 65, "64"])
def test_an_image_size_that_cannot_be_is_an_error(size):
    with pytest.raises(sam2jq.UserError, match="image_size must be a multiple of 32"):
        sam2jq.load("demo", image_size=size)
