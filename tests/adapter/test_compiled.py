"""hardware.compile: the same loss and gradients from compiled layers, and one graph for layers that are alike."""

import shutil
from pathlib import Path

import pytest
import small
import torch
from torch._dynamo.utils import counters

from lowrank_cli.adapter.training.compiled import compile_layers, require_compiler
from lowrank_cli.adapter.training.recompute import recompute
from lowrank_cli.errors import UserError
from lowrank_cli.launch import single_run
from lowrank_cli.methods.protocol import AddsLoss
from lowrank_cli.runs import Run

#: Of the compiler's own doing.
pytestmark = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf", "ignore:.*torch.jit.script_method"
)


@pytest.fixture(autouse=True)
def forgotten():
    """Graphs of one test do not serve the next."""
    torch._dynamo.reset()
    counters.clear()


def passed(name, family, ids, adapter):
    """Loss and gradients of one training pass."""
    torch.manual_seed(0)
    method = small.method(name)
    labels = {"labels": torch.zeros(len(ids), dtype=torch.long)} if "bert" in family else {"use_cache": False}
    output = adapter.model(input_ids=ids, **labels)
    loss = output.loss if "bert" in family else output.logits.square().mean()
    if isinstance(method, AddsLoss):
        loss = loss + method.extra_loss(adapter)
    adapter.model.zero_grad()
    loss.backward()
    return loss.detach(), {key: parameter.grad for key, parameter in adapter.trained.items()}


def both(name, family, backend, checkpointing="none"):
    plain, compiled = small.adapted(name, family), small.adapted(name, family)
    compile_layers(compiled.model, backend=backend)
    recompute(compiled.model, checkpointing)
    for adapter in (plain, compiled):
        adapter.model.train()
    for rows, tokens in ((3, 9), (2, 12)):
        ids = small.ids(rows, tokens)
        loss, gradients = passed(name, family, ids, compiled)
        expected, wanted = passed(name, family, ids, plain)
        torch.testing.assert_close(loss, expected)
        for key, gradient in gradients.items():
            torch.testing.assert_close(gradient, wanted[key], msg=key)
    assert not counters["graph_break"] and counters["frames"]["ok"] == counters["frames"]["total"] > 0


@pytest.mark.parametrize(
    ("name", "family", "backend"),  # neither generates code; aot_eager differentiates the graph as inductor does
    [("milora", "llama", "eager"), ("dora", "llama", "aot_eager"), ("lora", "gpt2", "eager")],
)
def test_gradients_are_the_same_and_nothing_breaks_the_graph(name, family, backend):
    both(name, family, backend)


def test_layers_that_are_alike_share_a_graph_whatever_the_shape_of_a_batch(monkeypatch):
    monkeypatch.setitem(small.GATED, "num_hidden_layers", 4)
    both("lora", "llama", "eager", checkpointing="layers")
    assert counters["stats"]["unique_graphs"] == 2  # the first has one of its own: its input has no gradient


def test_evaluation_is_not_compiled():
    adapter = small.adapted("lora")
    compile_layers(adapter.model, backend="eager")
    adapter.model.train()
    with torch.no_grad():
        adapter.model(input_ids=small.ids())
    adapter.model.eval()
    adapter.model(input_ids=small.ids())
    assert not counters["frames"]


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="no C++ compiler")
def test_a_run_trains_with_generated_code_as_without():
    quick = ["task=tiny_sentiment", "task.limit=8", "hardware.threads=1", "train.max_steps=2", "train.batch_size=4"]
    runs = []
    for value in ("false", "true"):
        single_run.start("train", [*quick, "method=lora", f"hardware.compile={value}"], None, "lrk train")
        runs.append(Run.open(Path("outputs/latest").resolve()))
    assert counters["frames"]["ok"]
    assert runs[1].metrics["dev/loss"] == pytest.approx(runs[0].metrics["dev/loss"], rel=1e-5)


def test_what_is_missing_is_said_before_anything_loads(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UserError, match=r"hardware\.compile: true needs a C\+\+ compiler"):
        require_compiler("cpu")


def test_it_does_not_go_with_the_feed_forward_s_own_way():
    with pytest.raises(
        UserError, match=r"hardware\.gradient_checkpointing: feed_forward is for hardware\.compile=false"
    ):
        single_run.start(
            "train", ["hardware.compile=true", "hardware.gradient_checkpointing=feed_forward"], None, "lrk train"
        )
