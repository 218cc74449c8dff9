import json
from itertools import islice

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from converters.exports.package import load_package
from sam2jq import build, layers
from sam2jq.cli.distill import device_setting, find_clips, find_student_calibration, quantize_student
from sam2jq.cli.main import main
from sam2jq.cli.run_folder import stage
from sam2jq.config.distill import DistillConfig
from sam2jq.config.loader import load
from sam2jq.distillation import trainer as cdpq
from sam2jq.distillation.init_student import check_pair, start
from sam2jq.errors import UserError
from sam2jq.models.sam2 import init_params
from sam2jq.quant.algorithms.activations import ActQuantized
from sam2jq.quant.algorithms.fake_quant import fake_quant_layers, trainable_mask
from sam2jq.quant.error import relative_error
from sam2jq.quant.leaves import base_weight, materialize_params
from sam2jq.quant.qtensor import dequantize, quantize
from sam2jq.quant.spec import QuantSpec
from sam2jq.quant.stats import Stats
from sam2jq.training.state import init_state
from sam2jq.training.step import make_train_step
from sam2jq.tree import flatten, kernels, layer_name, unflatten
from tests.flags import override

NANO = ["--teacher.name", "nano", "--student.name", "nano", "--data.train", "scenes:1", "--data.val", "scenes:2"]
FEW = ["--data.train_samples", "2", "--data.val_samples", "2"]


def config(*flags):
    return load(None, override(NANO, *flags), DistillConfig)


@pytest.fixture(scope="module")
def params():
    return init_params(build("nano"), 0)


def parts(student):
    return {layer_name(path): base_weight(node) for path, node in kernels(flatten(student)).items()}


def test_a_student_starts_on_the_config_s_grid_and_with_its_inputs_rounded(params):
    made = start(
        params,
        config("--quant.initial_bits", "6", "--quant.ipts.dtype", "uint8", "--quant.wgts.skips", "[memory_encoder]"),
    )
    assert len(fake_quant_layers(made)) == sum("memory_encoder" not in layer for layer in parts(params))
    leaf = made["sam_mask_decoder"]["conv_s0"]["kernel"]
    assert isinstance(leaf, ActQuantized)
    assert (leaf.inner.bits, leaf.inner.spec.symmetric) == (6, True)


def test_layers_that_are_quantized_keep_their_bits(params):
    flat = flatten(params)
    path = "sam_mask_decoder/conv_s0/kernel"
    flat[path] = quantize(flat[path], QuantSpec(3, group_size=16))
    part = parts(start(unflatten(flat), config()))["sam_mask_decoder.conv_s0"]
    assert (part.bits, part.spec.group_size) == (3, 16)


def test_a_student_may_start_by_post_training_quantization(params, tmp_path):
    """On ptq's grid at its bits, not on that for layers which ptq leaves; rounded by GPTQ, not to nearest."""
    layer = "obj_ptr_proj.layers.0"
    rest = [name for name in parts(params) if name != layer]
    ptq = f"{{calib: {{path: scenes:3, num_samples: 2}}, wgts: {{dtype: sint3, kernel_gptq: {{}}, skips: {rest}}}}}"
    how = config(*FEW, "--ptq", ptq, "--cache.root", str(tmp_path), "--quant.wgts.skips", str(rest))
    made = quantize_student(build("nano"), params, how, find_student_calibration(how, find_clips(how)[1]), stage)
    found, full = parts(made)[layer], flatten(params)["obj_ptr_proj/layers.0/kernel"]
    assert (found.spec.bits, how.quant.wgts.dtype) == (3, "sint8")
    assert (dequantize(found) != dequantize(quantize(full, found.spec))).any()
    begin = start(made, how)
    assert fake_quant_layers(begin) == [layer]
    assert jnp.allclose(materialize_params(begin)["obj_ptr_proj"]["layers.0"]["kernel"], dequantize(found), atol=1e-6)
    with pytest.raises(ValueError, match="ptq: demo is quantized already: leave ptq out"):
        quantize_student(build("nano"), made, how, None, stage)
    wrong = config(*FEW, "--ptq", "{calib: {path: scenes:3, num_samples: 1}, wgts: {dtype: sint3, skips: [neck]}}")
    with pytest.raises(ValueError, match="^ptq.wgts.skips and bits: no layer under neck"):
        quantize_student(build("nano"), params, wrong, find_student_calibration(wrong, find_clips(wrong)[1]), stage)


def test_the_ladder_gives_each_layer_the_lowest_width_that_errs_little(params):
    parts_of_it = ["image_encoder", "memory_attention", "memory_encoder", "sam_prompt_encoder", "sam_mask_decoder"]
    flags = ["--distill.confidence_method", "ladder", "--quant.min_bits", "4", "--quant.wgts.skips", str(parts_of_it)]
    learned = parts(start(params, config(*flags, "--distill.confidence_threshold", "0.02")))
    for layer in ("obj_ptr_proj.layers.0", "mask_downsample"):
        w = np.asarray(flatten(params)[f"{layer.replace('.l', '/l')}/kernel"])
        error = {b: relative_error(dequantize(quantize(w, QuantSpec(b))), w) for b in (8, 6, 4)}
        assert float(learned[layer].bits) == min(b for b in error if max(error[a] for a in error if a >= b) <= 0.02)
    with pytest.raises(ValueError, match=r"even 8 bits err by .* over distill.confidence_threshold 1e-05"):
        start(params, config(*flags, "--distill.confidence_threshold", "0.00001"))


@pytest.mark.parametrize(("inputs", "bits"), [("white", 6), ("of one row", 8)])
def test_a_ladder_that_goes_by_outputs_counts_what_inputs_there_are(inputs, bits, params):
    """White inputs make it the error of the weight; a row that rounding ruins counts for as much as it is excited."""
    layer = "obj_ptr_proj.layers.0"
    flat = flatten(params)
    path = "obj_ptr_proj/layers.0/kernel"
    flat[path] = flat[path].at[0].mul(0.2)
    one = jnp.eye(64) * (inputs == "white") + jnp.zeros((64, 64)).at[0, 0].set(1.0)
    stats = dict.fromkeys((layer_name(path) for path in kernels(flat)), Stats(None, None, None, one, None))
    rest = [name for name in stats if name != layer]
    flags = ["--distill.confidence_method", "ladder", "--distill.confidence_on", "output"]
    flags += ["--distill.confidence_threshold", "0.05", "--quant.wgts.skips", str(rest)]
    made = start(unflatten(flat), config(*flags), stats)
    assert float(parts(made)[layer].bits) == bits


def test_a_root_that_names_no_layer_is_an_error(params):
    with pytest.raises(ValueError, match=r"quant.target_roots: no layer under memory_atention; did you mean"):
        start(params, config("--quant.target_roots", "[memory_atention]"))


def test_a_teacher_of_another_width_of_maps_is_an_error():
    with pytest.raises(ValueError, match="teacher and student: image_size is 1024 and 256"):
        check_pair(build("tiny"), build("nano"))
    check_pair(build("large"), build("base-plus"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data.val", "scenes:1"], "data.train and data.val share 2 frames"),
        (["--train.batch_size", "3"], "data.train holds 2 clips, which do not fill a batch of 3"),
        (["--data.train", "nowhere"], "nowhere: no such file or folder"),
        (["--ptq.calib.path", "scenes:2"], "ptq.calib.path and data.val share 2 frames"),
    ],
)
def test_bad_data_is_one_line_before_any_work(flags, message, tmp_path, capsys):
    assert main(["distill", *override([*NANO, *FEW], *flags), "--output.root", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("teacher", "student", "message"),
    [
        ("cpu", "gpu", "teacher.device cpu and student.device gpu: teacher and student run on one device"),
        ("auto", "tpu", "student.device tpu: no such device here"),
        ("tpu", "auto", "teacher.device tpu: no such device here"),
    ],
)
def test_teacher_and_student_run_on_one_device(teacher, student, message, tmp_path, capsys):
    devices = ["--teacher.device", teacher, "--student.device", student]
    assert main(["distill", *NANO, *FEW, *devices, "--output.root", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_whichever_device_is_set_counts():
    assert device_setting(config()) == ("teacher.device", "auto")
    assert device_setting(config("--student.device", "cpu")) == ("student.device", "cpu")
    assert device_setting(config("--teacher.device", "cpu", "--student.device", "cpu")) == ("teacher.device", "cpu")


def test_distill_gives_the_teacher_the_dtype_of_its_setting(tmp_path, monkeypatch):
    """The setting was accepted and ignored."""
    taken = []

    def stop(config, folder, teacher, *rest):
        taken.append(teacher.dtype)
        raise UserError("enough")

    monkeypatch.setattr("sam2jq.cli.distill.train_student", stop)
    where = ["--output.root", str(tmp_path / "out"), "--cache.root", str(tmp_path / "cache")]
    assert main(["distill", *NANO, *FEW, *where, "--teacher.dtype", "bfloat16"]) == 2
    assert taken == ["bfloat16"]


@pytest.mark.slow  # compiles the gradient of a whole SAM 2: minutes
@pytest.mark.parametrize("pair", ["small_to_tiny", "large_to_base_plus"])
def test_every_eligible_layer_of_the_originals_pairs_learns(pair, tmp_path):
    """All of them in three steps, where in the original none ever did."""
    few = ["--teacher.checkpoint", "random:0", "--student.checkpoint", "random:1", "--data.image_size", "128"]
    few += ["--data.train", "scenes:1", "--data.train_samples", "3", "--data.val", "scenes:2"]
    few += ["--data.val_samples", "1", "--distill.prompts", "2", "--distill.objects", "1", "--train.remat", "true"]
    how = load(f"experiments/cdpq_{pair}.yaml", [*few, "--cache.root", str(tmp_path)], DistillConfig)
    teaching, model = (build(one.name, one.version, 128) for one in (how.teacher, how.student))
    known = cdpq.Teacher(teaching, init_params(teaching, 0))
    begin = start(init_params(model, 1), how)
    study = cdpq.make_distill_task(model, known, *find_clips(how), how)
    optimizer = cdpq.make_optimizer(how.train, 3, trainable_mask(begin))
    step, state = make_train_step(study.loss, optimizer), init_state(jax.tree.map(jnp.copy, begin), optimizer, 0)
    for batch in islice(study.batches(0), 3):
        state, metrics = step(state, batch)
        assert np.isfinite(metrics["loss"])
    before, after = parts(begin), parts(state.params)
    assert len(fake_quant_layers(begin)) == len(layers(begin)) == {"tiny": 171, "base-plus": 219}[how.student.name]
    assert [layer for layer in before if not (before[layer].kernel != after[layer].kernel).any()] == []


@pytest.mark.slow  # compiles three programs of the whole model: minutes
def test_a_run_leaves_a_package_with_its_decisions_and_goes_on_where_it_was(tmp_path, capsys):
    where = ["--output.root", str(tmp_path / "out"), "--cache.root", str(tmp_path / "cache")]
    few = ["--data.train_samples", "2", "--data.val_samples", "1", "--distill.prompts", "2", "--distill.objects", "1"]
    quant = ["--quant.initial_bits", "5", "--distill.window", "1", "--distill.candidates", "2"]
    loose = ["--distill.layer_threshold", "9", "--distill.impact_threshold", "9", "--distill.impact_budget", "99"]
    run = ["distill", *NANO, *where, *few, *quant, *loose, "--train.epochs", "2", "--train.batch_size", "1"]
    assert main(run) == 0
    job = tmp_path / "out" / "distill"
    files = {"config.yaml", "metrics.jsonl", "metrics.json", "package.pt", "vanilla.pt", "curves.png", "report.html"}
    assert files <= {path.name for path in job.iterdir()}
    metrics = json.loads((job / "metrics.json").read_text())
    assert len(metrics["history"]["decisions"]) == 2
    lowered = [one["layer"] for one in metrics["history"]["decisions"] if one["accepted"]]
    assert {row["name"] for row in metrics["layers"] if row["bits"] == 4} == set(lowered)
    assert set(metrics["results"]["miou"]) == {"full precision", "start", "distill"}
    found = load_package(job / "package.pt").leaves()
    vanilla = torch.load(job / "vanilla.pt", weights_only=True)["model"]
    name = "sam_mask_decoder.transformer.layers.0.mlp.layers.0"
    assert len(np.unique(vanilla[f"{name}.weight"][0])) <= 31  # what is written is what was rounded
    assert len(found) == 131
    assert main(run) == 2
    assert "already holds a finished job" in capsys.readouterr().err
