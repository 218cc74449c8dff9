"""Objects tracked through a clip, computed by an ONNX engine: the calls of `VideoPredictor`."""

from pathlib import Path

import numpy as np

from sam2jq.data.images import normalize
from sam2jq.deploy.engines import choose_engine, open_graph
from sam2jq.deploy.folder import find_graph, read_description
from sam2jq.deploy.image import decoder_inputs
from sam2jq.models.variants import MEMORIES, NO_OBJECT
from sam2jq.predictors.bank_arrays import EMPTY, FrameInfo, FrameOutput, MemoryBank, shift_bank
from sam2jq.predictors.prompted_video import PromptedVideo
from sam2jq.predictors.resizing import resize_maps
from sam2jq.predictors.video_state import check_max_cond_frames, stack

GRAPHS = ("image_encoder", "prompt_mask_decoder", "memory_attention", "memory_encoder", "mask_prompt")
PADDING_POINT = np.zeros((1, 1, 2), np.float32), np.full((1, 1), -1, np.int32)


class OnnxVideoPredictor(PromptedVideo):
    """Tracks objects through a clip with the files of `sam2jq export --to onnx`.

        predictor = OnnxVideoPredictor("outputs/onnx")
        state = predictor.init_state("clip_frames")
        predictor.add_new_points_or_box(state, frame_idx=0, obj_id=1, points=[[x, y]], labels=[1])
        for frame_idx, obj_ids, masks in predictor.propagate_in_video(state):
            masks > 0  # [objects, 1, H, W]

    The methods, their arguments and their results are those of `VideoPredictor` and of SAM2VideoPredictor. Objects of
    a frame are computed one after the other, each with the memories that it has. Video files need PyAV.
    """

    def __init__(
        self,
        folder: str | Path,
        engine: str = "auto",
        fill_hole_area: int = 0,
        non_overlap_masks: bool = False,
        clear_non_cond_mem_around_input: bool = False,
        add_all_frames_to_correct_as_cond: bool = False,
        *,
        clear_non_cond_mem_for_multi_obj: bool = False,
        max_cond_frames_in_attn: int = -1,
        dtype: str = "auto",
        cache: str | None = None,
    ):
        """A predictor of the model in `folder`; arguments as of `OnnxImagePredictor` and `PromptedVideo`.

        Raises UserError as `OnnxImagePredictor` does, and for the folder of an image-only model.
        """
        self.engine, about = choose_engine(engine), read_description(folder)
        self.model, self.random = about["model"], about["random_weights"]
        self.fill_hole_area, self.non_overlap_masks = fill_hole_area, non_overlap_masks
        self.add_all_frames_to_correct_as_cond = add_all_frames_to_correct_as_cond
        self.clear_non_cond_mem_around_input = clear_non_cond_mem_around_input
        self.clear_non_cond_mem_for_multi_obj = clear_non_cond_mem_for_multi_obj
        self.max_cond_frames_in_attn = check_max_cond_frames(max_cond_frames_in_attn)
        paths = {name: find_graph(folder, about, name) for name in GRAPHS}
        self._graphs = {name: open_graph(path, self.engine, dtype, cache) for name, path in paths.items()}

    @property
    def image_size(self) -> int:
        return self.model["image_size"]

    def encode_frame(self, image: np.ndarray) -> list[np.ndarray]:
        """The maps that the decoder takes, and the coarsest without the embedding of "no memory"."""
        out = self._graphs["image_encoder"]({"image": normalize(image.astype(np.float32) / 255)})
        return [out[name] for name in ("high_res_0", "high_res_1", "image_embed", "frame_embed")]

    def condition_frame(self, coarse: np.ndarray, bank: MemoryBank, info: FrameInfo) -> np.ndarray:
        attend = self._graphs["memory_attention"]
        banks = (MemoryBank(*(part[i : i + 1] for part in bank)) for i in range(len(bank.cond_frames)))
        maps = [attend({"frame_embed": coarse} | attention_inputs(each, info))["image_embed"] for each in banks]
        return np.concatenate(maps)

    def prompt_frame(
        self, features: list[np.ndarray], conditioned: np.ndarray | None, points, mask_input, *, multimask: bool
    ) -> FrameOutput:
        *fine, image_embed, _ = features
        maps = [*fine, image_embed if conditioned is None else conditioned]
        return self._decode(maps, points, mask_input, multimask=multimask)

    def mask_frame(self, features: list[np.ndarray], mask: np.ndarray) -> FrameOutput:
        mask = mask.astype(np.float32)
        prompt = self._graphs["mask_prompt"]({"mask": mask})
        fine0, fine1, _, coarse = features
        decoded = self._decode([fine0, fine1, coarse], PADDING_POINT, prompt["mask_input"], multimask=False)
        logits = self.resize(mask[..., 0] * 20 - 10, (self.image_size // 4,) * 2, antialias=True)
        present = mask.any()
        pointer = decoded.pointer if present else prompt["no_object_pointer"]
        return FrameOutput(logits, pointer, np.full((1, 1), 10 if present else -10, np.float32), None)

    def memorize_prompted(self, coarse: np.ndarray, output: FrameOutput) -> FrameOutput:
        return self._memorize(coarse, output, binarize=True)

    def track_frame(
        self, features: list[np.ndarray], conditioned: np.ndarray, bank: MemoryBank, cond: FrameOutput, is_cond
    ) -> tuple[FrameOutput, MemoryBank]:
        def track(i: int) -> FrameOutput:
            if is_cond[i]:
                return FrameOutput(*(part[i : i + 1] for part in cond))
            output = self._decode([*features[:2], conditioned[i : i + 1]], PADDING_POINT, None, multimask=True)
            return self._memorize(features[-1], output, binarize=False)

        output = stack([track(i) for i in range(len(is_cond))])
        return output, shift_bank(bank, output, ~is_cond, np.concatenate)

    def resize(
        self, maps: np.ndarray, size: tuple[int, int], *, count: int | None = None, antialias: bool = False
    ) -> np.ndarray:
        return resize_maps(maps[:count], size, antialias=antialias)

    def _decode(self, features: list[np.ndarray], points, mask_input, *, multimask: bool) -> FrameOutput:
        """The mask with the highest estimated IoU, and its pointer; NO_OBJECT where there is no object."""
        out = self._graphs["prompt_mask_decoder"](decoder_inputs(features, points, mask_input))
        best = 1 + out["ious"][0, 1:].argmax() if multimask else 0
        mask = out["masks"][:, best] if out["object_score"][0, 0] > 0 else np.full_like(out["masks"][:, 0], NO_OBJECT)
        return FrameOutput(mask, out["pointers"][:, best], out["object_score"], None)

    def _memorize(self, coarse: np.ndarray, output: FrameOutput, *, binarize: bool) -> FrameOutput:
        inputs = {"frame_embed": coarse, "mask_logits": output.mask, "object_score": output.object_score}
        out = self._graphs["memory_encoder"](inputs | {"binarize": np.array([binarize], np.float32)})
        return output._replace(memory=round_to_bfloat16(out["memory"]))


def attention_inputs(bank: MemoryBank, info: FrameInfo) -> dict[str, np.ndarray]:
    """The inputs of memory_attention.onnx from the bank [1, ...] of one object, as `condition_on_memory` uses it."""
    slots = bank.non_cond_memory.shape[1]
    cond_ages, cond_valid = (info.frame - bank.cond_frames[0]) * info.direction, bank.cond_frames[0] != EMPTY
    ages = np.arange(1, bank.non_cond_valid.shape[1] + 1)
    valid, cond_pointers = bank.non_cond_valid[0], cond_valid & (cond_ages >= 0)
    recent = valid & (ages <= info.max_age)
    memories = bank.cond_memory[0][cond_valid], bank.non_cond_memory[0][valid[:slots]]
    pointers = np.concatenate([bank.cond_pointer[0][cond_pointers], bank.non_cond_pointer[0][recent]])
    times = np.concatenate([cond_ages[cond_pointers], ages[recent]]) / info.max_age
    tokens = pointers.reshape(-1, memories[0].shape[-1])  # a pointer is cut into tokens of the memories' width
    return {
        "memories": np.concatenate(memories),
        "times": np.concatenate([np.zeros(len(memories[0]), np.int64), MEMORIES - ages[:slots][valid[:slots]]]),
        "pointers": tokens,
        "pointer_times": times.repeat(len(tokens) // max(len(pointers), 1)).astype(np.float32),
    }


def round_to_bfloat16(x: np.ndarray) -> np.ndarray:
    """float32 x rounded to the numbers that bfloat16 has, half to even: memories are kept in it, as in the original."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)
