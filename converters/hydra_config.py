"""The configuration with which the original code builds a model, by Hydra's names; it needs no torch."""

from sam2jq.models.variants import VARIANTS, variant_name

CONFIGS = {"tiny": "t", "small": "s", "base-plus": "b+", "large": "l", "nano": "t"}
NANO = (
    "++model.image_encoder.trunk.embed_dim=32",
    "++model.image_encoder.trunk.stages=[1,2,3,1]",
    "++model.image_encoder.trunk.global_att_blocks=[4]",
    "++model.image_encoder.trunk.window_spec=[8,4,8,4]",
    "++model.image_encoder.neck.d_model=64",
    "++model.image_encoder.neck.position_encoding.num_pos_feats=64",
    "++model.image_encoder.neck.backbone_channel_list=[256,128,64,32]",
    "++model.memory_attention.d_model=64",
    "++model.memory_attention.num_layers=2",
    "++model.memory_attention.layer.d_model=64",
    "++model.memory_attention.layer.dim_feedforward=256",
    "++model.memory_attention.layer.self_attention.embedding_dim=64",
    "++model.memory_attention.layer.cross_attention.embedding_dim=64",
    "++model.memory_attention.layer.cross_attention.kv_in_dim=16",
    "++model.memory_encoder.out_dim=16",
    "++model.memory_encoder.in_dim=64",
    "++model.memory_encoder.position_encoding.num_pos_feats=16",
    "++model.memory_encoder.fuser.layer.dim=64",
    "++model.memory_encoder.mask_downsampler.embed_dim=64",
)


def hydra_config(name: str, version: str = "2.1", image_size: int | None = None) -> tuple[str, list[str]]:
    """(config file, `hydra_overrides_extra`) with which build_sam2 builds the model called `name`."""
    name = variant_name(name)
    overrides = list(NANO) if name == "nano" else []
    size = image_size or VARIANTS[name].image_size
    if size != 1024:
        overrides.append(f"++model.image_size={size}")
    family = {"2.0": "sam2", "2.1": "sam2.1"}[version]
    return f"configs/{family}/{family}_hiera_{CONFIGS[name]}.yaml", overrides
