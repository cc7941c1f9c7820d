"""Real decoders: what must hold on them as it does on small random ones. Skipped unless folders of them are named.

    LRK_REAL_MODELS=/folder ./scripts/test tests/test_real_models.py

runs them on ``/folder/smollm2`` (SmolLM2-135M-Instruct) and ``/folder/gemma3`` (Gemma 3 270M), as ``save_pretrained``
writes them; about 10 minutes and 5 GB of memory on one core.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from llama_cpp_process import llama_cpp
from resuming import train_broken_at
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowrank_cli import methods
from lowrank_cli.adapter.files.export import as_lora, lora_error
from lowrank_cli.adapter.files.gguf_export import LORA_FILE, MODEL_FILE, save_lora_gguf, save_merged_gguf
from lowrank_cli.adapter.target_sites import known_sites
from lowrank_cli.adapter.tenants.bank import Bank
from lowrank_cli.calibration.ida import IdaSoftmax, statistics
from lowrank_cli.config.composition import compose
from lowrank_cli.errors import UserError
from lowrank_cli.inference.choice_scores import Prefix, candidate_scores
from lowrank_cli.launch import single_run
from lowrank_cli.models.prepack import prepack, same_input
from lowrank_cli.runs import Run
from lowrank_cli.tasks.encode import collate_prompts

ROOT = os.environ.get("LRK_REAL_MODELS")
MODELS = {"smollm2": ("smollm2_135m", 30), "gemma3": ("gemma3_270m", 18)}  #: folder: name and layers
PROMPTS = ["The capital of France is", "Review: a dull and lifeless film. Sentiment:", "12 plus 30 is"]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(ROOT is None, reason="needs LRK_REAL_MODELS, a folder of real models"),
]


@pytest.fixture(params=MODELS)
def name(request):
    if not (Path(ROOT) / request.param / "config.json").is_file():
        pytest.skip(f"there is no model in {ROOT}/{request.param}")
    return request.param


@pytest.fixture
def bare(name):
    """The model as it is, in evaluation mode."""
    return AutoModelForCausalLM.from_pretrained(Path(ROOT) / name, dtype=torch.float32).eval()


@pytest.fixture
def batch(name):
    tokenizer = AutoTokenizer.from_pretrained(Path(ROOT) / name, padding_side="right")
    return dict(tokenizer(PROMPTS, return_tensors="pt", padding=True))


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits[batch["attention_mask"].bool()]


def adapted(model, method: str = "lora", *overrides: str):
    config = compose("train", [f"method={method}", *overrides]).config.method
    torch.manual_seed(0)
    return methods.create(config).adapt(model)


def filled(adapter):
    """``adapter`` with updates that are not zero."""
    torch.manual_seed(1)
    with torch.no_grad():
        for module in adapter.modules.values():
            module.lora_b.normal_(std=0.005)
    return adapter


def test_roles(bare, name):
    sites = known_sites(bare)
    layers = MODELS[name][1]
    assert [(site.layer, site.role) for site in sites] == [(at, role) for at in range(layers) for role in "QKVOGUD"]


def test_packed_weights_compute_the_same(bare, batch, name):
    before = logits(bare, batch)
    groups = [len(group) for group in same_input(bare)]
    assert groups == [3, 2] * MODELS[name][1], "query, key and value; gate and up"
    prepack(bare.requires_grad_(False))
    torch.testing.assert_close(logits(bare, batch), before, atol=1e-5 * float(before.abs().max()), rtol=0)


@pytest.mark.parametrize("method", ["lora", "dora", "milora", "moelora", "adalora", "sora"])
def test_a_fresh_adapter_is_the_bare_model(bare, batch, method):
    before = logits(bare, batch)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    adapter = adapted(bare, method, *(["method.bilevel=false"] if method == "milora" else []))
    extra = {"prompt_mask": mask} if adapter.routing else {}
    with torch.no_grad():
        after = adapter.model(input_ids=ids, attention_mask=mask, **extra).logits[mask.bool()]
    assert torch.equal(after, before)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # of peft's own
def test_logits_and_a_training_step_are_those_of_peft(bare, batch, name):
    peft = pytest.importorskip("peft")
    linears = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapter = filled(adapted(bare, "lora", "method.rank=4", "method.alpha=8", "method.dropout=0"))
    fresh = AutoModelForCausalLM.from_pretrained(Path(ROOT) / name, dtype=torch.float32)
    settings = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, lora_dropout=0.0, target_modules=linears)
    theirs = peft.get_peft_model(fresh, settings).eval()
    pairs = []
    for key, module in adapter.modules.items():
        other = theirs.base_model.model.get_submodule(key)
        for own, their in ((module.lora_a, other.lora_A), (module.lora_b, other.lora_B)):
            their["default"].weight.data.copy_(own)
            pairs.append((own, their["default"].weight))
    reference = logits(theirs, batch)
    assert relative(logits(adapter.model, batch), reference) < 1e-4
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)[:, 1:]
    for model, parameters in ((adapter.model, [own for own, _ in pairs]), (theirs, [their for _, their in pairs])):
        optimizer = torch.optim.SGD(parameters, lr=1.0)
        loss = F.cross_entropy(model(**batch).logits[:, :-1].flatten(0, 1), labels.flatten(), ignore_index=-100)
        loss.backward()
        optimizer.step()
    moved = [relative(own.grad, their.grad) for own, their in pairs]
    assert max(moved) < 1e-3
    assert relative(logits(adapter.model, batch), logits(theirs, batch)) < 1e-3


def test_merging_is_the_adapter_and_can_be_undone(bare, batch):
    before = logits(bare, batch)
    adapter = filled(adapted(bare, "lora", "method.rank=4"))
    expected = logits(adapter.model, batch)
    assert relative(expected, before) > 0.01
    adapter.merge()
    assert relative(logits(adapter.model, batch), expected) < 1e-4
    adapter.unmerge()
    with adapter.disabled():
        assert torch.equal(logits(adapter.model, batch), before)


def test_an_export_is_the_adapter(bare):
    for method in ("lora", "dora"):
        adapter = filled(adapted(bare, method, "method.rank=2", "method.target_modules=[Q,D]"))
        assert lora_error(adapter, as_lora(adapter, None)[0]) < 1e-3
        for path, linear in adapter.linears.items():
            parent, _, name = path.rpartition(".")
            setattr(bare.get_submodule(parent), name, linear.base)


def test_a_head_that_shares_the_embedding_is_not_merged(bare):
    adapter = adapted(bare, "lora", "method.target_modules=[lm_head]")
    with pytest.raises(UserError, match=r"^merge: 'lm_head' shares its weight with the input embedding"):
        adapter.merge()


def test_routing_differs_from_prompt_to_prompt(name):
    chosen, _ = MODELS[name]
    overrides = ["method=milora", f"model={chosen}", f"model.path={Path(ROOT) / name}", "task=tiny_sentiment"]
    overrides += ["task.limit=24", "method.rank=2", "method.bilevel=false", "train.max_steps=1", "train.batch_size=2"]
    single_run.start("train", [*overrides, "hardware.threads=1", "evaluate.batch_size=8"], None, "lrk train")
    metrics = Run.open("outputs/latest").metrics
    assert metrics["routing/largest_gate"] < 2  # of at most k = 3
    assert metrics["routing/distinct_sets"] > 4
    assert [metrics[f"routing/{kind}_layers"] for kind in ("same", "saturated", "tied")] == [0, 0, 0]


def test_a_shared_prefix_scores_as_whole_prompts(bare, name):
    """Demonstrations longer than Gemma 3's window of 512 tokens, then queries of unequal length."""
    tokenizer = AutoTokenizer.from_pretrained(Path(ROOT) / name)
    shared = tokenizer("Review: a dull and lifeless film. Sentiment: bad\n\n" * 45)["input_ids"]
    rests = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in PROMPTS]
    words = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in (" good", " bad", " very good")]
    assert len(shared) > 520
    rows = collate_prompts([shared + rest for rest in rests], 0)
    whole = candidate_scores(bare, **rows, options=[words] * len(rests))
    short = candidate_scores(bare, **rows, options=[words] * len(rests), prefix=Prefix(bare, shared))
    torch.testing.assert_close(torch.tensor(short), torch.tensor(whole), atol=1e-3, rtol=0)


def test_a_bank_is_each_adapter_alone(bare, name, batch):
    ids, mask = batch["input_ids"], batch["attention_mask"]
    expected = [logits(bare, {"input_ids": ids[:1], "attention_mask": mask[:1]})]
    adapters = []
    for seed in (1, 2):
        own = AutoModelForCausalLM.from_pretrained(Path(ROOT) / name, dtype=torch.float32).eval()
        adapter = adapted(own, "lora", "method.rank=4", "method.target_modules=[Q,V,D]")
        torch.manual_seed(seed)
        for module in adapter.modules.values():
            module.lora_b.data.normal_(std=0.005)
        adapters.append(adapter)
        row = slice(seed, seed + 1)
        expected.append(logits(own, {"input_ids": ids[row], "attention_mask": mask[row]}))
    bank = Bank(bare)
    for at, adapter in enumerate(adapters):
        bank.add(str(at), adapter)
    with bank.batch([None, "0", "1"]):
        assert relative(logits(bare, batch), torch.cat(expected)) < 1e-4


@pytest.mark.parametrize("method", ["lora", "milora"])
def test_a_broken_run_resumes_bit_for_bit_and_is_exported(name, method):
    chosen, _ = MODELS[name]
    overrides = [f"method={method}", f"model={chosen}", f"model.path={Path(ROOT) / name}", "task=tiny_sentiment"]
    overrides += ["task.limit=4", "method.rank=2", "train.max_steps=2", "train.batch_size=2", "train.eval_every=2"]
    overrides += ["train.log_every=1", "train.checkpoint_every=1", "hardware.threads=1", "evaluate.batch_size=4"]
    single_run.start("train", overrides, None, "lrk train")
    whole = Run.open(Path("outputs/latest").resolve())
    assert f"-{method}-{chosen}-" in whole.path.name
    resumed = train_broken_at(2, overrides)
    assert resumed.path != whole.path
    one, other = (load_file(run.path / "adapter" / "adapter_model.safetensors") for run in (whole, resumed))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    if method == "lora":
        for form in ("lora", "merged"):
            single_run.start("export", [f"run={whole.path}", f"export.format={form}"], None, "lrk export")
            assert Run.open("outputs/latest").metrics["export/logit_error"] < 1e-3


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, relative to the largest magnitude expected."""
    return ((found - expected).abs().max() / expected.abs().max().clamp_min(1e-9)).item()


@torch.no_grad()
def test_the_closed_form_keeps_its_digits_on_a_real_head(bare, batch):
    last = batch["attention_mask"].sum(dim=1) - 1
    features = bare.model(**batch).last_hidden_state[torch.arange(len(PROMPTS)), last]  # (B, D)
    found = statistics(features, torch.zeros(len(PROMPTS), dtype=torch.long), 1)
    head, tokens = bare.get_output_embeddings().weight, [100, 2000]
    ours = IdaSoftmax(head, found.mean, found.factor, 0.5, tokens)(features @ head.t(), torch.tensor([tokens] * 3))
    weight, mean, factor = head.double(), found.mean.double(), found.factor.double()
    for column, token in enumerate(tokens):
        apart = weight - weight[token]  # (V, D)
        moved = apart @ (features.double() + 0.5 * mean).t() + 0.25 * (apart @ factor.t()).square().sum(1, keepdim=True)
        torch.testing.assert_close(ours[:, column].double(), -moved.logsumexp(dim=0), rtol=1e-5, atol=1e-3)


def test_llama_cpp_computes_what_a_lora_does(tmp_path):
    """The largest difference of any log probability was 6e-5 with a trained LoRA."""
    if not (Path(ROOT) / "smollm2" / "config.json").is_file():
        pytest.skip(f"there is no model in {ROOT}/smollm2")
    pytest.importorskip("gguf")

    def adapted(std):
        model = AutoModelForCausalLM.from_pretrained(Path(ROOT) / "smollm2", dtype=torch.float32).eval()
        adapter = methods.create(compose("train", ["method=lora"], None).config.method).adapt(model)
        with torch.no_grad():
            for module in adapter.modules.values():
                module.lora_b.normal_(std=std)
        return adapter

    tokenizer = AutoTokenizer.from_pretrained(Path(ROOT) / "smollm2")
    for folder in ("base", "merged"):
        tokenizer.save_pretrained(tmp_path / folder)
    save_merged_gguf(adapted(0.0), tmp_path / "base")
    adapter = adapted(0.005)
    ids = tokenizer(PROMPTS[1], return_tensors="pt").input_ids
    with torch.no_grad():
        expected = adapter.model(input_ids=ids).logits[0].log_softmax(-1)
        with adapter.disabled():
            bare = adapter.model(input_ids=ids).logits[0].log_softmax(-1)
    assert (bare - expected).abs().max() > 0.1
    save_lora_gguf(adapter, as_lora(adapter, None)[0], tmp_path / LORA_FILE)
    save_merged_gguf(adapter, tmp_path / "merged")
    texts = [tokenizer(text).input_ids for text in PROMPTS]
    for model, lora in (("base", tmp_path / LORA_FILE), ("merged", None)):
        actual, tokens = llama_cpp(tmp_path / model / MODEL_FILE, ids[0].tolist(), PROMPTS, lora)
        assert tokens == texts
        torch.testing.assert_close(actual, expected, atol=1e-3, rtol=0)
