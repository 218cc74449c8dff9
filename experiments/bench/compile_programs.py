"""The programs that `compile.py` compiles: what users run, traced for devices that need not be here.

Letters: S the side of an image in pixels, K inputs and N outputs of a layer.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from sam2jq import QuantSpec, build
from sam2jq.config.distill import DataConfig, DistillConfig
from sam2jq.config.run import ModelConfig
from sam2jq.data.images import MEAN, STD
from sam2jq.distillation.bit_trials import bits_program
from sam2jq.distillation.losses import PARTS, distillation_loss
from sam2jq.distillation.target_cache import Teacher, target_program
from sam2jq.distillation.trainer import make_student_loss
from sam2jq.models.sam2 import SAM2, abstract_params
from sam2jq.models.variants import POINTERS
from sam2jq.predictors import video_steps
from sam2jq.predictors.image import decode, encode_images
from sam2jq.predictors.memory_bank import FrameInfo, FrameOutput, MemoryBank
from sam2jq.ptq.calibration import fold_clip
from sam2jq.quant.algorithms.activations import quantize_inputs
from sam2jq.quant.algorithms.fake_quant import init_fake_quant
from sam2jq.quant.algorithms.gptq import GptqConfig, gptq_round, ldl_factor
from sam2jq.quant.leaves import matmul
from sam2jq.quant.qtensor import quantize, split_bits
from sam2jq.training.sharding import data_sharding, replicated
from sam2jq.training.state import init_state
from sam2jq.training.step import sharded_step, train_step
from sam2jq.tree import flatten, kernels, layer_name

Shape = jax.ShapeDtypeStruct
BF16, F32 = jnp.bfloat16, jnp.float32
NANO = ModelConfig(name="nano")
# the models are those of each program; of the settings, only those of loss and optimizer matter
CONFIG = DistillConfig(teacher=NANO, student=NANO, data=DataConfig(train="scenes:1", val="scenes:2"))
W8, W4, A8 = QuantSpec(8), QuantSpec(4, group_size=128), QuantSpec(8)


class Program(NamedTuple):
    """trace(mesh) -> jax.stages.Traced; devices: how many it runs on; quick: whether `--quick` compiles it, and CI."""

    trace: Callable[[Mesh], object]
    devices: int = 1
    quick: bool = False


def shaped(tree, sharding, dtype=None):
    """The shapes of a tree's arrays, placed as `sharding` says; dtype: in place of float32."""
    kind = lambda leaf: dtype if dtype is not None and leaf.dtype == F32 else leaf.dtype
    return jax.tree.map(lambda leaf: Shape(leaf.shape, kind(leaf), sharding=sharding), tree)


def images(model: SAM2, dtype, *batch: int) -> Shape:
    side = model.variant.image_size
    return Shape((*batch, side, side, 3), dtype)


def encoder(name: str, dtype, mesh: Mesh, precision: str | None = None):
    """The image encoder for one image."""
    model, place = build(name), partial(shaped, sharding=replicated(mesh))
    with jax.default_matmul_precision(precision):
        return encode_images.trace(model, place(abstract_params(model), dtype=dtype), place(images(model, dtype, 1)))


def decoder(name: str, dtype, mesh: Mesh):
    """The mask decoder for one click."""
    model, place = build(name), partial(shaped, sharding=replicated(mesh))
    params = place(abstract_params(model), dtype=dtype)
    features = place(jax.eval_shape(partial(encode_images, model), params, images(model, dtype, 1)))
    click = place((Shape((1, 1, 2), F32), Shape((1, 1), jnp.int32)))
    return jax.jit(partial(decode, model, multimask=True)).trace(params, features, click)


def video_step(name: str, dtype, objects: int, mesh: Mesh):
    """A frame of a clip, in bytes, with a full memory bank: encoder, memory attention, decoder, and the new memory."""
    model, place = build(name), partial(shaped, sharding=replicated(mesh))
    v = model.variant
    side, memory = v.image_size // 16, (v.image_size // 16, v.image_size // 16, v.memory_features)
    bank = MemoryBank(
        Shape((objects, 1), jnp.int32),
        Shape((objects, 1, *memory), BF16),
        Shape((objects, 1, v.features), dtype),
        Shape((objects, POINTERS), bool),
        Shape((objects, 6, *memory), BF16),
        Shape((objects, POINTERS, v.features), dtype),
    )
    mask = Shape((objects, 4 * side, 4 * side), F32)
    cond = FrameOutput(mask, Shape((objects, v.features), dtype), Shape((objects, 1), dtype), bank.cond_memory)
    cond = cond._replace(memory=Shape((objects, *memory), BF16))
    info = FrameInfo(*[Shape((), jnp.int32)] * 3)

    def step(params, image, bank, cond, is_cond, info):
        pixels = video_steps.normalize_frame(image, MEAN, STD, dtype)
        features = video_steps.encode_frame(model, params, pixels)
        conditioned = video_steps.condition_frame(model, params, features[-1], bank, info)
        return video_steps.track_frame(model, params, features, conditioned, bank, cond, is_cond)

    arrays = images(model, jnp.uint8, 1), bank, cond, Shape((objects,), bool), info
    return jax.jit(step).trace(place(abstract_params(model), dtype=dtype), *map(place, arrays))


def mask_gradient(name: str, size: int, mesh: Mesh):
    """The gradient through the convolutions that read masks, on which the TPU compiler aborted in training."""
    model, place = build(name, image_size=size), partial(shaped, sharding=replicated(mesh))

    def embed(sam: SAM2, masks):
        return sam.mask_downsample(masks).sum() + sam.sam_prompt_encoder(None, masks)[1].sum()

    gradient = jax.grad(lambda params, masks: model.apply({"params": params}, masks, method=embed))
    return jax.jit(gradient).trace(place(abstract_params(model)), place(Shape((2, size // 4, size // 4, 1), F32)))


def calibration(name: str, size: int | None, mesh: Mesh):
    """The statistics of every layer's inputs, for one more image."""
    model, place = build(name, image_size=size), partial(shaped, sharding=replicated(mesh))
    step = partial(fold_clip, model, ("gram", "range"), None)
    params, clip = abstract_params(model), images(model, F32, 1)
    folded = jax.eval_shape(step, params, {}, clip)
    return fold_clip.trace(model, ("gram", "range"), None, *map(place, (params, folded, clip)))


def gptq(inputs: int, outputs: int, mesh: Mesh):
    """GPTQ of one layer in groups of 128: the factors of the Gram matrix, and rounding."""
    spec, bits = split_bits(W4)

    def run(w, gram):
        return gptq_round(w, *ldl_factor(gram, inputs, 0.01, 200), spec, bits, GptqConfig())

    return jax.jit(run).trace(*shaped((Shape((inputs, outputs), F32), Shape((inputs, inputs), F32)), replicated(mesh)))


def weight_leaf(make: Callable | None, mesh: Mesh):
    """A product of 4096 x 384 by 384 x 1536 with the weight leaf that make(w) gives."""
    w = Shape((384, 1536), BF16 if make is None else F32)
    leaf = shaped(w if make is None else jax.eval_shape(make, w), replicated(mesh))
    return jax.jit(matmul).trace(leaf, shaped(Shape((4096, 384), BF16), replicated(mesh)))


def w8a8(spec: QuantSpec, integer: bool) -> Callable:
    return lambda w: quantize_inputs(quantize(w, spec), None, replace(A8, group_size=spec.group_size), integer=integer)


class Distillation(NamedTuple):
    """What the programs of one distillation are made of: the student's loss with its remat, and shapes of a batch."""

    student: dict
    loss: Callable
    batch: tuple


def distillation(teacher: str, student: str, size: int | None, remat: bool, mesh: Mesh) -> Distillation:
    """A W8 student in bfloat16 of `student`'s size, and a clip of one frame for each device of `mesh`."""
    models = [build(name, image_size=size) for name in (teacher, student)]
    params = abstract_params(models[1])
    specs = dict.fromkeys((layer_name(path) for path in kernels(flatten(params))), W8)
    fake = jax.eval_shape(lambda p: init_fake_quant(p, specs), params)
    run = target_program(Teacher(models[0], {}, "bfloat16"), CONFIG.distill, 0, mesh)
    frames, seeds = images(models[0], F32, mesh.size, 1), Shape((mesh.size,), jnp.uint32)
    batch = jax.eval_shape(run, abstract_params(models[0]), frames, seeds)
    weights = {part: getattr(CONFIG.distill, part) for part in PARTS}
    return Distillation(fake, distillation_loss(models[1].clone(remat=remat), weights, BF16), batch)


def targets(teacher: str, size: int | None, mesh: Mesh):
    """The teacher's outputs for a clip of one frame on each device."""
    model = build(teacher, image_size=size)
    run = target_program(Teacher(model, {}, "bfloat16"), CONFIG.distill, 0, mesh)
    split = partial(shaped, sharding=data_sharding(mesh))
    frames, seeds = images(model, F32, mesh.size, 1), Shape((mesh.size,), jnp.uint32)
    return run.trace(shaped(abstract_params(model), replicated(mesh)), split(frames), split(seeds))


def distillation_step(teacher: str, student: str, size: int | None, remat: bool, mesh: Mesh):
    """One step of the student on one clip for each device."""
    of = distillation(teacher, student, size, remat, mesh)
    loss, optimizer = make_student_loss(of.student, of.loss, CONFIG, 1000)
    state = jax.eval_shape(lambda params: init_state(params, optimizer, 0), of.student)
    step = sharded_step(train_step(loss, optimizer), mesh)
    return step.trace(shaped(state, replicated(mesh)), shaped(of.batch, data_sharding(mesh)))


def bit_trial(teacher: str, student: str, size: int | None, mesh: Mesh):
    """The validation loss of one bit assignment on each device."""
    of = distillation(teacher, student, size, False, mesh)
    layers = sum(path.endswith("/kernel") for path in kernels(flatten(of.student)))
    bits = shaped(Shape((mesh.size, layers), F32), data_sharding(mesh))
    whole = partial(shaped, sharding=replicated(mesh))
    return bits_program(of.loss, mesh).trace(whole(of.student), bits, whole(of.batch))


def at(fn: Callable, *args, **settings) -> Callable[[Mesh], object]:
    """fn(*args, mesh=mesh) as a function of the mesh."""
    return lambda mesh: fn(*args, mesh=mesh, **settings)


PROGRAMS = {
    "gradient of masks nano, 256": Program(at(mask_gradient, "nano", 256), quick=True),
    "encoder nano, 256, bf16": Program(at(encoder, "nano", BF16), quick=True),
    "encoder tiny, 1024, bf16": Program(at(encoder, "tiny", BF16)),
    "encoder tiny, 1024, f32 highest": Program(at(encoder, "tiny", F32, precision="highest")),
    "encoder large, 1024, bf16": Program(at(encoder, "large", BF16)),
    "decoder tiny, one click, bf16": Program(at(decoder, "tiny", BF16)),
    "video step nano, 3 objects, bf16": Program(at(video_step, "nano", BF16, 3)),
    "video step tiny, 1 object, bf16": Program(at(video_step, "tiny", BF16, 1)),
    "calibration nano, 256": Program(at(calibration, "nano", None)),
    "calibration tiny, 1024": Program(at(calibration, "tiny", None)),
    "GPTQ 384 x 1536, groups of 128": Program(at(gptq, 384, 1536), quick=True),
    "4096 x 384 x 1536, bf16": Program(at(weight_leaf, None), quick=True),
    "4096 x 384 x 1536, W8A16": Program(at(weight_leaf, lambda w: quantize(w, W8))),
    "4096 x 384 x 1536, W4A16, groups of 128": Program(at(weight_leaf, lambda w: quantize(w, W4)), quick=True),
    "4096 x 384 x 1536, W8A8 simulated": Program(at(weight_leaf, w8a8(W8, False))),
    "4096 x 384 x 1536, W8A8 in integers": Program(at(weight_leaf, w8a8(W8, True)), quick=True),
    "4096 x 384 x 1536, W8A8 in integers, groups of 128": Program(
        at(weight_leaf, w8a8(replace(W8, group_size=128), True)), quick=True
    ),
    "targets nano, 256": Program(at(targets, "nano", None), 4),
    "distillation nano, 256": Program(at(distillation_step, "nano", "nano", None, False), 4),
    "bit trials nano, 256": Program(at(bit_trial, "nano", "nano", None), 4),
    "targets small, 1024": Program(at(targets, "small", None)),
    "distillation small -> tiny, 1024": Program(at(distillation_step, "small", "tiny", None, False)),
    "distillation small -> tiny, 1024, remat": Program(at(distillation_step, "small", "tiny", None, True)),
    "distillation small -> tiny, 1024, remat, 4 devices": Program(
        at(distillation_step, "small", "tiny", None, True), 4
    ),
    "distillation large -> base-plus, 1024": Program(at(distillation_step, "large", "base-plus", None, False)),
    "distillation large -> base-plus, 1024, remat": Program(at(distillation_step, "large", "base-plus", None, True)),
}
