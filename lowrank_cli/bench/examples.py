"""The batch of examples on which a benchmark measures everything."""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank_cli import tasks
from lowrank_cli.adapter.lm_head import IGNORED
from lowrank_cli.bench.base_model import BaseModel
from lowrank_cli.errors import UserError
from lowrank_cli.schema import BenchRun, TrainBench
from lowrank_cli.tasks import encode
from lowrank_cli.tasks.batches import Batches
from lowrank_cli.tasks.chat import chat_of

Batch = dict[str, Tensor]


def batch_of(config: BenchRun, base: BaseModel) -> Batch:
    """``bench.batch_size`` examples of the task, or as many rows of random tokens, on the model's device.

    Of the batches in the first epoch of ``lrk train``, it is the one whose longest example is nearest to
    ``bench.prompt_length`` tokens, answer included. In random rows all tokens but the first are answers.

    Raises:
        UserError: data missing or malformed, or fewer training examples than a batch has.
    """
    bench, task = config.bench, config.task
    assert isinstance(bench, TrainBench)
    if task is None:
        ids = torch.randint(base.vocabulary, (bench.batch_size, bench.prompt_length))  # (B, T)
        ids = ids.to(base.device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    tokenizer = base.tokenizer
    assert tokenizer is not None, "BenchRun.validate asks for a model that has one"
    examples = tasks.load(task).train
    if len(examples) < bench.batch_size:
        raise UserError(f"bench.batch_size: {bench.batch_size}, but task={task.name} has {len(examples)} examples")
    if chat := chat_of(tokenizer, task):
        encoded = [chat.encode(example, task.max_length, task.lenient) for example in examples]
    else:
        encoded = encode.encode_all(tokenizer, examples, task.max_length, task.lenient)
    lengths = [len(row.input_ids) for row in encoded]
    batches = Batches(lengths, bench.batch_size, config.seed)
    whole = [batches[step] for step in range(len(batches)) if len(batches[step]) == bench.batch_size]
    chosen = min(whole, key=lambda rows: abs(max(lengths[row] for row in rows) - bench.prompt_length))
    batch = encode.collate_causal([encoded[row] for row in chosen], tokenizer.pad_token_id)
    return {key: value.to(base.device) for key, value in batch.items()}


def described(batch: Batch, config: BenchRun) -> str:
    """``batch`` in words: its shape, where it is from, and how many tokens are answers."""
    rows, length = batch["input_ids"].shape
    answered = int((batch["labels"][:, 1:] != IGNORED).sum())
    source = config.task.name if config.task else "random"
    return f"{rows} × {length} tokens ({source}, {answered} answered)"
