import json
import re

from sam2jq.report.page import run_page
from sam2jq.report.run import layer_rows, merged, read_metrics
from sam2jq.report.verdict import scheme, scores, warnings

from .conftest import metrics

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
    for text in ("60.0", "-20.0", "1.60 MB", "4.20", "0.2000", "0.100"):
        assert text in page


def test_the_verdict_is_before_after_and_change():
    box, _, _, agreement = scores(metrics(4, 0.6))
    assert (box["name"], box["before"], box["after"], round(box["change"], 6)) == ("mIoU, box", 80.0, 60.0, -20.0)
    assert box["behind"] == "16 images, 50 objects, scenes:7"
    assert agreement["after"] == 70.0


def test_what_makes_figures_doubtful_is_said():
    found = metrics(4, 0.6)
    assert [text.split(":")[0] for text in warnings(found)] == [
        "Small sample",
        "mIoU was measured on the images of calibration",
    ]
    large = found["results"] | {"miou_images": 500, "held_out": True}
    assert warnings(found | {"results": large}) == []
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
