"""Masks from prompts on one image, computed by an ONNX engine: the calls of `ImagePredictor`."""

from pathlib import Path

import numpy as np

from sam2jq.deploy.engines import choose_engine, open_graph
from sam2jq.deploy.folder import find_graph, read_description
from sam2jq.predictors.prompted_image import PromptedImage, PromptMasks
from sam2jq.predictors.resizing import resize_maps

FEATURES = ("high_res_0", "high_res_1", "image_embed")


class OnnxImagePredictor(PromptedImage):
    """Segments one image at a time with the files of `sam2jq export --to onnx`.

        predictor = OnnxImagePredictor("outputs/onnx")
        predictor.set_image(image)
        masks, scores, low_res = predictor.predict(point_coords=[[x, y]], point_labels=[1])

    The methods, their arguments and their results are those of `ImagePredictor` and of SAM2ImagePredictor.
    """

    def __init__(
        self,
        folder: str | Path,
        engine: str = "auto",
        mask_threshold: float = 0.0,
        max_hole_area: float = 0.0,
        max_sprinkle_area: float = 0.0,
        *,
        dtype: str = "auto",
        cache: str | None = None,
    ):
        """A predictor of the model in `folder`; engine: onnxruntime, openvino or auto, the first that is installed.

        dtype, cache: as in `open_graph`. Raises UserError if the engine is not installed, or if the folder lacks a
        file, or has another than was exported.
        """
        self.engine, about = choose_engine(engine), read_description(folder)
        self.model, self.random = about["model"], about["random_weights"]
        self.mask_threshold = mask_threshold
        self.max_hole_area, self.max_sprinkle_area = max_hole_area, max_sprinkle_area
        graph = lambda name: open_graph(find_graph(folder, about, name), self.engine, dtype, cache)
        self._encoder, self._decoder = graph("image_encoder"), graph("prompt_mask_decoder")
        self.reset_predictor()

    @property
    def image_size(self) -> int:
        return self.model["image_size"]

    def encode(self, image: np.ndarray) -> list[np.ndarray]:
        outputs = self._encoder({"image": np.asarray(image, np.float32)})
        return [outputs[name] for name in FEATURES]

    def decode(self, features: list[np.ndarray], points, masks, *, multimask: bool) -> PromptMasks:
        out = self._decoder(decoder_inputs(features, points, masks))
        chosen = slice(1, None) if multimask else slice(0, 1)
        return PromptMasks(out["masks"][:, chosen], out["ious"][:, chosen])

    def enlarge(self, masks: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        return resize_maps(masks, size)


def decoder_inputs(features: list[np.ndarray], points, masks: np.ndarray | None) -> dict[str, np.ndarray]:
    """The inputs of prompt_mask_decoder.onnx; points and masks as in `PromptedImage.decode`.

    Points get the padding point that SAM 2 appends where no box is given separately; a prompt of a mask alone has none.
    """
    if points is None:
        prompts = 1 if masks is None else len(masks)
        coords, labels = np.zeros((prompts, 0, 2)), np.zeros((prompts, 0))
    else:
        coords, labels = points
        coords = np.pad(coords, ((0, 0), (0, 1), (0, 0)))
        labels = np.pad(labels, ((0, 0), (0, 1)), constant_values=-1)
    side = features[0].shape[1]
    return dict(zip(FEATURES, features)) | {
        "point_coords": np.asarray(coords, np.float32),
        "point_labels": np.asarray(labels, np.int32),
        "mask_input": np.zeros((1, side, side, 1), np.float32) if masks is None else np.asarray(masks, np.float32),
        "has_mask_input": np.array([masks is not None], np.float32),
    }
