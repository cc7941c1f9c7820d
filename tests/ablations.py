"""Ablation scores the plain way: two passes for each rank."""

import small
import torch
from torch.nn import functional as F

from lowrank_cli.scoring.probe import IGNORED


def dev_batch(family, rows=5):
    """Right-padded rows of several lengths; a causal model answers with its last tokens."""
    generator = torch.Generator().manual_seed(11)
    lengths = [12, 5, 9, 11, 5][:rows]
    ids = torch.zeros(rows, max(lengths), dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.randint(3, small.VOCABULARY, (length,), generator=generator)
        mask[row, :length] = 1
        labels[row, length - 1 - row % 3 : length] = ids[row, length - 1 - row % 3 : length]
    if family in ("bert", "roberta", "llama_classifier"):
        labels = torch.arange(rows) % 3
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@torch.no_grad()
def plain(adapter, batch):
    """S of the whole batch, as the adapter's gates stand."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    logits, labels = adapter.model(**inputs).logits, batch["labels"]
    if labels.dim() == 1:
        return -F.cross_entropy(logits, labels).item()
    return -F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED).item()


def naive(adapter, batch, units):
    """S(M∖i) and S(M_i), one unit and one pass after the other."""

    def gates(value):
        for part in adapter.modules.values():
            part.rank_gate = torch.full((part.rank,), value)

    without, alone = {}, {}
    for found, others in ((without, 1.0), (alone, 0.0)):
        for key, rank in units:
            gates(others)
            adapter.modules[key].rank_gate[slice(None) if rank is None else rank] = 1.0 - others
            found[key, rank] = plain(adapter, batch)
    gates(0.0)
    bare = plain(adapter, batch)
    for part in adapter.modules.values():
        part.rank_gate = None
    return plain(adapter, batch), bare, without, alone
