"""Pretrain the bundled model: its tokenizer and a small Llama, on text that this repository generates.

    python scripts/bundled_model/pretrain_tiny.py --out lowrank_cli/assets/tiny_llama --work DIR --stage main \
        --steps 3600

The stage ``main`` starts anew, ``bridge`` starts from the weights that ``main`` left in ``--work``. The documents of a
block of steps are a function of the seed and the block alone, so a run continued with ``--resume`` sees the same
text. Every ``--probe-steps`` the accuracy on ``tiny_*`` tasks with 0 and 8 demonstrations is printed and a checkpoint
is written to ``--work``. docs/results/bundled_model.md names the commands that made the bundled files.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from pretrain_text import bridge, document

from lowrank_cli.tasks.tiny import generate
from lowrank_cli.tasks.tiny.families import FAMILIES
from lowrank_cli.tasks.tiny.lexicon import Lexicon, vocabulary

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
VOCABULARY = 1536  #: tokens
TOKENS = 4096  #: tokens of one step
CURRICULUM = 900  #: steps of ``main`` in which progress goes from 0 to 1, counted in whole ``Stage.block``s


@dataclass(frozen=True)
class Stage:
    """How one stage makes its batches and its steps."""

    text: Callable  #: (rng, lexicon, progress) -> document
    longest: int  #: tokens of a document; longer ones lose their end
    block: int  #: steps whose documents are made at once; a few more where batches come out smaller
    end_weight: float  #: weight of the end token in the loss
    slack: float  #: a batch may have this many times TOKENS
    learning_rate: float  #: peak
    warmup: int  #: steps
    floor: float  #: share of the peak at the end of the cosine
    weight_decay: float  #: of the matrices

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of a step."""
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))
        return self.learning_rate * min(1.0, (step + 1) / self.warmup) * (self.floor + (1 - self.floor) * cosine)


STAGES = {
    "main": Stage(document, 512, 32, 1.0, 1.02, 3e-3, 150, 0.02, 0.1),
    "bridge": Stage(bridge, 384, 8, 0.1, 1.0, 2e-3, 50, 0.03, 0.05),
}


#: label words of the probe: those of conf/task/tiny_*.yaml
PROBES = {
    "sentiment": ("negative", "positive"),
    "yesno": ("negative", "positive"),
    "entailment": ("entailment", "neutral", "contradiction"),
    "topic": ("food", "work", "climate", "leisure"),
}


def build_tokenizer(folder: Path, seed: int):
    """Byte-level BPE in which every word of the lexicon is one token after a space.

    Digits stand alone, and a capitalised word is cut after its second letter, so that a name is two tokens.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    rng = Random(f"tokenizer {seed}")
    lexicon = Lexicon(rng, "pretrain", 0.0)
    texts = ["".join(text for text, _ in document(rng, lexicon, 1.0)) for _ in range(12000)]
    texts += [" " + " ".join(vocabulary())] * 2000
    tokenizer = Tokenizer(models.BPE())
    words = Regex(r" ?[0-9]| ?[A-Z][a-z]?| ?[a-z]+| ?[^\sA-Za-z0-9]+|\s")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, bos)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(folder)
    return fast


def build_model(tokenizer, seed: int):
    """A Llama with grouped-query attention and tied embeddings, freshly initialised."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=320,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:  # the residual stream starts as little more than the embeddings
            for weight in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
                weight *= 0.1
                weight[0] = 0  # the constant dimension of start_copying
    start_copying(model, 0, sharpness=8, gain=0.1)
    start_copying(model, 3, sharpness=50, gain=0.3)
    return model


def start_copying(model, layer: int, sharpness: float, gain: float) -> None:
    """Start two layers as an induction circuit: what followed something like this before, follows now.

    Finding such a circuit takes a small model thousands of steps; everything stays trainable. The first heads of
    ``layer`` read the token one back and two back: a constant first dimension of every embedding feeds queries and
    keys, and rotary angles ``θ`` make the score of a key at distance ``Δ`` proportional to
    ``sharpness · Σ cos(θ (Δ - back))``. What they read is written as ``gain · out · look · x``. In the next layer two
    heads compare ``look · x`` of a token with what stands there of each earlier token's predecessor, in the slow
    rotary dimensions, and copy the token they find.
    """
    import torch

    config, width = model.config, model.config.head_dim
    first, second = (model.model.layers[i].self_attn for i in (layer, layer + 1))
    groups = config.num_attention_heads // config.num_key_value_heads
    half, fast = width // 2, width // 4
    angles = model.model.rotary_emb.inv_freq[:fast]
    slow = [i for i in range(width) if i % half >= 6]  # angles below 0.01 where rope_theta is 500000

    def orthonormal(columns: int) -> torch.Tensor:
        basis = torch.linalg.qr(torch.randn(config.hidden_size - 1, columns)).Q
        return torch.cat([torch.zeros(1, columns), basis])  # (D, columns), blind to the constant dimension

    with torch.no_grad():
        embedding = model.model.embed_tokens.weight
        embedding[:, 0] = 0.5
        scale = (sharpness * width**0.5) ** 0.5 * embedding.square().mean().sqrt() / 0.5
        look, out = orthonormal(width), orthonormal(width)
        first.k_proj.weight[:width] = 0
        first.k_proj.weight[:fast, 0] = scale
        first.v_proj.weight[:width] = look.T
        first.o_proj.weight[:, :width] = gain * out
        for head in range(groups):
            query = first.q_proj.weight[head * width : (head + 1) * width]
            query[:] = 0
            query[:fast, 0] = scale * torch.cos((head + 1) * angles)
            query[half : half + fast, 0] = -scale * torch.sin((head + 1) * angles)
        copied = orthonormal(2 * width)
        for group in range(2):
            part = slice(group * (width - len(slow)), group * (width - len(slow)) + len(slow))
            keys = slice(group * width, (group + 1) * width)
            queries = slice(group * groups * width, (group * groups + 1) * width)
            for weight, rows, source in (
                (second.k_proj.weight, keys, out),
                (second.q_proj.weight, queries, look),
            ):
                block = torch.zeros(width, config.hidden_size)
                block[slow] = 1.8 * source[:, part].T
                weight[rows] = block
            second.v_proj.weight[keys] = copied[:, keys].T
            second.o_proj.weight[:, queries] = 3 * gain * copied[:, keys]


_TOKENIZER = None


def _start_worker(folder: str) -> None:
    global _TOKENIZER
    from tokenizers import Tokenizer

    _TOKENIZER = Tokenizer.from_file(f"{folder}/tokenizer.json")


def make_batches(name: str, seed: int, start: int, progress: float) -> list[tuple[list, list]]:
    """One block of batches: lists of (B, T) ids and loss weights, rows of like length.

    ``start`` names the block: its number in ``main``, its first step in ``bridge``.
    """
    stage = STAGES[name]
    rng = Random(f"{name} {seed} {start}")
    lexicon = Lexicon(rng, "pretrain", 0.0)
    bos, eos = _TOKENIZER.token_to_id(BOS), _TOKENIZER.token_to_id(EOS)
    documents, total = [], 0
    while total < TOKENS * stage.block:
        ids, weights = [bos], [0.0]
        for text, weight in stage.text(rng, lexicon, progress):
            piece = _TOKENIZER.encode(text, add_special_tokens=False).ids
            ids += piece
            weights += [weight] * len(piece)
        ids, weights = (ids + [eos])[: stage.longest], (weights + [stage.end_weight])[: stage.longest]
        documents.append((ids, weights))
        total += len(ids)
    documents.sort(key=lambda pair: len(pair[0]))
    batches: list[list] = [[]]
    for pair in documents:
        if batches[-1] and (len(batches[-1]) + 1) * len(pair[0]) > TOKENS * stage.slack:
            batches.append([])
        batches[-1].append(pair)
    rng.shuffle(batches)
    padded = []
    for batch in batches:
        width = max(len(ids) for ids, _ in batch)
        padded.append(
            (
                [ids + [0] * (width - len(ids)) for ids, _ in batch],
                [weights + [0.0] * (width - len(weights)) for _, weights in batch],
            )
        )
    return padded


def weighted_loss(model, ids, weights):
    """Weighted mean of the next-token cross-entropy; also the plain mean over the answers."""
    from torch.nn import functional

    logits = model(input_ids=ids[:, :-1]).logits  # (B, T-1, V)
    losses = functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    weights = weights[:, 1:].flatten()  # (B * (T-1),)
    answers = (weights == 1).float()
    return (losses * weights).sum() / weights.sum(), ((losses * answers).sum() / answers.sum()).detach()


def probe(model, tokenizer, count: int = 120, shots: tuple[int, ...] = (0, 8), seed: int = 0) -> dict[str, float]:
    """Accuracy on dev rows of the label tasks, each with its own draw of balanced demonstrations."""
    import torch

    model.eval()
    found = {}
    for name, words in PROBES.items():
        data = generate(f"tiny_{name}", seed=0)
        template = FAMILIES[name].templates[0]
        candidates = torch.tensor([tokenizer.encode(f" {word}", add_special_tokens=False)[0] for word in words])
        for number in shots:
            rng = Random(seed)
            rows, golds = [], []
            for row in data["dev"][:count]:
                parts = [
                    template.format(**shot) + f" {words[shot['label']]}" for shot in rng.sample(data["train"], number)
                ]
                rows.append(tokenizer.encode("\n\n".join([*parts, template.format(**row)])))
                golds.append(row["label"])
            hits = 0
            for start in range(0, len(rows), 25):
                part = rows[start : start + 25]
                width = max(map(len, part))
                ids = torch.tensor([ids + [0] * (width - len(ids)) for ids in part])
                with torch.no_grad():
                    hidden = model.model(input_ids=ids).last_hidden_state
                    last = hidden[torch.arange(len(part)), torch.tensor([len(ids) - 1 for ids in part])]
                    scores = model.lm_head(last)[:, candidates]  # (B, labels)
                hits += (scores.argmax(-1) == torch.tensor(golds[start : start + 25])).sum().item()
            found[f"{name}/{number}"] = round(hits / len(rows), 3)
    model.train()
    return found


def save(model, folder: Path) -> None:
    """Write the model's files beside the tokenizer's, each replaced as a whole."""
    folder.mkdir(parents=True, exist_ok=True)
    part = folder.parent / f".{folder.name}.part"
    model.save_pretrained(part)
    for file in part.iterdir():
        os.replace(file, folder / file.name)
    part.rmdir()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished model and tokenizer")
    parser.add_argument("--work", type=Path, required=True, help="folder of checkpoints and the log")
    parser.add_argument("--stage", choices=tuple(STAGES), required=True)
    parser.add_argument("--steps", type=int, required=True, help="length of the cosine schedule")
    parser.add_argument("--stop", type=int, help="end at this step, to be continued by --resume")
    parser.add_argument("--resume", action="store_true", help="continue the stage from its checkpoint in --work")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--probe-steps", type=int, default=256, help="steps between probes")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    import torch
    from transformers import AutoTokenizer

    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    stage, state_file = STAGES[args.stage], args.work / f"{args.stage}.pt"
    if args.stage == "main" and not args.resume:
        args.out.mkdir(parents=True, exist_ok=True)
        tokenizer = build_tokenizer(args.out, args.seed)
    else:
        tokenizer = AutoTokenizer.from_pretrained(args.out)
    model = build_model(tokenizer, args.seed)
    print(f"parameters {sum(p.numel() for p in model.parameters()):,}, vocabulary {len(tokenizer)}", flush=True)
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if not any(p is m for m in matrices)]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": stage.weight_decay}, {"params": others, "weight_decay": 0.0}],
        betas=(0.9, 0.98),
    )
    step = block = 0
    if args.resume:
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, block = state["step"], state["block"]
    elif args.stage == "bridge":
        model.load_state_dict(torch.load(args.work / "main.pt", weights_only=True)["model"])

    def submit(step: int, block: int):
        if args.stage == "main":
            return pool.submit(make_batches, "main", args.seed, block, block * stage.block / CURRICULUM)
        return pool.submit(make_batches, "bridge", args.seed, step, 2 * step / args.steps)

    last = args.stop or args.steps
    log = (args.work / "log.jsonl").open("a")
    began, probed = time.monotonic(), step
    model.train()
    with ProcessPoolExecutor(1, initializer=_start_worker, initargs=(str(args.out),)) as pool:
        waiting = submit(step, block)
        while step < last:
            batches, block = waiting.result(), block + 1
            waiting = submit(step + len(batches), block)
            for ids, weights in batches[: last - step]:
                for group in optimizer.param_groups:
                    group["lr"] = stage.rate(step, args.steps)
                loss, answers = weighted_loss(model, torch.tensor(ids), torch.tensor(weights))
                loss.backward()
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                step += 1
                if step % 20 == 0:
                    row = {
                        "stage": args.stage,
                        "step": step,
                        "loss": round(loss.item(), 4),
                        "answers": round(answers.item(), 4),
                        "norm": round(norm.item(), 2),
                        "seconds": round(time.monotonic() - began),
                    }
                    print(json.dumps(row), file=log, flush=True)
            if step >= probed + args.probe_steps or step >= last:
                probed = step
                row = {"step": step, "seconds": round(time.monotonic() - began), "loss": round(loss.item(), 3)}
                print(json.dumps(row | probe(model, tokenizer)), flush=True)
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "block": block}
                torch.save(state, args.work / "state.part")
                os.replace(args.work / "state.part", state_file)
    save(model, args.out)


if __name__ == "__main__":
    main()
