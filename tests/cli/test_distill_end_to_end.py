"""`python -m sam2jq distill` on a model of one block a stage at 64 pixels, from its flags to its package."""

import json

import jax
import numpy as np
import pytest
import torch

from converters.checkpoint import load_checkpoint, save_checkpoint
from converters.exports.package import load_package
from converters.hydra_config import CONFIGS
from sam2jq import VARIANTS, build, init_params
from sam2jq.cli.main import main
from sam2jq.distillation.history import history
from sam2jq.models.variants import Variant
from sam2jq.quant.leaves import materialize_params
from sam2jq.tree import flatten

pytestmark = pytest.mark.end_to_end
SKIPS = [
    "image_encoder",
    "memory_attention",
    "memory_encoder",
    "sam_prompt_encoder",
    "obj_ptr_proj",
    "obj_ptr_tpos_proj",
]
SKIPS += ["mask_downsample", "sam_mask_decoder.output_hypernetworks_mlps"]  # each layer takes half a second to compile
SMALL = Variant(
    16, 1, (1, 1, 1, 1), (2,), (4, 4, 4, 2), features=32, memory_features=16, memory_layers=1, memory_hidden=32,
    image_size=64,
)  # fmt: skip
FLAGS = {
    "teacher.name": "small-test", "student.name": "small-test", "data.image_size": 64,
    "data.train": "scenes:11", "data.val": "scenes:21", "data.train_samples": 4, "data.val_samples": 2,
    "quant.initial_bits": 5, "quant.wgts.skips": f"[{', '.join(SKIPS)}]",
    "quant.target_roots": "[sam_mask_decoder]",
    "distill.prompts": 2, "distill.objects": 1, "distill.window": 1, "distill.candidates": 2,
    "distill.layer_threshold": 9, "distill.impact_threshold": 9, "distill.impact_budget": 99,
    "train.epochs": 2, "train.batch_size": 2, "measure.images": "scenes:1001", "measure.num_images": 1,
}  # fmt: skip
FILES = {"config.yaml", "metrics.jsonl", "metrics.json", "package.pt", "vanilla.pt", "curves.png", "report.html"}


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """The folder of a finished run; the model's size is known as long as the tests of this file run."""
    root, programs = tmp_path_factory.mktemp("distill"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(VARIANTS, "small-test", SMALL)
        patch.setitem(CONFIGS, "small-test", "t")
        run(root, programs)
        yield root / "out" / "distill"


def run(root, programs):
    save_checkpoint(root / "model.pt", init_params(build("small-test"), 0))
    flags = FLAGS | {"output.root": root / "out", "cache.root": root / "cache"}
    flags |= dict.fromkeys(("teacher.checkpoint", "student.checkpoint"), root / "model.pt")
    count = lambda name, **_: programs.append(name) if name.endswith("compile_requests_use_cache") else None
    jax.monitoring.register_event_listener(count)
    assert main(["distill", *(part for key, value in flags.items() for part in (f"--{key}", str(value)))]) == 0
    jax.monitoring.unregister_event_listener(count)
    (root / "programs").write_text(str(len(programs)))


def rows_of(job):
    return [json.loads(line) for line in (job / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_its_files_and_no_partial_folder(job):
    assert {path.name for path in job.iterdir()} >= FILES
    assert [path.name for path in job.parent.iterdir()] == [job.name]


def test_a_run_compiles_few_programs(job):
    assert 10 < int((job.parents[1] / "programs").read_text()) < 140


def test_the_log_has_a_finite_loss_and_its_history_is_that_of_the_metrics(job):
    rows, metrics = rows_of(job), json.loads((job / "metrics.json").read_text())
    assert [row["step"] for row in rows if "val/loss" in row] == [0, 2, 4]
    assert all(np.isfinite(row["train/loss"]) for row in rows if "train/loss" in row)
    assert metrics["history"] == history(rows)
    assert set(metrics["results"]["miou"]) == {"full precision", "start", "distill"}


def test_layers_lose_bits_and_the_package_holds_the_bits_of_the_log(job):
    accepted = [one["layer"] for row in rows_of(job) for one in row.get("decisions", ()) if one["accepted"]]
    assert accepted
    assert all(layer.startswith("sam_mask_decoder") for layer in accepted)
    summary = load_package(job / "package.pt").summary()
    assert {row["name"] for row in summary["layers"] if row["bits"] == 4} == set(accepted)
    assert {row["bits"] for row in summary["layers"]} == {4, 5}


def test_the_package_loads_as_the_weights_of_the_vanilla_checkpoint(job):
    params = materialize_params(load_checkpoint(str(job / "package.pt"), build("small-test")).params)
    vanilla = torch.load(job / "vanilla.pt", weights_only=True)["model"]
    name = "sam_mask_decoder.transformer.layers.0.mlp.layers.0"
    kernel = flatten(params)["sam_mask_decoder/transformer/layers.0/mlp/layers.0/kernel"]
    np.testing.assert_allclose(np.asarray(kernel).T, vanilla[f"{name}.weight"], atol=1e-6)
    assert len(np.unique(vanilla[f"{name}.weight"][0])) <= 31
