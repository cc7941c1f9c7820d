"""The cost model of docs/explanation/cost.md: what a method costs at a given model size, from shapes alone.

    python scripts/research/cost_model.py                   # print the tables
    python scripts/research/cost_model.py --write           # and put them into the page

FLOPs and bytes are formulas, of matrix products only (a multiplication and an addition are two FLOPs); ``tests``
compare them with what torch counts in the real passes. The memory of a training step is that of ``lrk check --memory``.
The page's comparison with measurements is read from docs/results/cost_check.json (``cost_check.py``).
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lowrank_cli.config.composition import compose
from lowrank_cli.schema.model import SHAPES
from lowrank_cli.session.ledger import counting
from lowrank_cli.session.memory import USABLE, Length, Memory, TrainingStep

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "explanation" / "cost.md"
CHECKED = ROOT / "docs" / "results" / "cost_check.json"

SIZES = ("7b", "70b")
RANK = 16
TOKENS = 512  #: of a training row, each of them an answer
CONTEXT = 1024  #: tokens in the KV cache of a row that decodes
H200 = 141e9  #: bytes of memory, NVIDIA's data sheet
BF16, FP32 = 2, 4  #: bytes of a number
#: bytes of a weight in NF4 with double quantisation (arXiv 2305.14314, section 3): 4 bits, an 8-bit constant for 64
#: weights, and an fp32 constant for 256 of those
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
KEPT = ("V", "D")  #: roles of FanLoRA's selection


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama model, in the order of :data:`SHAPES`."""

    layers: int
    width: int
    feed_forward: int
    heads: int
    key_value_heads: int
    vocabulary: int

    @property
    def key_value_width(self) -> int:
        return self.width // self.heads * self.key_value_heads

    @property
    def roles(self) -> dict[str, tuple[int, int]]:
        """(in, out) features of each linear of a layer."""
        width, pairs, wide = self.width, self.key_value_width, self.feed_forward
        return {
            "Q": (width, width),
            "K": (width, pairs),
            "V": (width, pairs),
            "O": (width, width),
            "G": (width, wide),
            "U": (width, wide),
            "D": (wide, width),
        }

    @property
    def linears(self) -> int:
        """Weights of the linears in all layers."""
        return self.layers * sum(i * o for i, o in self.roles.values())

    @property
    def head(self) -> int:
        return self.width * self.vocabulary

    @property
    def norms(self) -> int:
        return (2 * self.layers + 1) * self.width

    @property
    def kv_numbers(self) -> int:
        """Numbers in the KV cache for each token."""
        return 2 * self.layers * self.key_value_width


@dataclass(frozen=True)
class Method:
    """What the cost of a method depends on."""

    ranks: Mapping[str, int]  #: of the module at each role
    shape: Shape
    magnitudes: bool = False  #: DoRA's
    chosen: int | None = None  #: modules of a layer that a prompt uses; None: all

    def _sum(self, of: Callable[[int, int, int], int]) -> int:
        """``of(in, out, rank)`` over all modules."""
        roles = self.shape.roles
        return self.shape.layers * sum(of(*roles[role], rank) for role, rank in self.ranks.items())

    @property
    def factors(self) -> int:
        """Numbers in A and B."""
        return self._sum(lambda i, o, r: r * (i + o))

    @property
    def used_factors(self) -> float:
        """Those that a decoding step reads. With a router the mean over modules, as if it chose each as often."""
        return self.factors * (1 if self.chosen is None else self.chosen / len(self.ranks))

    @property
    def products(self) -> int:
        """Low-rank updates that a decoding step computes."""
        return self.shape.layers * (len(self.ranks) if self.chosen is None else self.chosen)

    @property
    def router(self) -> int:
        """Parameters of MiLoRA's routers: a pooling vector and a rational function of 7 + 5, then a linear."""
        shape = self.shape
        return 0 if self.chosen is None else shape.layers * (shape.width + 12 + shape.width * len(self.ranks))

    @property
    def parameters(self) -> int:
        """Trained ones."""
        magnitudes = self._sum(lambda i, o, r: o) if self.magnitudes else 0
        return self.factors + magnitudes + self.router

    @property
    def step_flops(self) -> int:
        """Of each training step, however many tokens: the norms of W + s · B A, row by row."""
        if not self.magnitudes:
            return 0
        return self._sum(lambda i, o, r: 2 * i * o * r + 2 * i * r * r + 2 * o * r * r)

    def router_flops(self, prompts: int) -> int:
        """Of a training step, forward and backward."""
        return 0 if self.chosen is None else 6 * prompts * self.shape.layers * self.shape.width * len(self.ranks)

    def train_flops(self, rows: int, tokens: int) -> tuple[int, int]:
        """Of a step: those of the frozen model, and those that the method adds.

        The backward pass goes through the first layer too, and attention computes its scores again there. All tokens
        but one of each row are answers.
        """
        shape, count = self.shape, rows * tokens
        attention = (2 + 5) * 2 * count * tokens * shape.width * shape.layers  # whole squares: no causal discount
        head = 2 * 2 * rows * (tokens - 1) * shape.head
        base = 2 * 2 * count * shape.linears + attention + head
        return base, 3 * 2 * count * self.factors + self.step_flops + self.router_flops(rows)

    def decode_flops(self, context: int) -> tuple[int, float]:
        """Of a token with ``context`` tokens in the cache, itself included: of the model, and added."""
        shape = self.shape
        base = 2 * (shape.linears + shape.head) + 4 * context * shape.width * shape.layers
        return base, 2 * self.used_factors

    def decode_bytes(self, rows: int, context: int, weight: float = BF16, number: float = BF16) -> tuple[float, float]:
        """Read in a decoding step of ``rows``, each with its own adapter: of the model, and of adapters.

        Args:
            weight: bytes of a weight of the linears; ``number``: of any other.
        """
        shape = self.shape
        model = weight * shape.linears + number * (shape.head + shape.norms)
        return model + rows * number * shape.kv_numbers * context, rows * number * self.used_factors


def methods(shape: Shape, rank: int = RANK) -> dict[str, Method]:
    """The methods of the page: adapters on all roles with ``rank``, or as many parameters."""
    every = dict.fromkeys(shape.roles, rank)
    features = {role: sum(sizes) for role, sizes in shape.roles.items()}
    matched = round(rank * sum(features.values()) / sum(features[role] for role in KEPT))
    return {
        "LoRA": Method(every, shape),
        "DoRA": Method(every, shape, magnitudes=True),
        "MiLoRA": Method(every, shape, chosen=3),
        "FanLoRA": Method(dict.fromkeys(KEPT, matched), shape),
    }


def exchanged(trained: int, tensors: int) -> int:
    """Bytes of a step's one all-reduce: fp32 gradients, and for each tensor whether it has one."""
    return FP32 * (trained + tensors)


def wire(exchanged: float, processes: int) -> float:
    """Bytes that a process sends in a ring all-reduce."""
    return 2 * (processes - 1) / processes * exchanged


def trained_tensors(method: Method) -> int:
    """Number of trained tensors: A, B (and m) of each module; of each router four."""
    modules = method.shape.layers * len(method.ranks)
    routers = 0 if method.chosen is None else 4 * method.shape.layers
    return (3 if method.magnitudes else 2) * modules + routers


def gathered(shape: Shape, processes: int) -> float:
    """Bytes that a process receives in a step with divided bf16 layers: all but its share, forward and backward."""
    return 2 * (processes - 1) / processes * BF16 * shape.linears


def tenants(shape: Shape, weight: float, rank: int, rows: int, context: int = CONTEXT) -> int:
    """LoRAs in bf16 that fit an H200 beside the model, the KV cache and the running batch's copies of ``rows``."""
    lora = methods(shape, rank)["LoRA"]
    free = USABLE["cuda"] * H200 - weight * shape.linears - BF16 * (2 * shape.head + shape.norms)
    free -= rows * BF16 * (shape.kv_numbers * context + lora.factors)
    return max(0, int(free // (BF16 * lora.factors)))


def memory(shape: Shape, overrides: Sequence[str], rows: int, tokens: int) -> Memory:
    """The memory of a bf16 training step, from those of two and three layers: each more adds the same."""
    two, three = layered_memory(shape, (2, 3), overrides, rows, tokens)
    return Memory(**{key: a + (shape.layers - 2) * (vars(three)[key] - a) for key, a in vars(two).items()})


def layered_memory(
    shape: Shape, layers: Sequence[int], overrides: Sequence[str], rows: int, tokens: int
) -> list[Memory]:
    """The memory of a bf16 training step with each number of ``layers``, by its operations on fake tensors."""
    from transformers import LlamaConfig

    memories = []
    with tempfile.TemporaryDirectory() as folder:
        for count in layers:
            LlamaConfig(
                architectures=["LlamaForCausalLM"],
                num_hidden_layers=count,
                hidden_size=shape.width,
                intermediate_size=shape.feed_forward,
                num_attention_heads=shape.heads,
                num_key_value_heads=shape.key_value_heads,
                vocab_size=shape.vocabulary,
            ).save_pretrained(folder)
            if not memories:
                words = [*overrides, f"model.path={folder}", "hardware.precision=bf16", "task=tiny_instruct"]
                run = compose("train", words, None).config
            with counting() as ledger:
                memories.append(TrainingStep(run, Length(tokens, tokens, ""), ledger).memory(rows))
    return memories


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def parameters_table() -> str:
    rows = []
    for size in SIZES:
        for name, method in methods(Shape(*SHAPES[size])).items():
            count = method.parameters
            sizes = [f"{count * each / 1e6:,.0f} MB" for each in (BF16, FP32, 2 * FP32)]
            ranks = "/".join(map(str, sorted(set(method.ranks.values()))))
            rows.append([size, name, ranks, f"{count / 1e6:.1f} M", *sizes])
    return table(["model", "method", "rank", "trained", "adapter, bf16", "gradients, fp32", "AdamW's moments"], rows)


def train_table() -> str:
    rows = []
    for size in SIZES:
        for name, method in methods(Shape(*SHAPES[size])).items():
            base, added = method.train_flops(4, TOKENS)
            if not rows or rows[-1][0] != size:
                rows.append([size, "the frozen model", f"{base / 4 / TOKENS / 1e9:.2f}", "", "1"])
            rows.append([size, name, "", f"{added / 4 / TOKENS / 1e9:.3f}", f"{1 + added / base:.3f}"])
    return table(["model", "", "GFLOP per token", "added", "ratio"], rows)


def decode_table() -> str:
    rows = []
    for size in SIZES:
        for name, method in methods(Shape(*SHAPES[size])).items():
            base, added = method.decode_flops(CONTEXT)
            reads = {rows: method.decode_bytes(rows, CONTEXT) for rows in (1, 8, 64)}
            if not rows or rows[-1][0] != size:
                read = [f"{model / 1e9:.1f} GB" for model, _ in reads.values()]
                rows.append([size, "the bare model", "", f"{base / 1e9:.2f}", *read])
            ratios = [f"{1 + adapters / model:.3f}" for model, adapters in reads.values()]
            if method.magnitudes:
                ratios[1:] = ["–"] * (len(ratios) - 1)
            rows.append([size, name, str(method.products), f"+ {added / 1e9:.3f}", *ratios])
    head = ["model", "", "updates", "GFLOP per token", *(f"bytes, {rows} row{'s' * (rows > 1)}" for rows in (1, 8, 64))]
    return table(head, rows)


def memory_table() -> str:
    rows = []
    for size, name, words in (
        ("7b", "LoRA", ["method=lora"]),
        ("7b", "DoRA", ["method=dora"]),
        ("7b", "MiLoRA", ["method=milora"]),
        ("7b", "LoRA, layers recomputed", ["method=lora", "hardware.gradient_checkpointing=layers"]),
        ("70b", "LoRA", ["method=lora"]),
        ("70b", "LoRA, layers recomputed", ["method=lora", "hardware.gradient_checkpointing=layers"]),
    ):
        used = memory(Shape(*SHAPES[size]), [*words, f"method.rank={RANK}"], 4, TOKENS)
        own = used.adapter + used.gradients + used.optimizer + used.method
        parts = (used.weights, own, used.activations, used.logits, used.peak)
        rows.append([size, name, *(f"{part / 1e9:.1f}" for part in parts)])
    head = ["model", "method", "frozen weights", "adapter, gradients, moments", "activations", "logits", "peak, GB"]
    return table(head, rows)


def exchange_table() -> str:
    rows = []
    for size in SIZES:
        shape = Shape(*SHAPES[size])
        for name, method in methods(shape).items():
            volume = exchanged(method.parameters, trained_tensors(method))
            rows.append([size, name, *(f"{part / 1e6:,.0f} MB" for part in (volume, wire(volume, 2), wire(volume, 8)))])
        whole = FP32 * (shape.linears + 2 * shape.head + shape.norms)
        rows.append([size, "full", *(f"{part / 1e6:,.0f} MB" for part in (whole, wire(whole, 2), wire(whole, 8)))])
        shares = (f"{gathered(shape, processes) / 1e6:,.0f} MB" for processes in (2, 8))
        rows.append([size, "layers gathered by `fsdp`", "", *shares])
    return table(["model", "method", "all-reduce", "each of 2 sends", "each of 8 sends"], rows)


def tenants_table() -> str:
    rows = []
    for size in SIZES:
        shape = Shape(*SHAPES[size])
        for name, weight in {"bf16": BF16, "NF4": NF4}.items():
            for rank in (8, 16, 64):
                each = BF16 * methods(shape, rank)["LoRA"].factors / 1e6
                fits = [f"{tenants(shape, weight, rank, rows):,}" for rows in (8, 64)]
                rows.append([size, name, str(rank), f"{each:,.0f} MB", *fits])
    return table(["model", "weights", "rank", "an adapter", "adapters with 8 rows", "with 64 rows"], rows)


def checks_table() -> str:
    rows = []
    for model, checked in json.loads(CHECKED.read_text()).items():
        for case in checked["rows"]:
            numbers = (case["predicted"], case["measured"], case["measured"] / case["predicted"])
            rows.append([model, case["what"], case["method"], *(f"{number:.2f}" for number in numbers)])
    return table(["model", "", "method", "predicted", "measured", "measured / predicted"], rows)


TABLES: dict[str, Callable[[], str]] = {
    "parameters": parameters_table,
    "train": train_table,
    "decode": decode_table,
    "memory": memory_table,
    "exchange": exchange_table,
    "tenants": tenants_table,
    "checks": checks_table,
}


def with_tables(page: str) -> str:
    """``page`` with each table between its comments made anew."""
    for name, made in TABLES.items():
        block = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        page, count = block.subn(lambda match, made=made: f"{match[1]}\n{made()}\n\n{match[2]}", page)
        assert count == 1, f"the page has {count} places for the table '{name}'"
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the tables into the page")
    if parser.parse_args().write:
        PAGE.write_text(with_tables(PAGE.read_text()))
        return
    for name, made in TABLES.items():
        print(f"{name}\n\n{made()}\n")


if __name__ == "__main__":
    main()
