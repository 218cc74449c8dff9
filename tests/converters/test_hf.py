"""converters/hf.py: a bijection of names, and the same function under both.

hf_names.json: names and shapes of what `Sam2VideoModel(config).save_pretrained` of transformers 5.23 writes.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from converters import hf
from converters.exports.vanilla import define_torchvision_operators
from sam2jq.tree import flatten
from tests.conftest import twin

RECORDED = json.loads(Path(__file__).with_name("hf_names.json").read_text())
MODELS = [(size, version) for size in RECORDED["vision_encoder"] for version in ("2.0", "2.1")]
every_model = pytest.mark.parametrize(("size", "version"), MODELS)

# How Hugging Face's configuration of each size differs from the defaults, which are those of tiny.
HEADS = {"num_attention_heads_per_stage": [2, 4, 8, 16]}
BACKBONES = {
    "tiny": {},
    "small": {"blocks_per_stage": [1, 2, 11, 2], "global_attention_blocks": [7, 10, 13]},
    "base-plus": {
        "hidden_size": 112,
        "embed_dim_per_stage": [112, 224, 448, 896],
        "blocks_per_stage": [2, 3, 16, 3],
        "global_attention_blocks": [12, 16, 20],
        "window_positional_embedding_background_size": [14, 14],
        **HEADS,
    },
    "large": {
        "hidden_size": 144,
        "embed_dim_per_stage": [144, 288, 576, 1152],
        "blocks_per_stage": [2, 6, 36, 4],
        "global_attention_blocks": [23, 33, 43],
        "window_size_per_stage": [8, 4, 16, 8],
        **HEADS,
    },
}


def recorded(size: str, version: str) -> dict[str, tuple[int, ...]]:
    """{name: shape} of a Hugging Face checkpoint."""
    tree = {**RECORDED["every size"], "vision_encoder": RECORDED["vision_encoder"][size]}
    missing = RECORDED["only 2.1"] if version == "2.0" else ()
    shapes = {path.replace("/", "."): tuple(shape) for path, shape in flatten(tree).items()}
    return {key: shape for key, shape in shapes.items() if key not in missing}


def checkpoint(size: str, version: str) -> dict[str, torch.Tensor]:
    """A Hugging Face state dict in which no two tensors are equal, but for the two that must be; takes no memory."""
    values = {k: torch.tensor(float(i)).expand(shape) for i, (k, shape) in enumerate(recorded(size, version).items())}
    points = values[hf.HF_POINTS] + torch.arange(4.0)[:, None] / 4
    return values | {hf.HF_POINTS: points} | dict.fromkeys(hf.HF_FOURIER, torch.randn(2, 128))


def small(state_dict: dict) -> dict[str, torch.Tensor]:
    """The tensors below 10,000 values, each in memory of its own."""
    return {key: x.clone(memory_format=torch.contiguous_format) for key, x in state_dict.items() if x.numel() < 10_000}


def same(a: dict, b: dict) -> bool:
    """Whether two state dicts are equal bit for bit, dtypes included."""
    equal = lambda x, y: x is y or (x.dtype == y.dtype and torch.equal(x, y))
    return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)


@every_model
def test_from_hf_and_to_hf_are_inverse(size, version):
    theirs = checkpoint(size, version)
    ours = hf.from_hf(theirs)
    assert len(ours) == len(theirs) + 2  # three more point embeddings, one Fourier matrix less
    assert same(hf.to_hf(ours), theirs)
    assert same(hf.from_hf(hf.to_hf(ours)), ours)


def test_dtypes_are_kept():
    ours = {key: x.to(torch.bfloat16) for key, x in hf.from_hf(small(checkpoint("tiny", "2.1"))).items()}
    assert same(hf.from_hf(hf.to_hf(ours)), ours)


@every_model
def test_is_hf_is_true_for_hugging_face_names_only(size, version):
    theirs = checkpoint(size, version)
    ours = hf.from_hf(theirs)
    shared = theirs.keys() & ours.keys()
    assert not hf.is_hf(ours)
    assert all(hf.is_hf([key]) for key in theirs.keys() - shared)


def test_every_row_names_a_tensor_and_every_tensor_has_at_most_one_row():
    theirs = recorded("large", "2.1")
    hits = [[row for row, (pattern, _) in enumerate(hf._FROM_HF) if pattern.fullmatch(key)] for key in theirs]
    assert max(map(len, hits)) == 1
    assert {row for found in hits for row in found} == set(range(len(hf._FROM_HF)))


@pytest.mark.parametrize("size", RECORDED["vision_encoder"])
def test_original_names_and_shapes_are_those_of_the_released_checkpoints(size, shared):
    schema = json.loads((shared / "data" / "sam2.1_schema" / f"sam2.1_hiera_{size.replace('-', '_')}.json").read_text())
    ours = hf.from_hf(checkpoint(size, "2.1"))
    assert {k: list(x.shape) for k, x in ours.items()} == {k: entry["shape"] for k, entry in schema.items()}


@pytest.mark.parametrize("absent", hf.HF_FOURIER)
def test_the_fourier_matrix_may_have_one_name_only(absent):
    theirs = checkpoint("tiny", "2.1")
    once = {key: x for key, x in theirs.items() if key != absent}
    assert same(hf.from_hf(once), hf.from_hf(theirs))


@pytest.mark.parametrize("change", [lambda x: x + 1, torch.Tensor.double])
def test_two_different_fourier_matrices_are_an_error(change):
    theirs = checkpoint("tiny", "2.1")
    with pytest.raises(ValueError, match="SAM 2 has one matrix for both"):
        hf.from_hf(theirs | {hf.HF_FOURIER[1]: change(theirs[hf.HF_FOURIER[1]])})


def test_a_mix_of_both_styles_is_an_error():
    ours = hf.from_hf(checkpoint("tiny", "2.1"))
    for mixed in ("no_memory_embedding", hf.HF_POINTS):
        with pytest.raises(ValueError, match=f"both the original and the Hugging Face name .* {mixed}"):
            hf.to_hf(ours | {mixed: torch.zeros(1)})


def test_unknown_tensors_keep_their_names():
    strange = {"image_encoder.trunk.blocks.0.norm9.weight", "vision_encoder.backbone.norm.bias", "ema"}
    lonely = hf.POINT.format(2)  # without the ones before it there is no [4, C] to put it in
    assert hf.to_hf(dict.fromkeys(strange | {lonely}, torch.ones(1, 4))).keys() == strange | {lonely}
    assert hf.from_hf(dict.fromkeys(strange, torch.ones(1, 4))).keys() == strange
    assert hf.from_hf({hf.HF_POINTS: torch.ones(5, 4)}).keys() == {hf.POINT.format(i) for i in range(5)}


def test_the_result_of_to_hf_can_be_saved_as_safetensors(tmp_path):
    theirs = small(checkpoint("tiny", "2.1"))
    save_file(hf.to_hf(hf.from_hf(theirs)), tmp_path / "model.safetensors")
    assert same(load_file(tmp_path / "model.safetensors"), theirs)


def build_hf(size: str, version: str, image_size: int = 1024) -> torch.nn.Module:
    """Hugging Face's model of a size."""
    define_torchvision_operators()
    transformers = pytest.importorskip("transformers", minversion="5.0")
    backbone = transformers.Sam2HieraDetConfig(image_size=[image_size] * 2, **BACKBONES[size])
    config = transformers.Sam2VideoConfig(
        image_size=image_size,
        vision_config=transformers.Sam2VisionConfig(
            backbone_config=backbone,
            backbone_channel_list=backbone.embed_dim_per_stage[::-1],
            backbone_feature_sizes=[[image_size // stride] * 2 for stride in (4, 8, 16)],
        ),
        prompt_encoder_config=transformers.Sam2VideoPromptEncoderConfig(image_size=image_size),
        memory_attention_rope_feat_sizes=[image_size // 16] * 2,
        enable_temporal_pos_encoding_for_object_pointers=version == "2.1",
        enable_occlusion_spatial_embedding=version == "2.1",
    )
    return transformers.Sam2VideoModel(config).eval()


@pytest.mark.parametrize(
    ("size", "version"),
    [
        pytest.param(*one, marks=() if one in (("tiny", "2.0"), ("small", "2.1")) else pytest.mark.slow)
        for one in MODELS
    ],
)
def test_recorded_names_and_shapes_are_those_of_the_installed_transformers(size, version):
    with torch.device("meta"):
        model = build_hf(size, version)
    assert {key: tuple(x.shape) for key, x in model.state_dict().items()} == recorded(size, version)


@pytest.fixture(scope="module", params=["2.0", "2.1"])
def pair(request):
    """The original tiny model at 256 pixels, with noise on every weight, and Hugging Face's with the same weights."""
    theirs = build_hf("tiny", request.param, 256)
    ours = twin("tiny", request.param, 256).torch
    theirs.load_state_dict(hf.to_hf(ours.state_dict()), strict=True)
    return ours, theirs


@pytest.fixture(scope="module")
def features(pair):
    """The original's three feature maps [1, C, H, W] of an image, as the mask decoder takes them; and the image."""
    ours, _ = pair
    image = torch.randn(1, 3, 256, 256, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        fine, middle, coarse = ours.forward_image(image)["backbone_fpn"]
        return [fine, middle, coarse + ours.no_mem_embed.reshape(1, -1, 1, 1)], image


def assert_close(got, expected):
    """The operations are the same in another order: measured 5e-6, while two swapped tensors would exceed 1e-4."""
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_image_features_are_the_originals(pair, features):
    maps, image = features
    for got, expected in zip(pair[1].get_image_embeddings(image), maps, strict=True):
        assert_close(got, expected)


@torch.no_grad()
@pytest.mark.parametrize("mask", [None, torch.linspace(-9, 9, 64 * 64).reshape(1, 1, 64, 64)], ids=["click", "mask"])
def test_masks_are_the_originals(pair, features, mask):
    ours, theirs = pair
    (*fine, coarse), _ = features
    point, label = torch.tensor([[[90.0, 120.0], [30.0, 200.0]]]), torch.tensor([[1, 0]])
    expected = ours.sam_mask_decoder(
        coarse,
        ours.sam_prompt_encoder.get_dense_pe(),
        *ours.sam_prompt_encoder((point, label), None, mask),
        multimask_output=True,
        repeat_image=False,
        high_res_features=fine,
    )
    got = theirs.mask_decoder(
        coarse,
        theirs.get_image_wide_positional_embeddings(),
        *theirs.get_prompt_embeddings(point[None], label[None], input_masks=mask),
        multimask_output=True,
        high_resolution_features=fine,
    )
    for x, y in zip(got, expected, strict=True):  # masks, predicted IoU, tokens, object score
        assert_close(x.reshape(y.shape), y)


@torch.no_grad()
def test_memory_is_the_originals(pair, features):
    ours, theirs = pair
    top = features[0][-1]
    mask = torch.randn(1, 1, 256, 256)
    expected = ours.memory_encoder(top, mask, skip_mask_sigmoid=True)["vision_features"]
    assert_close(theirs.memory_encoder(top, mask)[0], expected)

    frame = top.flatten(2).permute(2, 0, 1)  # [H W, 1, C]
    memory = torch.cat([expected.flatten(2).permute(2, 0, 1), torch.randn(4, 1, 64)])  # one frame, one object pointer
    position = torch.randn_like(memory)
    got = theirs.memory_attention(frame, memory, frame, position, num_object_pointer_tokens=4)
    assert_close(got.reshape(frame.shape), ours.memory_attention(frame, memory, frame, position, 4))


@torch.no_grad()
def test_object_pointers_are_the_originals(pair):
    ours, theirs = pair
    tokens = torch.randn(3, 256)
    assert_close(theirs.object_pointer_proj(tokens), ours.obj_ptr_proj(tokens))
    assert_close(theirs.temporal_positional_encoding_projection_layer(tokens), ours.obj_ptr_tpos_proj(tokens))
