"""A model whose ranks share each row of packed documents, against the same model on one rank.

    torchrun --nproc-per-node 2 examples/context_parallel.py

Two layers of ring attention and a gated delta net between them, over four documents of Shakespeare.
The balancer deals the documents' tokens so that ranks have equal work; loss and gradients are the
unsharded model's. Any number of ranks; a few seconds on a CPU.
"""

from __future__ import annotations

import copy

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from olmo_core.data import VOCAB_SIZE, PackedDocuments, load_documents
from olmo_core.nn.attention import AttentionConfig, GatedDeltaNetConfig, RingContextParallelStyle
from olmo_core.nn.attention import RingAttentionLoadBalancerType as LoadBalancer
from olmo_core.nn.rope import RoPEConfig
from olmo_core.nn.transformer import Transformer, TransformerBlockConfig, TransformerConfig


def build() -> Transformer:
    attention = AttentionConfig(n_heads=4, n_kv_heads=2, bias=False, rope=RoPEConfig())
    delta_net = GatedDeltaNetConfig(n_heads=2, head_dim=16)
    blocks = [TransformerBlockConfig(sequence_mixer=m) for m in (attention, delta_net)]
    model = TransformerConfig(64, VOCAB_SIZE, 3, blocks=blocks, pattern=[0, 1, 0]).build()
    model.init_weights(seed=0)  # the same on every rank
    return model


def main() -> None:
    data = PackedDocuments(load_documents(), batch_size=1, sequence_length=1024, max_doc_len=256)
    batch, whole = data.batch(0), build()
    sharded = copy.deepcopy(whole)
    counted = (batch.labels != -100).sum()

    loss = whole(batch.input_ids, labels=batch.labels, **batch.doc_lens._asdict())
    loss.backward()

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    sharded.apply_cp(mesh, ring=RingContextParallelStyle(LoadBalancer.balanced))
    (ids, labels), lengths = LoadBalancer.balanced.build(mesh).batch_shard_by_document(
        inputs=[batch.input_ids, batch.labels],
        seq_dims=[1, 1],
        cu_doc_lens=batch.doc_lens.cu_doc_lens,
        pad_values=[0, -100],
    )
    part = sharded(ids, labels=labels, loss_reduction="sum", **lengths) / counted
    part.backward()

    total, differences = part.detach().clone(), []
    dist.all_reduce(total)  # each rank has the loss, and gradients, of its own rows
    for mine, theirs in zip(sharded.parameters(), whole.parameters(), strict=True):
        assert mine.grad is not None and theirs.grad is not None
        dist.all_reduce(mine.grad)
        differences.append(((mine.grad - theirs.grad).norm() / theirs.grad.norm()).item())
    if dist.get_rank() == 0:
        print(f"{ids.shape[1]} of {batch.input_ids.shape[1]} tokens on rank 0")
        print(f"loss of one rank {loss.item():.6f}, of {dist.get_world_size()} {total.item():.6f}")
        print(f"gradients differ by {max(differences):.0e} of their norm at most")


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    dist.destroy_process_group()
