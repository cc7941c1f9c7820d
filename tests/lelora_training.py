"""LeLoRA on small models, trained through a few choices."""

import small
import torch
from torch.nn import functional as F

from lowrank_cli.methods.protocol import AfterStep, BeforeStep, Step

FAMILIES = ["llama", "gpt2", "bert"]


#: Short phases and few places, so that a few steps see several choices.
SETTINGS = {"alpha": 8, "phase": 2, "explore": 0.6, "places": 4, "width_limit": 3, "refresh": 0.01}


def train(method, adapter, steps, total, first=1, lr=0.01, optimizer=None):
    """Optimizer steps on random inputs with the method acting between them; returns the logged rows."""
    model, rows = adapter.model, []

    def loss(seed):
        ids = torch.randint(3, small.VOCABULARY, (4, 8), generator=torch.Generator().manual_seed(seed))
        logits = model(input_ids=ids).logits
        return F.cross_entropy(
            logits.flatten(0, -2), ids.flatten()[: logits.flatten(0, -2).shape[0]] % logits.shape[-1]
        )

    optimizer = optimizer or torch.optim.AdamW(list(adapter.trained.values()), lr=lr, fused=True)
    for number in range(first, first + steps):
        loss(number % 3).backward()
        step = Step(
            number,
            total,
            adapter,
            lr,
            lambda at=number: loss(at),
            lambda tensor: tensor,
            optimizer=optimizer,
            log=lambda row, at=number: rows.append({"step": at} | row),
        )
        if isinstance(method, BeforeStep):
            method.before_step(step)
        optimizer.step()
        model.zero_grad()
        if isinstance(method, AfterStep):
            method.after_step(step)
    return rows, optimizer


def lelora(family="llama", **settings):
    """A method and its adapter."""
    torch.manual_seed(3)
    method = small.method("lelora", **SETTINGS | settings)
    return method, method.adapt(small.model(family))


def moved(family="llama", **settings):
    """Trained through two choices of windows."""
    method, adapter = lelora(family, **settings)
    train(method, adapter, 4, 20)
    return method, adapter


def logits(adapter):
    adapter.model.eval()
    with torch.no_grad():
        return adapter.model(input_ids=small.ids()).logits
