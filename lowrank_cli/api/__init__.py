"""The public API: adapt a loaded model, train it in any loop, save, load, merge, and mix adapters in a batch.

    import lowrank_cli as lrk

    adapter = lrk.adapt(model, "milora", rank=8, target_modules=["Q", "V"], k=1)
    optimizer = torch.optim.AdamW(adapter.parameter_groups(1e-3))
    with adapter.training(optimizer, steps=len(batches), train=batches, dev=dev_batches):
        for batch in batches:
            model(**batch).loss.backward()
            optimizer.step()
    adapter.save("folder")

Everything else in this package may change without notice.
"""

from lowrank_cli.api.adapted import Adapter, adapt, load
from lowrank_cli.api.bank import Bank
from lowrank_cli.errors import LrkError, UserError, WorkFailed

__all__ = ["Adapter", "Bank", "LrkError", "UserError", "WorkFailed", "adapt", "load"]
