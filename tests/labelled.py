"""Samples whose answers have labels, arranged in batches, and what a model learns from them."""

import torch
import torch.nn.functional as F


def sample(parts):
    flags = [i % 2 == 1 for i, n in enumerate(parts) for _ in range(n)]
    ids = torch.randint(3, 99, (len(flags),))
    return ids, torch.where(torch.tensor(flags), ids, -100)


def padded(samples, side="right"):
    longest = max(len(ids) for ids, _ in samples)
    rows = {"input_ids": [], "attention_mask": [], "labels": []}
    for ids, labels in samples:
        free = longest - len(ids)
        gap = (0, free) if side == "right" else (free, 0)
        rows["input_ids"].append(F.pad(ids, gap))
        rows["attention_mask"].append(F.pad(torch.ones_like(ids), gap))
        rows["labels"].append(F.pad(labels, gap, value=-100))
    return {name: torch.stack(tensors) for name, tensors in rows.items()}


def packed(samples):
    positions = torch.cat([torch.arange(len(ids)) for ids, _ in samples])[None]
    ids, labels = (torch.cat(parts)[None] for parts in zip(*samples, strict=True))
    return {"input_ids": ids, "labels": labels, "position_ids": positions}


ARRANGED = {
    "right padded": padded,
    "left padded": lambda samples: padded(samples, "left"),
    "packed": packed,
}


def loss_of(model, batch, **told):
    """Sum over answer tokens, so that it is the same however samples are arranged."""
    given = {k: v for k, v in batch.items() if k != "labels"}
    out = model(**given, labels=batch["labels"], **told)
    return F.cross_entropy(out.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum"), out


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}
