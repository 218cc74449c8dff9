"""A run of the command line with every stage, and what it leaves for other programs."""

import json
import re
from pathlib import Path

import pytest
import torch

from converters.exports.nunchaku_model import load_nunchaku
from converters.exports.package import load_package
from sam2jq.api import replay_bits
from sam2jq.cli.main import main
from sam2jq.config.loader import load
from sam2jq.tree import layer_name
from tests.flags import override

pytestmark = pytest.mark.end_to_end


@pytest.fixture(scope="module")
def thorough(flags) -> Path:
    """The folder of a run with every stage but rotation, calibrated on clips, of one block only, to be quick."""
    others = ["memory_attention", "memory_encoder", "obj_ptr_proj", "obj_ptr_tpos_proj", "sam_mask_decoder"]
    others += ["sam_prompt_encoder", "mask_downsample", "image_encoder.neck", "image_encoder.trunk.patch_embed"]
    others += [f"image_encoder.trunk.blocks.{i}" for i in range(1, 7)]
    settings = {
        "calib": "{path: scenes:5, num_samples: 2, frames: 2}",
        "wgts.skips": f"[{', '.join(others)}]",
        "wgts.dtype": "uint4",
        "wgts.group_shapes": "[[1, 32]]",
        "wgts.kernel_gptq": "{}",
        "wgts.low_rank": "{rank: 4}",
        "wgts.ridge": "0.001",
        "wgts.bias_correction": "true",
        "smooth.proj": "{strategy: GridSearch, num_grids: 4}",
        "ipts": "{dtype: sint8, target_bits: 6.5, allow_unsigned: true}",
        "opts.dtype": "uint8",
    }
    more = [part for key, value in settings.items() for part in (f"--quant.{key}", value)]
    assert main(["quantize", *override(flags, *more), "--convert-nunchaku", "--output.job", "thorough"]) == 0
    return Path(flags[flags.index("--output.root") + 1]) / "thorough"


def test_every_stage_is_named_with_its_seconds_and_what_it_left_is_measured(thorough):
    log = (thorough / "run.log").read_text()
    build_transforms = [
        "calibrate",
        "input bits",
        "ridge",
        "smooth",
        "low rank",
        "weights",
        "inputs",
        "outputs",
        "nunchaku",
        "compare",
        "write",
    ]
    found = [re.search(rf"^{stage}  .* s$", log, re.MULTILINE) for stage in (*build_transforms, "write")]
    assert all(found)
    assert [match.start() for match in found] == sorted(match.start() for match in found)
    metrics = json.loads((thorough / "metrics.json").read_text())
    around = ["OutQuantized", "Smoothed", "LowRank", "ActQuantized"]
    assert [row["around"] for row in metrics["layers"]] == [around] * 4
    assert metrics["results"]["mask_iou"] > 0.5
    errors = {row["name"]: row["feature_error"]["stride16"] for row in metrics["stages"] if "feature_error" in row}
    assert list(errors) == ["ridge", "smooth", "low rank", "weights", "inputs", "outputs"]
    assert errors["smooth"] == pytest.approx(errors["ridge"], rel=1e-2)  # what is not rounded computes the same
    assert errors["low rank"] == pytest.approx(errors["ridge"], rel=1e-2)
    assert errors["weights"] > errors["low rank"]
    for row in metrics["layers"]:
        assert (row["bits"], row["rank"], row["part"]) == (4, 4, "trunk")
        assert 0 <= row["alpha"] <= 1
        assert 0 < row["output_error"] < row["relative_error"]  # what GPTQ is for
    assert len(metrics["unquantized"]) == 127
    assert metrics["results"]["nunchaku"]["mask_iou"] > 0.3  # its kernels round activations to 4 bits
    rounded = {"full precision", "weights", "inputs", "outputs", "nunchaku"}
    assert set(metrics["results"]["miou"]) == rounded  # the masks of scenes are known


def test_the_config_tells_which_inputs_are_unsigned_and_the_bits_of_all(thorough):
    """Inputs after GELU are unsigned; the target is 6.5 bits on average."""
    ipts = load(str(thorough / "config.yaml"), []).quant.ipts
    assert ipts.unsigned == ["image_encoder.trunk.blocks.0.mlp.layers.1"]
    assert len(set(ipts.bits.values())) > 1
    leaves = load_package(thorough / "package.pt").leaves()
    dtypes = {layer_name(path): leaf.inner.inner.inner.spec.dtype for path, leaf in leaves.items()}
    assert dtypes == {layer: f"{'u' if layer in ipts.unsigned else 's'}int{bits}" for layer, bits in ipts.bits.items()}


def test_a_run_leaves_nunchakus_files_and_deepcompressors(thorough):
    assert {path.name for path in (thorough / "cache").iterdir()} == {"model.pt", "scale.pt", "smooth.pt", "branch.pt"}
    linears, _, config = load_nunchaku(thorough / "nunchaku")
    assert len(linears) == 4
    assert config["name"] == "nano"
    branch, smooth, scale, model = (
        torch.load(thorough / "cache" / f"{name}.pt", weights_only=True)
        for name in ("branch", "smooth", "scale", "model")
    )
    layer = "image_encoder.trunk.blocks.0.mlp.layers.1"
    assert (branch[layer]["a.weight"].shape, branch[layer]["b.weight"].shape) == ((4, 128), (32, 4))
    assert scale[f"{layer}.weight.scale.0"].shape == scale[f"{layer}.weight.zero"].shape == (32, 1, 4, 1)
    left = model[f"{layer}.weight"] + branch[layer]["b.weight"] @ branch[layer]["a.weight"]
    vanilla = torch.load(thorough / "vanilla.pt", weights_only=True)["model"]
    torch.testing.assert_close(left / smooth[layer], vanilla[f"{layer}.weight"], rtol=1e-4, atol=1e-5)


def test_the_bits_of_a_package_are_replayed(thorough):
    flags = ["--model.name", "nano", "--quant.calib.path", "scenes:0", "--quant.bits_from", str(thorough)]
    found = replay_bits(load(None, flags).quant)
    assert found.bits_from == ""
    assert found.wgts.bits == {row["name"]: 4 for row in json.loads((thorough / "metrics.json").read_text())["layers"]}
    assert found.ipts.bits == {}  # which are not rounded
    chosen = load(thorough / "config.yaml", []).quant.ipts.bits
    assert len(set(chosen.values())) > 1
    assert replay_bits(load(None, [*flags, "--quant.ipts.dtype", "sint8"]).quant).ipts.bits == chosen
    with pytest.raises(ValueError, match="quant.bits_from: the package sets all bits"):
        load(None, [*flags, "--quant.wgts.target_bits", "3"])
