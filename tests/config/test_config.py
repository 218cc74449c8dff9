import os
import pwd
from pathlib import Path

import numpy as np
import pytest

from sam2jq import CalibConfig, QuantConfig, RotationConfig, SmoothConfig, WeightsConfig
from sam2jq.config import loader
from sam2jq.config.distill import DistillConfig
from sam2jq.config.run import Config, EvaluateConfig, MeasureConfig
from sam2jq.errors import UserError
from sam2jq.files import home
from tests.flags import override

NEEDED = ["--model.checkpoint", "random:0", "--quant.calib.path", "scenes:0"]
OTHERS = {"task": EvaluateConfig, "teacher": DistillConfig}  # by a key that only they have
EXPERIMENTS = sorted((Path(__file__).parents[2] / "experiments").glob("*.yaml"))


def load(*flags: str) -> Config:
    return loader.load(None, override(NEEDED, *flags))


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_shipped_config_loads(path):
    found = loader.read_yaml(str(path))
    other = next((kind for key, kind in OTHERS.items() if key in found), None)
    loader.load(str(path), [] if other else NEEDED, other or Config)


def test_flags_win_over_the_file_and_the_resolved_config_reads_back(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("quant: {wgts: {dtype: uint4, bits: {a.b: 3}}}\nseed: 7\n")
    loaded = loader.load(str(file), [*NEEDED, "--quant.wgts.dtype=sint6", "--quant.wgts.group_shapes", "[[1, 64]]"])
    assert (loaded.quant.wgts.dtype, loaded.quant.wgts.bits, loaded.seed) == ("sint6", {"a.b": 3}, 7)
    assert loaded.quant.wgts.group_shapes == [[1, 64]]
    file.write_text(loader.dump(loaded))
    assert loader.load(str(file), []) == loaded


def test_a_tilde_is_the_users_folder_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "c.yaml"
    file.write_text("quant: {calib: {path: ~/photos}}\noutput: {root: '~'}\ncache: {root: a~b}\n")
    loaded = loader.load(str(file), ["--model.checkpoint", "~/tiny.pt", "--measure.images=~/coco"])
    assert loaded.quant.calib.path == f"{tmp_path}/photos"
    assert (loaded.output.root, loaded.cache.root) == (str(tmp_path), "a~b")
    assert (loaded.model.checkpoint, loaded.measure.images) == (f"{tmp_path}/tiny.pt", f"{tmp_path}/coco")


def test_a_tilde_before_a_users_name_is_that_users_folder():
    user = pwd.getpwuid(os.getuid())
    assert load("--output.root", f"~{user.pw_name}/runs").output.root == f"{user.pw_dir}/runs"
    assert home(f"--out=~{user.pw_name}/a.png") == f"--out={user.pw_dir}/a.png"
    for name in ("~$plan.png", "~nobody.known.png", "a/~b"):
        assert load("--output.root", name).output.root == name
    with pytest.raises(UserError, match="^output.root: ~nobody.known/x: ~nobody.known is no user's folder; write ./~"):
        load("--output.root", "~nobody.known/x")


def test_a_version_may_be_written_as_a_number_and_a_switch_without_a_value():
    assert load("--model.version", "2.1").model.version == "2.1"
    assert load("--save-model").save_model
    assert not load("--save_model", "false").save_model


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--quant.wgts.dtpe", "x"], "unknown key quant.wgts.dtpe; did you mean 'dtype'"),
        (["--quant.wgts.dtype", "sint9"], "quant.wgts.dtype 'sint9'.*2..8"),
        (["--quant.wgts.dtype", "int4"], "quant.wgts.dtype 'int4': allowed are sintN and uintN"),
        (["--quant.wgts.bits", "{a: 9}"], "quant.wgts.bits: bits must be in 2..8, got {'a': 9}"),
        (["--quant.wgts.group_shapes", "[[2, 8]]"], r"group_shapes \[\[2, 8\]\]: allowed are"),
        (["--quant.calib.num_samples", "0"], "quant.calib.num_samples must be at least 1, got 0"),
        (["--quant.calib.frames", "0"], "quant.calib.frames must be at least 1, got 0"),
        (["--quant.rotation.fold_heads", "true"], "quant.rotation.fold_heads: set transforms"),
        (
            ["--quant.ipts", "{dtype: fp8, allow_unsigned: true}"],
            "quant.ipts.allow_unsigned: dtype fp8 has no",
        ),
        (["--quant.opts", "{dtype: sint9}"], "quant.opts.dtype 'sint9'"),
        (
            ["--quant.opts", "{dtype: uint8, group_shapes: [[-1, -1]], static: true}"],
            "quant.opts.static, allow_unsigned and target_bits need",
        ),
        (["--measure.images", "scenes:1"], "measure.num_images is not set: there is no end of synthetic"),
        (["--measure.clips", "sa-v", "--measure.num_clips", "0"], "measure.num_clips must be at least 1, got 0"),
        (
            ["--quant.wgts.kernel_gptq.damp_percentage", "0"],
            "quant.wgts.kernel_gptq.damp_percentage must be over 0, got 0",
        ),
        (["--seed", "soon"], "seed.*'soon'"),
        (["--model", "tiny"], "model must be a section"),
        (["--quant.ipts.dtype", "uint4", "--quant.ipts.target_bits", "9"], "layers have 2 to 8 bits, so 9.0 is out of"),
        (
            ["--quant.ipts.target_bits", "4"],
            "quant.ipts.bits and target_bits need an integer dtype, such as uint4, not None",
        ),
        (
            ["--quant.opts.dtype", "uint4", "--quant.opts.target_bits", "4"],
            "need calibration, which collects inputs only",
        ),
        (["--seed", "1", "--seed.size", "2"], "--seed.size: seed is not a section"),
        (["--seed.size", "2"], "seed must be a whole number, not a section with size"),
        (["--model.device", "gpus"], "model.device 'gpus'.*did you mean 'gpu'"),
        (["--model.checkpoint", ""], "model.checkpoint is not set"),
        (["--quant.calib.path="], "quant.calib.path is not set"),
        (["tiny"], "unexpected argument 'tiny'"),
        (["--seed", "null"], "seed: null is not allowed"),
        (["--output", "{job: x, root: [a]}"], "output.root must be text"),
        (["--quant.wgts.dtype="], "quant.wgts.dtype '': allowed are"),
        (["--quant.wgts.skips", "null"], "quant.wgts.skips: null is not allowed"),
        (["--quant.calib", "{path: [a]}"], r"quant.calib.path must be text, got \['a'\]: quote it"),
        (["--quant.wgts", "{rounding: [gptq]}"], "quant.wgts.rounding must be text"),
        (["--model.name", "nope", "--model.checkpoint", ""], "model.name 'nope': allowed are tiny"),
        (["--model.version", "2.2", "--model.checkpoint", ""], "model.version '2.2': allowed are 2.0, 2.1"),
        (["--quant.wgts.bits", "{a: null}"], r"quant.wgts.bits must be dict\[str, int\], got"),
        (["--quant.wgts.bits", "[[1, a]]"], "quant.wgts.bits must be a mapping such as {a: 4}"),
        (["--quant.wgts.bits", "{a: 4, a: 3}"], "--quant.wgts.bits .*: key a is given twice, in line 1: remove one"),
        (["--quant.rotation", "{transforms: [null]}"], "quant.rotation.transforms must be"),
        (["--seed", "yes"], "seed must be a whole number, got True"),
        (["--output", "{job: no}"], "output.job must be text, got False: quote it if it is text"),
        (["--output", "{job: .inf}"], "output.job must be text, got inf: quote it if it is text"),
        (["--quant.wgts.skips", "[a, yes]"], r"quant.wgts.skips must be list\[str\], got True: quote it"),
        (["--quant.wgts.bits", "{yes: 4}"], r"quant.wgts.bits must be dict\[str, int\], got True: quote it"),
        (["--model.name", "'a\\'", "--output.job", '"\\x"'], "--output.job .* is not YAML"),
        (["--output.job"], "--output.job has no value: write --output.job VALUE"),
        (["--output.job", "--seed=1"], "--output.job has no value"),
        (["--output.job", "../../x"], "output.job '../../x': it is the name of a folder in output.root, not a path"),
        (["--output.job", "/x"], "output.job '/x': it is the name"),
        (["--output.job", ".."], "output.job '..': it is the name"),
        (["--output.job", "."], "output.job '.': it is the name"),
        (["--output.job", "a\\b"], "output.job .*: it is the name"),
        (["--seed", "1", "--seed", "2"], "--seed is given twice: give --seed once"),
        (["--seed=1", "--seed", "1"], "--seed is given twice: give --seed once"),
        (["--save_model", "--save-model", "false"], "--save-model is given twice: give --save_model once"),
        (["--output.job", "a", "--output", "{job: b}"], "--output.job is given twice, also in --output: remove one"),
        (["--quant.wgts.ridge", ".nan"], "quant.wgts.ridge must be a number, got nan"),
        (["--seed", "2026-13-45"], "--seed '2026-13-45' holds a value that YAML cannot read"),
        (["--seed", "[" * 2000], "is nested too deeply"),
    ],
)
def test_a_wrong_setting_is_named_in_one_line(flags, message):
    with pytest.raises(ValueError, match=message) as error:
        load(*flags)
    assert "\n" not in str(error.value)


def test_a_missing_or_broken_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config at .*demo_w8\.yml; did you mean 'demo_w8\.yaml'"):
        loader.load(str(EXPERIMENTS[0].with_name("demo_w8.yml")), [])
    for text, message in {
        "a: [": "is not YAML: .* in line 1, column 5",
        "- 1": "holds no settings",
        "a: !!int b": "holds a value that YAML cannot read",
        "seed: soon": r"c\.yaml: seed: .*'soon'",
        "sed: 1": r"c\.yaml: unknown key sed; did you mean 'seed'",
        "quant: {calib: {num_samples: 0}}": r"c\.yaml: quant.calib.num_samples must be at least 1",
        "seed: 1\nquant:\n  wgts:\n    dtype: sint8\n  calib: {path: x}\n  wgts: {}\n": (
            r"c\.yaml: key wgts is given twice, in lines 3 and 6: remove one"
        ),
    }.items():
        (tmp_path / "c.yaml").write_text(text)
        with pytest.raises(UserError, match=message) as error:
            loader.load(str(tmp_path / "c.yaml"), NEEDED)
        assert str(tmp_path / "c.yaml") in str(error.value)
        assert "\n" not in str(error.value)
    (tmp_path / "c.yaml").write_text("seed: 1")
    with pytest.raises(UserError, match="^seed: .*'never'"):  # the flag is wrong, not the file
        loader.load(str(tmp_path / "c.yaml"), [*NEEDED, "--seed", "never"])


def test_numbers_that_yaml_rewrites_stay_text():
    assert [load("--output.job", text).output.job for text in ("007", "12:30", "1_000", "42", "2026-11-28")] == [
        "007", "12:30", "1_000", "42", "2026-11-28",
    ]  # fmt: skip
    with pytest.raises(UserError, match="seed: .*'0x1F'"):
        load("--seed", "0x1F")


@pytest.mark.parametrize("text", ["1.10", "007", "+5", "1_000.5", "0x1F", "2026-01-01", "12:30.5", "1e3", "2.5"])
def test_an_unquoted_number_for_text_in_yaml_keeps_what_was_written(tmp_path, text):
    file = tmp_path / "c.yaml"
    file.write_text(f"output: {{job: {text}}}\nquant: {{wgts: {{skips: [{text}], bits: {{{text}: 4}}}}}}")
    loaded = loader.load(str(file), NEEDED)
    assert (loaded.output.job, loaded.quant.wgts.skips, loaded.quant.wgts.bits) == (text, [text], {text: 4})


def test_a_number_may_be_written_in_every_form_that_python_reads(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("seed: +5\nquant: {wgts: {ridge: 0.10, target_bits: +4.50}, calib: {num_samples: 1_000}}")
    loaded = loader.load(str(file), NEEDED)
    assert (loaded.seed, loaded.quant.calib.num_samples) == (5, 1000)
    assert (loaded.quant.wgts.ridge, loaded.quant.wgts.target_bits) == (0.1, 4.5)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-16-le", "latin-1"])
def test_a_file_in_another_encoding_is_named(tmp_path, encoding):
    file = tmp_path / "c.yaml"
    file.write_text("seed: 1\noutput: {job: é}", encoding=encoding)
    kind = "in UTF-16" if encoding != "latin-1" else r"not in UTF-8 \(line 2\)"
    with pytest.raises(UserError, match=f"c.yaml is {kind}: save it as UTF-8$"):
        loader.load(str(file), NEEDED)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CalibConfig(num_samples="3"), "num_samples must be a whole number, got '3'"),
        (lambda: CalibConfig(image_size=True), "image_size must be a whole number or null, got True"),
        (lambda: WeightsConfig(dtype=4), "dtype must be text, got 4"),
        (lambda: WeightsConfig(bits=[4]), r"bits must be dict\[str, int\], got \[4\]"),
        (lambda: WeightsConfig(group_shapes=[[1, "a"]]), "group_shapes must be list"),
        (lambda: WeightsConfig(kernel_gptq={}), "kernel_gptq must be a GptqConfig or null, got {}"),
        (lambda: SmoothConfig(alpha=None), "alpha must be a number, got None"),
        (lambda: RotationConfig(transforms="hadamard"), "transforms must be list"),
        (lambda: QuantConfig(calib="photos"), "calib must be a CalibConfig, got 'photos'"),
        (lambda: MeasureConfig(images=Path("x")), "images must be text"),
    ],
)
def test_a_value_of_another_type_is_named(make, message):
    """From Python nothing else checks types, and a comparison would end in a TypeError."""
    with pytest.raises(UserError, match=message):
        make()


def test_tuples_and_numpy_numbers_are_taken():
    assert WeightsConfig(group_shapes=((1, 64),), bits={"a": np.int64(4)}, ridge=np.float32(0.5), target_bits=None)


DISTILL = ["--teacher.name", "nano", "--student.name", "nano", "--data.train", "scenes:1", "--data.val", "scenes:2"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--quant.min_bits", "7", "--quant.initial_bits", "6"],
            "quant.min_bits 7: must be in 2..6, where the student",
        ),
        (["--quant.initial_bits", "9"], "quant.initial_bits must be in 2..8, got 9"),
        (["--quant.target_bits", "3"], "quant.target_bits 3.0 is under min_bits 4"),
        (["--quant.wgts.kernel_gptq", "{}"], "give GPTQ, branches and bits for a target under ptq, or a package"),
        (["--ptq.calib", "{path: scenes:3, image_size: 128}"], "ptq.calib.image_size: .* set that"),
        (["--ptq", "{calib: {path: scenes:3}, rotation: {transforms: [hadamard], fold_heads: true}}"], "leave it out"),
        (["--ptq.calib.num_samples", "3"], "ptq.calib.path is not set"),
        (["--ptq", "{calib: {path: scenes:3}, wgts: {ridge: a}}"], "ptq.wgts.ridge: Couldn't parse 'a'"),
        (["--quant.ipts", "{dtype: uint8, group_shapes: [[-1, -1]], static: true}"], "target_bits need calibration"),
        (["--quant.ipts", "{dtype: sint8, allow_unsigned: true}"], "target_bits need calibration"),
        (["--quant.ipts", "{dtype: uint8, target_bits: 5}"], "target_bits need calibration"),
        (["--data.val", ""], "data.val is not set"),
        (["--teacher", "{name: tiny}"], "^teacher.checkpoint is not set"),
        (["--student", "{name: tiny}"], "^student.checkpoint is not set"),
        (["--teacher.dtype", "float8"], "^teacher.dtype 'float8'"),
        (
            ["--ptq", "{calib: {path: /data/quant.v2}, bits_from: x, wgts: {bits: {a: 4}}}"],
            "^ptq.bits_from: the package",
        ),
        (["--ptq", "{calib: {path: /data/quant.v2}, smooth: {proj: {alpha: 2}}}"], "^ptq.smooth.proj.alpha 2.0, beta"),
        (["--distill.settle_epochs", "2"], "unknown key distill.settle_epochs: it is called cooldown_epochs now"),
        (["--distill.confidence_method", "varience"], "did you mean 'variance'"),
        (["--distill.layers", "0"], "distill.layers: .* reads the losses of layers"),
        (["--distill.objects", "5"], "at most half of the 8 prompts"),
        (["--train.parallel", "xmap"], "allowed are jit, pmap"),
        (["--train.ema", "1"], "train.ema must be in 0..1"),
        (["--distributed.coordinator", "localhost:1"], "coordinator HOST:PORT, processes and index belong together"),
        (
            ["--distributed.coordinator", "nonsense", "--distributed.processes", "2", "--distributed.index", "0"],
            "coordinator 'nonsense': give HOST:PORT",
        ),
        (
            ["--distributed.coordinator", "localhost:abc", "--distributed.processes", "2", "--distributed.index", "0"],
            "coordinator 'localhost:abc': give HOST:PORT",
        ),
        (
            ["--distributed.coordinator", "localhost:1", "--distributed.processes", "0", "--distributed.index", "0"],
            "processes must be at least 1, got 0",
        ),
        (
            ["--distributed.coordinator", "localhost:1", "--distributed.processes", "2", "--distributed.index", "5"],
            "index must be 0 to 1, got 5",
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_a_distillation_that_cannot_be_is_an_error(flags, message):
    with pytest.raises(ValueError, match=message):
        loader.load(None, override(DISTILL, *flags), DistillConfig)


def test_a_student_starts_at_the_bits_of_its_dtype_or_at_initial_bits():
    load = lambda *flags: loader.load(None, override(DISTILL, *flags), DistillConfig).quant.starts_at
    assert load("--quant.wgts.dtype", "sint6") == 6
    assert load("--quant.wgts.dtype", "sint6", "--quant.initial_bits", "5") == 5


@pytest.mark.parametrize("schema", [Config, DistillConfig, EvaluateConfig])
def test_help_has_every_setting_with_its_default_and_a_comment(schema):
    lines = loader.keys(schema)
    flags, comments = lines[::2], lines[1::2]
    assert all(line.startswith("--") for line in flags)
    assert all(line.startswith("      ") and line.strip() for line in comments)
    if schema is Config:
        at = flags.index("--quant.wgts.kernel_gptq.damp_percentage 0.01")
        assert comments[at].strip() == "damping, as a share of the mean diagonal of the Gram matrix"
        assert any(flag.startswith("--quant.opts.dtype") for flag in flags)
