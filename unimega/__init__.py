"""unimega: 3D-parallel training of unified multimodal transformers on megatron-core."""

__version__ = "0.1.0"
