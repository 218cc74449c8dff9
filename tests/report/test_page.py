import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from sam2jq.errors import UserError
from sam2jq.eval.gallery import EverythingItem
from sam2jq.report import text
from sam2jq.report.check import check_metrics
from sam2jq.report.page import run_page
from sam2jq.report.run import NEEDED, layer_rows, merged, read_metrics
from sam2jq.report.verdict import scheme, scores, warnings

from .conftest import MARKUP, metrics

HISTORY = {
    "loss": [[0, 1.0], [10, 0.5], [20, 0.4]],
    "val_loss": [[20, 0.45]],
    "bits": {"steps": [0, 10, 20], "layers": {"a": [8, 6, 4], "b": [8, 8, 6]}},
    "decisions": [{"epoch": 1, "layer": "a", "from": 8, "to": 6, "impact": 0.01, "accepted": True, "reason": "least"}],
}


def test_a_page_is_one_file_that_names_no_other(make_run):
    page = (make_run("a") / "report.html").read_text()
    assert len(page) < 3_000_000
    assert not re.search(r"""(src|href)=["'](?!data:)""", page.replace('href="#', ""))
    assert "default-src 'none'" in page


def test_a_page_is_made_again_from_the_folder_to_the_byte(make_run):
    folder = make_run("a")
    assert run_page(folder, read_metrics(folder)) == (folder / "report.html").read_text()


@pytest.mark.parametrize(
    "name", ["/etc/hostname", "a\0b", "../secret.jpg", "gallery/../../secret.jpg", "link.jpg", "linked/s.jpg"]
)
def test_a_page_takes_no_picture_from_outside_the_folder_of_its_run(make_run, tmp_path, name):
    """metrics.json may come from elsewhere, and the page embeds what it names."""
    folder = make_run("a")
    (tmp_path / "secret").mkdir()
    for secret in (tmp_path / "secret.jpg", tmp_path / "secret" / "s.jpg"):
        shutil.copy(folder / "gallery/00_photo.jpg", secret)
    (folder / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    (folder / "linked").symlink_to(tmp_path / "secret")
    path = folder / "metrics.json"
    found = json.loads(path.read_text())
    found["gallery"][0]["files"]["photo"] = name
    path.write_text(json.dumps(found))
    for make in (lambda: read_metrics(folder), lambda: run_page(folder, found)):
        with pytest.raises(UserError, match=re.escape(f"names the file {name!r}, which is not in the run's folder")):
            make()


EVERYTHING = {"recall": 0.9, "miou": 0.8, "count_mismatch": 1, "masks": 20, "reference_masks": 22, "images": 3}


def test_a_page_shows_all_masks_of_an_image_before_and_after(make_run, tmp_path):
    masks = np.zeros((2, 48, 64), bool)
    masks[0, :20], masks[1, 20:] = True, True
    results = metrics(4, 0.6)["results"] | {"everything": EVERYTHING}
    folder = make_run("a", results=results, everything=EverythingItem(str(tmp_path / MARKUP), masks, masks[:1]))
    found = read_metrics(folder)
    assert run_page(folder, found) == (page := (folder / "report.html").read_text())
    assert 'alt="All masks of &lt;img' in page
    before, after = (
        np.asarray(Image.open(folder / name), float)
        for name in found["results"]["everything"]["shown"]["files"].values()
    )
    assert np.abs(before - after)[:16].mean() < 5 < np.abs(before - after)[24:].mean()
    (tmp_path / "secret.jpg").write_bytes((folder / "gallery/everything_after.jpg").read_bytes())
    found["results"]["everything"]["shown"]["files"]["after"] = "../secret.jpg"
    with pytest.raises(UserError, match="which is not in the run's folder"):
        run_page(folder, found)
    (folder / "gallery/everything_after.jpg").unlink()
    with pytest.raises(UserError, match=r"lacks gallery/everything_after\.jpg"):
        read_metrics(folder)


def set_shown(folder, changes):
    """Changes the first entry of the gallery in a run's metrics.json."""
    path = folder / "metrics.json"
    found = json.loads(path.read_text())
    found["gallery"][0] = found["gallery"][0] | changes if isinstance(changes, dict) else changes
    path.write_text(json.dumps(found))


@pytest.mark.parametrize("changes", [
    None, "x", [], {"files": None}, {"files": {}}, {"files": ["gallery/00_photo.jpg"]},
    {"files": {"photo": "gallery/00_photo.jpg", "before": 1, "after": None}}, {"click": None}, {"click": [1]},
    {"click": ["a", "b"]}, {"iou": "high"}, {"truth": {}}, {"truth": 1}, {"image": 3},
])  # fmt: skip
def test_a_malformed_entry_of_the_gallery_is_named_in_one_line(make_run, changes):
    folder = make_run("a")
    set_shown(folder, changes)
    with pytest.raises(UserError, match="metrics.json: entry 0 of the gallery does not describe a mask"):
        read_metrics(folder)


def put(content: dict, path: tuple, value: object) -> None:
    """Sets the value at `path` of nested dicts and lists, or deletes it if it is `...`."""
    *outer, last = path
    for key in outer:
        content = content[key]
    if value is ...:
        del content[last]
    else:
        content[last] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("layers",), {}, "layers is {}, not what a run writes"),
        (("layers",), "x", "layers is 'x', not"),
        (("layers", 1), None, r"layers\[1\] is None, not"),
        (("layers", 1, "bits"), "4", r"layers\[1\].bits is '4', not a whole number"),
        (("layers", 0, "around"), ..., r"layers\[0\].around is missing"),
        (("layers", 0, "inputs"), "uint", r"layers\[0\].inputs is 'uint', not what a run writes"),
        (("stages", 2, "feature_error"), {"stride4": 1.0}, r"stages\[2\].feature_error.stride8 is missing"),
        (("stages", 0), [], r"stages\[0\] is \[\], not"),
        (("config",), None, "config is None, not"),
        (("config", "quant"), ..., "config.quant is missing"),
        (("config", "quant", "wgts", "group_shapes"), [[1, 2, 3]], r"group_shapes\[0\] is \[1, 2, 3\], not"),
        (("config", "quant", "wgts", "low_rank"), {}, "low_rank.rank is missing"),
        (("results",), [], r"results is \[\], not"),
        (("results", "miou", "weights"), ..., "results.miou.weights is missing"),
        (("results", "miou_data"), ..., "results.miou_data is missing"),
        (("results", "held_out"), ..., "results.held_out is missing"),
        (("stages", 1, "mask_iou"), ..., r"stages\[1\].mask_iou is missing"),
        (("results", "kinds"), ["x"], r"results.kinds is \["),
        (("results", "kinds"), ["x", "weights"], "results.miou.x is missing"),
        (("model", "version"), 2.1, "model.version is 2.1, not text"),
        (("bytes_float32",), ..., "bytes_float32 is missing"),
        (("asked",), 3, "asked is 3, not"),
        (("history",), {"bits": {"steps": [0, 1], "layers": {"a": [8.0]}}}, "history.bits.layers.a has not one value"),
        (("history",), {"loss": [[1]]}, r"history.loss\[0\] is \[1\], not"),
    ],
)
def test_a_malformed_part_of_metrics_json_is_named(path, value, message):
    content = json.loads(json.dumps(metrics(4, 0.6)))
    assert not check_metrics(content)
    put(content, path, value)
    found = check_metrics(content)
    assert re.search(message, found[0])
    assert "\n" not in found[0]


def test_a_malformed_file_is_named_with_what_is_wrong_in_it(make_run):
    folder = make_run("a", history=HISTORY)
    content = read_metrics(folder)
    content["layers"] = [{}]
    (folder / "metrics.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"metrics.json: layers\[0\].name is missing; .*, and 12 more: quantize again"):
        read_metrics(folder)


def test_a_picture_of_the_gallery_that_is_no_mask_of_its_photograph_is_named(make_run):
    folder = make_run("a")
    for picture in (Image.new("1", (3, 3)), Image.new("RGB", (64, 48))):
        picture.save(folder / "gallery/00_before.png")
        with pytest.raises(UserError, match="00_before.png is not a mask of 64 x 48 pixels"):
            run_page(folder, read_metrics(folder))


def test_a_run_may_be_read_through_a_link_to_its_folder(make_run, tmp_path):
    folder = make_run("a")
    (tmp_path / "link").symlink_to(folder)
    assert run_page(tmp_path / "link", read_metrics(tmp_path / "link")) == (folder / "report.html").read_text()


def test_optional_keys_are_absent_where_they_were_not_set(make_run):
    for name, changes in {"a": {}, "b": {"history": HISTORY, "input_ranges": {}, "effective_bits": None}}.items():
        keys = json.loads((make_run(name, **changes) / "metrics.json").read_text()).keys()
        assert {"report_version", "effective_bits", *NEEDED} <= keys
        assert {"history", "input_ranges"} & keys == ({"history", "input_ranges"} & changes.keys())


def test_names_with_markup_stay_text(make_run):
    page = (make_run("a") / "report.html").read_text()
    assert "<img src=x" not in page
    assert page.count("&lt;img src=x") >= 3  # the image, the command, a stage


def test_every_figure_of_the_page_is_in_metrics_json(make_run):
    folder = make_run("a")
    found = json.loads((folder / "metrics.json").read_text())
    assert [shown["iou"] for shown in found["gallery"]] == [0.1, 0.5]
    assert {"seconds", "feature_error", "mask_iou"} < set(found["stages"][1])
    page = (folder / "report.html").read_text()
    for shown in ("60.0", "-20.0", "1.60 MB", "4.20", "0.2000", "0.100"):
        assert shown in page


def test_the_verdict_is_before_after_and_change():
    box, _, _, agreement = scores(metrics(4, 0.6))
    assert (box["name"], box["before"], box["after"], round(box["change"], 6)) == ("mIoU, box", 80.0, 60.0, -20.0)
    assert box["behind"] == "16 images, 50 objects, scenes:7"
    assert agreement["after"] == 70.0


def test_a_run_with_exported_files_shows_what_they_cost(make_run):
    cost = {"full precision": {"seconds": 1.5, "peak_gb": 0.75}}
    cost |= {"openvino": {"seconds": 0.125, "peak_gb": 0.25, "megabytes": 30.5}}
    folder = make_run("a", results=metrics(4, 0.6)["results"] | {"cost": cost})
    page = (folder / "report.html").read_text()
    for value in ("1.500", "0.75", "0.125", "0.25", "30.5"):
        assert f">{value}</td>" in page
    assert "0.125 s an image and a click, 0.25 GB at most (openvino)" in text.totals(read_metrics(folder))


def test_the_verdict_has_everything_found_again():
    found = metrics(4, 0.6)
    found |= {"results": found["results"] | {"everything": EVERYTHING}}
    assert not check_metrics(json.loads(json.dumps(found)))
    miou, recall = (row for row in scores(found) if row["name"].startswith("everything"))
    assert (miou["before"], miou["after"], recall["after"]) == (100.0, 80.0, 90.0)
    assert miou["behind"] == "3 images, 22 masks before and 20 after, another number in 1 image"


def test_the_verdict_has_j_and_f_with_memory_in_fewer_bits():
    found = metrics(4, 0.6)
    values = zip([*found["results"]["kinds"], "memory in 8 bits"], (70.0, 69.0, 68.5))
    video = {name: {"j&f": value} for name, value in values}
    found |= {
        "results": found["results"] | {"video": video, "video_clips": 2, "video_objects": 5, "video_data": "sa-v"}
    }
    assert not check_metrics(json.loads(json.dumps(found)))
    rows = {row["name"]: row for row in scores(found)}
    assert rows["J&F"]["change"] == -1
    assert rows["J&F, memory in 8 bits"]["change"] == -1.5


def test_the_verdict_has_the_scores_of_onnx_files_beside_full_precision():
    found = metrics(4, 0.6)
    miou = found["results"]["miou"] | {"onnxruntime": dict.fromkeys(("box", "1 click", "3 clicks"), 0.55)}
    rows = {row["name"]: row for row in scores(found | {"results": found["results"] | {"miou": miou}})}
    row = rows["mIoU, box, ONNX files in onnxruntime"]
    assert (row["before"], row["after"]) == (80.0, pytest.approx(55.0))
    assert "mIoU, box, ONNX files in openvino" not in rows


def test_what_makes_figures_doubtful_is_said():
    found = metrics(4, 0.6)
    assert [text.split(":")[0] for text in warnings(found)] == [
        "Small sample",
        "mIoU was measured on the calibration images",
    ]
    large = found["results"] | {"miou_images": 500, "held_out": True}
    assert warnings(found | {"results": large}) == []
    without = large | {"miou_left_out": {"a.jpg": "a.jpg: not readable", "b.jpg/7": "its mask is empty"}}
    assert warnings(found | {"results": without}) == [
        "Without a score: a.jpg: not readable, b.jpg/7: its mask is empty."
    ]
    assert "RANDOM" in warnings(found | {"results": large, "random_weights": True})[0]


def test_a_scheme_is_named_as_people_name_it():
    found = metrics(4, 0.6)
    assert scheme(found) == "W4A16 per channel, smooth"
    quant = found["config"]["quant"]
    wgts = quant["wgts"] | {"group_shapes": [[1, 128]], "kernel_gptq": {}, "low_rank": {"rank": 32}}
    layers = [row | {"bits": bits, "inputs": "uint8"} for row, bits in zip(found["layers"], (4, 3, 6))]
    found |= {"config": {"quant": quant | {"wgts": wgts}}, "layers": layers}
    assert scheme(found) == "W3-6A8 g128, GPTQ, smooth, rank 32"
    layers[0]["inputs"] = "uint2"
    assert scheme(found) == "W3-6A2-8 g128, GPTQ, smooth, rank 32"


def test_a_stage_in_parts_is_one_row_with_the_seconds_of_all():
    record = [
        {"name": "weights", "what": "sint4, 1 of 2", "seconds": 1.0},
        {"name": "inputs", "what": "uint8", "seconds": 0.5},
        {"name": "weights", "what": "sint4, 2 of 2", "seconds": 2.0},
    ]
    assert merged(record) == [
        {"name": "weights", "what": "sint4", "seconds": 3.0},
        {"name": "inputs", "what": "uint8", "seconds": 0.5},
    ]


def test_layers_stand_in_the_order_of_the_data():
    rows = [{"name": "b"}, {"name": "a"}]
    figures = {"a": {"relative_error": 0.1}, "b": {"relative_error": 0.0}}
    first, second = layer_rows(rows, figures, {"a": (0.5, 0.5)})
    assert (first["name"], round(first["sqnr"], 6), first["alpha"]) == ("a", 20.0, 0.5)
    assert (second["name"], second["sqnr"], second["alpha"]) == ("b", None, None)


def test_distillation_is_drawn_where_there_was_any(make_run):
    page = (make_run("a", history=HISTORY) / "report.html").read_text()
    assert "Bits of each layer over time" in page
    assert "<td>least</td>" in page
    assert "Distillation" not in (make_run("b") / "report.html").read_text()
