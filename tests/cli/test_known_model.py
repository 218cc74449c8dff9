"""What a package or checkpoint knows about its model is not asked again, and must not be contradicted."""

import re

import pytest

import sam2jq
from converters.checkpoint import read_weights
from converters.exports import EXPORTS
from sam2jq import UserError
from sam2jq.cli.distill import load_pair
from sam2jq.cli.loading import load_checkpoint_of
from sam2jq.cli.main import main
from sam2jq.config import loader
from sam2jq.config.distill import DistillConfig
from sam2jq.config.run import Config, EvaluateConfig, SegmentConfig
from sam2jq.data import read_image

from .conftest import failure

DATA = ["--data.train", "scenes:1", "--data.val", "scenes:2"]


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """The demo model at 128 pixels, as a package, and exported."""
    folder = tmp_path_factory.mktemp("small")
    model, params = sam2jq.build("nano", image_size=128), sam2jq.load("demo")[1]
    sam2jq.save(folder / "p.safetensors", model, params)
    about = {"model": sam2jq.api.describe_model(model), "random_weights": False}
    for to in ("vanilla", "safetensors"):
        EXPORTS[to].write(folder, model, params, about)
    return folder / "p.safetensors"


def test_segment_runs_at_the_size_of_the_package(package, tmp_path, capsys):
    out = ["--out", str(tmp_path / "m.png"), "--cache.root", str(tmp_path)]
    assert main(["segment", "scenes:3/0000", "--points", "75,60", "--model.checkpoint", str(package), *out]) == 0
    shown = float(re.search(r"estimated IoU ([\d.]+)", capsys.readouterr().out)[1])
    scores = {}
    for size in (128, 256):
        predictor = sam2jq.ImagePredictor(sam2jq.build("nano", image_size=size), sam2jq.load("demo")[1])
        predictor.set_image(read_image("scenes:3/0000"))
        _, score, _ = predictor.predict([[75, 60]], [1], multimask_output=False)
        scores[size] = float(score[0])
    assert shown == pytest.approx(scores[128], abs=1e-3)
    assert abs(scores[256] - scores[128]) > 1e-2


@pytest.mark.parametrize("schema", [SegmentConfig, EvaluateConfig, Config])
@pytest.mark.parametrize("name", ["p.safetensors", "vanilla.pt", "model.safetensors"])
def test_every_command_takes_name_version_and_size_from_the_file(package, schema, name):
    needed = {EvaluateConfig: ["--data", "scenes:0"], Config: ["--quant.calib.path", "scenes:0"]}.get(schema, [])
    source = ["--model.checkpoint", str(package.with_name(name))]
    load = lambda *flags: load_checkpoint_of(loader.load(None, [*source, *needed, *flags], schema).model)[0]
    assert load() == sam2jq.build("nano", image_size=128)
    for flag, value in (("image_size", "256"), ("name", "tiny"), ("version", '"2.0"')):
        with pytest.raises(UserError, match=f"holds a model of {flag} .*, not .*: leave out what the file knows"):
            load(f"--model.{flag}", value)


def test_the_size_of_a_plain_checkpoint_can_be_given_everywhere(tmp_path):
    flags = ["--model.name", "nano", "--model.image_size", "512"]
    assert load_checkpoint_of(loader.load(None, flags, SegmentConfig).model)[0] == sam2jq.build("nano", image_size=512)


def test_an_impossible_size_is_named(tmp_path, capsys):
    flags = ["--model.name", "nano", "--model.image_size", "500", "--points", "5,5", "--cache.root", str(tmp_path)]
    assert "image_size must be a multiple of 32 pixels, got 500" in failure(capsys, "segment", "scenes:3/0000", *flags)


def test_two_settings_of_one_size_must_agree():
    sizes = ["--quant.calib.image_size", "128", "--model.image_size", "256"]
    with pytest.raises(UserError, match=r"quant.calib.image_size is 128 and model.image_size is 256.*set only one"):
        loader.load(None, ["--model.name", "nano", "--quant.calib.path", "scenes:0", *sizes])
    models = ["--teacher.name", "nano", "--student.name", "nano", *DATA]
    with pytest.raises(UserError, match=r"data.image_size is 64 and student.image_size is 128"):
        loader.load(None, [*models, "--data.image_size", "64", "--student.image_size", "128"], DistillConfig)


@pytest.mark.parametrize("known", ["teacher", "student"])
def test_teacher_and_student_have_the_size_that_one_of_them_knows(package, known):
    other = "student" if known == "teacher" else "teacher"
    flags = [f"--{known}.checkpoint", str(package), f"--{other}.name", "nano", *DATA]
    pair = load_pair(loader.load(None, flags, DistillConfig))
    assert [model.variant.image_size for model, _ in pair] == [128, 128]
    with pytest.raises(UserError, match="holds a model of image_size 128, not 64"):
        load_pair(loader.load(None, [*flags, "--data.image_size", "64"], DistillConfig))


def test_random_weights_are_of_tiny_unless_a_name_is_given():
    assert loader.load(None, ["--model.checkpoint", "random:0"], SegmentConfig).model.name == "tiny"
    assert read_weights("demo").model == {"name": "nano", "version": "2.1"}
