"""Masks of everything in an image: the counterpart of sam2's SAM2AutomaticMaskGenerator (SAM, arXiv 2304.02643, B)."""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sam2jq.data import preprocess
from sam2jq.data.coco_masks import encode_runs, run_text
from sam2jq.data.images import check_image, pixels_of
from sam2jq.errors import UserError
from sam2jq.models.params import check_params
from sam2jq.models.precision import cast_kernels, float_dtype
from sam2jq.models.sam2 import SAM2
from sam2jq.predictors.crops import crop_boxes, layer_grids, near_crop_edge, non_maximum_suppression, width_height
from sam2jq.predictors.image import decode, encode_images
from sam2jq.predictors.pretrained import FromPretrained
from sam2jq.predictors.prompts import LOGIT_LIMIT
from sam2jq.predictors.regions import remove_small_regions
from sam2jq.predictors.upscale import Canvas, canvas_of, measure, threshold

Array = jax.Array
OUTPUT_MODES = ("binary_mask", "uncompressed_rle", "coco_rle")
MASKS_AT_ONCE = 8  # of the size of the image, in memory


class Candidates(NamedTuple):
    """N masks found in a crop. logits: [N, S / 4, S / 4]; boxes and points: in pixels of the image."""

    logits: np.ndarray
    ious: np.ndarray  # [N], estimated by the model
    stability: np.ndarray  # [N]
    boxes: np.ndarray  # [N, 4], x0 y0 x1 y1
    points: np.ndarray  # [N, 2]


class AutomaticMaskGenerator(FromPretrained):
    """Finds all masks of an image, from a grid of clicks.

        generator = AutomaticMaskGenerator(model, params)   # or AutomaticMaskGenerator.from_pretrained("demo")
        for record in generator.generate(image):
            record["segmentation"]  # bool [H, W]

    The arguments and the records are those of SAM2AutomaticMaskGenerator. XLA compiles once, and once per rounded size
    of images and layer of crops.
    """

    def __init__(
        self,
        model: SAM2,
        params: dict,
        points_per_side: int | None = 32,
        points_per_batch: int = 64,
        pred_iou_thresh: float = 0.8,
        stability_score_thresh: float = 0.95,
        stability_score_offset: float = 1.0,
        mask_threshold: float = 0.0,
        box_nms_thresh: float = 0.7,
        crop_n_layers: int = 0,
        crop_nms_thresh: float = 0.7,
        crop_overlap_ratio: float = 512 / 1500,
        crop_n_points_downscale_factor: int = 1,
        point_grids: list[np.ndarray] | None = None,
        min_mask_region_area: int = 0,
        output_mode: str = "binary_mask",
        use_m2m: bool = False,
        multimask_output: bool = True,
        *,
        dtype: str = "auto",
    ):
        """A generator of `model` with `params`; dtype: of the activations, as `float_dtype` takes it.

        points_per_side: of the grid of clicks; None: point_grids has a grid [N, 2] in 0..1 for the image and for each
        layer of crops. points_per_batch: clicks in one call of the model.
        pred_iou_thresh, stability_score_thresh: masks with lower scores are left out; 0 keeps all. stability: the IoU
        of the masks whose logits are above mask_threshold +- stability_score_offset.
        box_nms_thresh: of masks of one crop whose boxes have a higher IoU, the one with the highest score remains;
        crop_nms_thresh: of masks of different crops, the one of the smallest crop.
        crop_n_layers: layer i has 4 ** i crops, with points_per_side / crop_n_points_downscale_factor ** i points a
        side, which overlap by crop_overlap_ratio of the shorter side in layer 1.
        min_mask_region_area: holes and regions up to this many pixels of a low-resolution mask are removed.
        output_mode: "binary_mask", "uncompressed_rle" or "coco_rle". use_m2m: each mask is refined once, with itself
        as the prompt. multimask_output: three masks per click.

        Raises UserError for a wrong mode, for no points, and for params of another model.
        """
        if output_mode not in OUTPUT_MODES:
            raise UserError(f"output_mode {output_mode!r}: allowed are {', '.join(OUTPUT_MODES)}")
        if points_per_batch < 1:
            raise UserError(f"points_per_batch {points_per_batch}: it must be at least 1")
        self.point_grids = layer_grids(points_per_side, crop_n_layers, crop_n_points_downscale_factor, point_grids)
        check_params(type(self).__name__, model, params)
        self.model, self.dtype = model, float_dtype(dtype)
        self.params = cast_kernels(params, self.dtype)
        self.points_per_batch = points_per_batch
        self.pred_iou_thresh = pred_iou_thresh
        self.stability_score_thresh, self.stability_score_offset = stability_score_thresh, stability_score_offset
        self.mask_threshold = mask_threshold
        self.box_nms_thresh, self.crop_nms_thresh = box_nms_thresh, crop_nms_thresh
        self.crop_n_layers, self.crop_overlap_ratio = crop_n_layers, crop_overlap_ratio
        self.min_mask_region_area = min_mask_region_area
        self.output_mode = output_mode
        self.use_m2m, self.multimask_output = use_m2m, multimask_output

    def generate(self, image) -> list[dict]:
        """A record per mask of an image, uint8 [H, W, 3] RGB or a PIL image; [] if there is none.

        Keys: "segmentation", as output_mode says; "area" in pixels; "bbox" and "crop_box", x y width height;
        "predicted_iou"; "point_coords", [[x, y]] of the click; "stability_score".
        Raises UserError for an image or a crop that is 1 pixel high or wide, in which masks have no extent.
        """
        image = pixels_of(image)
        check_image(image)
        size = image.shape[:2]
        crops = crop_boxes(size, self.crop_n_layers, self.crop_overlap_ratio)
        if min(size) < 2:
            raise UserError(f"the image has {size[1]} x {size[0]} pixels: give one of 2 x 2 pixels at least")
        if any(x1 - x0 < 2 or y1 - y0 < 2 for _, (x0, y0, x1, y1) in crops):
            raise UserError(f"crop_n_layers {self.crop_n_layers}: crops of an image of {size[1]} x {size[0]} pixels "
                            "would be less than 2 pixels wide or high; give fewer layers")  # fmt: skip
        found = [self._find_in_crop(image, layer, crop) for layer, crop in crops]
        return self._records(found, [crop for _, crop in crops], size)

    def _find_in_crop(self, image: np.ndarray, layer: int, crop: list[int]) -> Candidates:
        """The masks of one crop, without duplicates, by falling estimated IoU."""
        x0, y0, x1, y1 = crop
        side, size = self.model.variant.image_size, (y1 - y0, x1 - x0)
        pixels = preprocess(image[y0:y1, x0:x1], side)[None]
        features = encode_images(self.model, self.params, jnp.asarray(pixels, self.dtype))
        canvas, offset = canvas_of(side // 4, size), np.array([x0, y0], np.float32)
        grid = (self.point_grids[layer] * size[::-1]).astype(np.float32)
        batches = [self._empty(), *(self._find_at(features, points, canvas) for points in self._batches(grid))]
        found = Candidates(*map(np.concatenate, zip(*batches)))
        found = found._replace(boxes=found.boxes + np.tile(offset, 2), points=found.points + offset)
        found = select(found, ~near_crop_edge(found.boxes, crop, image.shape[:2]))
        return select(found, non_maximum_suppression(found.boxes, found.ious, self.box_nms_thresh))

    def _batches(self, rows: np.ndarray) -> Iterator[np.ndarray]:
        """`points_per_batch` rows after `points_per_batch` rows."""
        return (rows[i : i + self.points_per_batch] for i in range(0, len(rows), self.points_per_batch))

    def _empty(self) -> Candidates:
        """No masks."""
        side = self.model.variant.image_size // 4
        shapes = (0, side, side), 0, 0, (0, 4), (0, 2)
        return Candidates(*(np.zeros(shape, np.float32) for shape in shapes))

    def _find_at(self, features: list[Array], points: np.ndarray, canvas: Canvas) -> Candidates:
        """The masks of clicks [P, 2], in pixels of the crop, whose scores are high enough."""
        scaled = points / np.array(canvas.size[::-1], np.float32) * self.model.variant.image_size
        prompts = pad_rows(scaled, self.points_per_batch)[:, None], np.ones((self.points_per_batch, 1), np.int32)
        out = decode(self.model, self.params, features, prompts, multimask=self.multimask_output)
        logits, ious = out.masks, out.ious
        if self.use_m2m:
            logits, ious = self._refine(features, prompts, logits)
        count = len(points) * logits.shape[1]
        ious = np.asarray(ious, np.float32).ravel()[:count]
        keep = np.flatnonzero(ious > self.pred_iou_thresh) if self.pred_iou_thresh > 0 else np.arange(count)
        logits = np.asarray(logits).reshape(-1, *logits.shape[2:])[keep].astype(np.float32)
        if self.min_mask_region_area > 0 and len(keep):
            logits = remove_small_regions(logits, 0.0, self.min_mask_region_area, self.min_mask_region_area)
        boxes, stability = self._measure(logits, canvas)
        found = Candidates(logits, ious[keep], stability, boxes, points[keep // out.masks.shape[1]])
        stable = stability >= self.stability_score_thresh if self.stability_score_thresh > 0 else slice(None)
        return select(found, stable)

    def _refine(self, features: list[Array], prompts, logits: Array) -> tuple[Array, Array]:
        """Masks [P, M, h, w] and IoUs [P, M] of clicks with each of their own masks as a further prompt."""
        logits = jnp.clip(logits, -LOGIT_LIMIT, LOGIT_LIMIT)
        refine = lambda masks: decode(self.model, self.params, features, prompts, masks[..., None], multimask=False)
        refined = [refine(logits[:, i]) for i in range(logits.shape[1])]
        return tuple(jnp.concatenate(part, axis=1) for part in zip(*((out.masks, out.ious) for out in refined)))

    def _measure(self, logits: np.ndarray, canvas: Canvas) -> tuple[np.ndarray, np.ndarray]:
        """Boxes [N, 4] and stability [N] of mask logits [N, h, w]."""
        parts = [(np.zeros((0, 4), np.int32), np.zeros(0, np.float32))]
        for batch in self._batches(logits):
            padded = pad_rows(batch, self.points_per_batch)
            stats = measure(padded, canvas, self.mask_threshold, self.stability_score_offset)
            parts.append(tuple(np.asarray(x)[: len(batch)] for x in stats))
        return tuple(map(np.concatenate, zip(*parts)))

    def _records(self, found: list[Candidates], crops: list[list[int]], size: tuple[int, int]) -> list[dict]:
        """The records of all crops; of duplicates in several crops, the one of the smallest crop remains."""
        boxes = np.concatenate([each.boxes for each in found])
        kept = np.arange(len(boxes))
        if len(crops) > 1:
            areas = np.repeat([(x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in crops], [len(f.boxes) for f in found])
            kept = non_maximum_suppression(boxes, 1 / areas.astype(np.float32), self.crop_nms_thresh)
        records: dict[int, dict] = {}
        first = 0
        for each, crop in zip(found, crops):
            own = kept[(kept >= first) & (kept < first + len(each.boxes))]
            chosen = select(each, own - first)
            masks = self._full_masks(chosen.logits, crop, size)
            records |= {
                index: self._record(mask, chosen, i, crop) for i, (index, mask) in enumerate(zip(own.tolist(), masks))
            }
            first += len(each.boxes)
        return [records[index] for index in kept.tolist()]

    def _full_masks(self, logits: np.ndarray, crop: list[int], size: tuple[int, int]) -> Iterator[np.ndarray]:
        """Yields masks bool [H, W] in the image of mask logits [N, h, w] in a crop."""
        x0, y0, x1, y1 = crop
        canvas = canvas_of(self.model.variant.image_size // 4, (y1 - y0, x1 - x0))
        for start in range(0, len(logits), MASKS_AT_ONCE):
            batch = logits[start : start + MASKS_AT_ONCE]
            masks = np.asarray(threshold(pad_rows(batch, MASKS_AT_ONCE), canvas, self.mask_threshold))
            for mask in masks[: len(batch), : y1 - y0, : x1 - x0]:
                yield np.pad(mask, ((y0, size[0] - y1), (x0, size[1] - x1)))

    def _record(self, mask: np.ndarray, found: Candidates, i: int, crop: list[int]) -> dict:
        """What `generate` returns of a mask [H, W] and its candidate."""
        segmentation = mask
        if self.output_mode != "binary_mask":
            runs = encode_runs(mask)
            counts = run_text(runs) if self.output_mode == "coco_rle" else runs
            segmentation = {"size": list(mask.shape), "counts": counts}
        return {
            "segmentation": segmentation,
            "area": int(mask.sum()),
            "bbox": width_height(found.boxes[i]),
            "predicted_iou": found.ious[i].item(),
            "point_coords": [found.points[i].tolist()],
            "stability_score": found.stability[i].item(),
            "crop_box": width_height(crop),
        }


def select(found: Candidates, keep) -> Candidates:
    """The candidates at `keep`, indices or bool [N]."""
    return Candidates(*(array[keep] for array in found))


def pad_rows(rows: np.ndarray, count: int) -> np.ndarray:
    """`rows` [N, ...] with the last one repeated up to `count` rows."""
    return np.concatenate([rows, np.repeat(rows[-1:], count - len(rows), axis=0)])
