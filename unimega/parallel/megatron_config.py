"""The one function that maps our configuration to megatron-core's."""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from unimega.config.model import ModelSpec
from unimega.config.schema import ParallelConfig


def transformer_config(
    spec: ModelSpec, parallel: ParallelConfig, *, dtype: torch.dtype, frees_sent_outputs: bool
) -> TransformerConfig:
    """What megatron-core's schedules, DDP and gradient finalisation read; none of its layers is used.

    The settings that are silently wrong when chosen otherwise are constants here (docs/parallelism.md has the list):
    ``qk_layernorm`` (all it does is have q/k norm gradients summed over tp); P2P overlapped exactly when interleaved,
    because batched sends and receives of the interleaved schedule pair up crosswise between two ranks.

    Args:
        dtype: of activations and parameters.
        frees_sent_outputs: the collective library keeps the storage of a tensor alive until it is sent (nccl). With
            gloo, freeing stage outputs under the interleaved schedule gives wrong gradients in most runs.
    """
    interleaved = parallel.vpp > 1
    return TransformerConfig(
        num_layers=len(spec.layers),
        hidden_size=spec.width,
        num_attention_heads=spec.heads,
        num_query_groups=spec.kv_heads,
        kv_channels=spec.head_width,
        ffn_hidden_size=4 * spec.width,
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vpp if interleaved else None,
        context_parallel_size=parallel.cp,
        sequence_parallel=parallel.sequence_parallel and parallel.tp > 1,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        gradient_accumulation_fusion=False,
        use_cpu_initialization=True,
        perform_initialization=False,
        calculate_per_token_loss=True,
        qk_layernorm=True,
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        batch_p2p_sync=False,  # waits for the device after every send; a workaround for torch before 2.0
        deallocate_pipeline_outputs=parallel.pp > 1 and (frees_sent_outputs or not interleaved),
    )
