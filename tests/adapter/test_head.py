"""The head at answer positions, in chunks: losses, logits and gradients of the model's own forward over all of them."""

import copy
from contextlib import nullcontext

import pytest
import small
import torch
import transformers
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowrank_cli.adapter import lm_head
from lowrank_cli.adapter.lm_head import answers_at, headless
from lowrank_cli.adapter.training.recompute import recompute
from lowrank_cli.errors import UserError

#: Families whose forward does something to the head's input or output.
GATED = {**small.GATED, "num_hidden_layers": 1}
MODELS = {
    "gemma2": lambda: transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**GATED, head_dim=8, final_logit_softcapping=0.2)
    ),
    "gemma3": lambda: transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**GATED, head_dim=8)),
    "granite": lambda: transformers.GraniteForCausalLM(transformers.GraniteConfig(**GATED, logits_scaling=0.3)),
    "cohere": lambda: transformers.CohereForCausalLM(transformers.CohereConfig(**GATED, logit_scale=4.0)),
    "phi": lambda: transformers.PhiForCausalLM(transformers.PhiConfig(**GATED)),  # a bias
    "gpt_neox": lambda: transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(**{k: v for k, v in GATED.items() if k != "num_key_value_heads"})
    ),
    "mixtral": lambda: transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**GATED, num_local_experts=2, num_experts_per_tok=1)
    ),
    "olmo2": lambda: transformers.Olmo2ForCausalLM(transformers.Olmo2Config(**GATED)),
    "bert": lambda: transformers.BertLMHeadModel(  # a transformation between body and head
        transformers.BertConfig(**small.ENCODER, is_decoder=True)
    ),
}
IDS = small.ids(3, 9)
#: Rows of no, of some and of all positions, the last one apart.
ANSWERED = torch.tensor([[0] * 9, [0, 0, 1, 0, 1, 1, 0, 0, 0], [1] * 8 + [0]]).bool()
LABELS = IDS.roll(-1, dims=1)[ANSWERED]
INPUTS = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}


@pytest.fixture(autouse=True, params=[5, 10_000], ids=["chunks", "one chunk"])
def chunk(request, monkeypatch):
    """Positions of a chunk."""
    monkeypatch.setattr(lm_head, "LOGITS", request.param * small.VOCABULARY)


def made(family: str) -> transformers.PreTrainedModel:
    torch.manual_seed(7)
    model = MODELS[family]() if family in MODELS else small.FAMILIES[family]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def plain(model: torch.nn.Module, **inputs: torch.Tensor) -> torch.Tensor:
    """Losses from the logits of all positions."""
    return F.cross_entropy(model(**INPUTS, **inputs).logits[ANSWERED].float(), LABELS, reduction="none")


@pytest.mark.parametrize("family", [*MODELS, "llama", "gpt2", "opt"])
def test_every_familys_own_logits_and_losses(family):
    model = made(family)
    found = answers_at(model, INPUTS, ANSWERED)
    assert found.head is not None, "the head is computed at all positions"
    with torch.no_grad():
        torch.testing.assert_close(found.logits(), model(**INPUTS).logits[ANSWERED])
        torch.testing.assert_close(found.losses(LABELS), plain(model))
        torch.testing.assert_close(torch.cat([logits for _, logits in found.chunks()]), found.logits())
    again = answers_at(model, INPUTS, ANSWERED)
    torch.testing.assert_close(again.states, found.states, rtol=0, atol=0)
    assert not any("forward" in vars(module) for module in model.modules())


def gradients(loss: torch.Tensor, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("trained", ["all", "body", "head"])
@pytest.mark.parametrize("family", ["gemma2", "cohere", "phi", "gpt2"])
def test_gradients_whatever_trains(family, trained):
    model = made(family)
    own = {id(parameter) for parameter in model.get_output_embeddings().parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(trained == "all" or (id(parameter) in own) == (trained == "head"))
    weights = torch.linspace(0.5, 2, len(LABELS))  # of each position
    expected = gradients((plain(model) * weights).sum(), model)
    found = gradients((answers_at(model, INPUTS, ANSWERED).losses(LABELS) * weights).sum(), model)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", small.TRAINABLE)
@pytest.mark.parametrize("around", ["plain", "checkpointed", "autocast"])
def test_adapters_train_as_with_all_logits(name, around):
    adapter = small.adapted(name, k=2) if name == "milora" else small.adapted(name)
    model = adapter.model.train()
    inputs = {"prompt_mask": (~ANSWERED).long()} if adapter.routing else {}
    if around == "checkpointed":
        recompute(model, "layers")
    with torch.autocast("cpu", torch.bfloat16) if around == "autocast" else nullcontext():
        expected = gradients(plain(model, **inputs).sum(), model)
        found = gradients(answers_at(model, INPUTS | inputs, ANSWERED, model).losses(LABELS).sum(), model)
    assert len(found) == len(adapter.trained)
    tolerance = {"rtol": 0.05, "atol": 0.02} if around == "autocast" else {}
    torch.testing.assert_close(found, expected, **tolerance)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_an_adapted_head_trains_too(kind):
    adapter = small.adapted(kind, target_modules=["lm_head", "V"])
    expected = gradients(plain(adapter.model).sum(), adapter.model)
    found = gradients(answers_at(adapter.model, INPUTS, ANSWERED).losses(LABELS).sum(), adapter.model)
    assert any("lm_head" in name for name in found)
    torch.testing.assert_close(found, expected)


@torch.no_grad()
def test_gates_of_an_adapted_head_follow_its_rows():
    adapter = small.adapted(target_modules=["lm_head"])
    (part,) = adapter.modules.values()
    gates = torch.rand(len(IDS), part.rank)
    part.rank_gate, part.module_gate = gates, torch.rand(len(IDS))
    expected = adapter.model(**INPUTS).logits[ANSWERED]
    torch.testing.assert_close(answers_at(adapter.model, INPUTS, ANSWERED).logits(), expected)
    assert part.rank_gate is gates


class Dependent(transformers.LlamaForCausalLM):
    """Its logits depend on tokens, not on hidden states alone."""

    def forward(self, input_ids, **kwargs):
        out = super().forward(input_ids=input_ids, **kwargs)
        out.logits = out.logits * (1 + input_ids.float().mean())
        return out


class Functional(transformers.LlamaForCausalLM):
    """It computes logits without calling its head."""

    def forward(self, input_ids, attention_mask=None, use_cache=None):
        states = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)[0]
        return transformers.modeling_outputs.CausalLMOutput(logits=F.linear(states, self.lm_head.weight))


def test_a_head_that_is_not_called_gives_all_logits():
    torch.manual_seed(0)
    model = Functional(transformers.LlamaConfig(**GATED)).eval()
    found = answers_at(model, INPUTS, ANSWERED)
    assert found.head is None
    torch.testing.assert_close(found.losses(LABELS), plain(model))


def test_logits_that_depend_on_more_than_the_head_reads_are_refused():
    model = Dependent(transformers.LlamaConfig(**GATED)).eval()
    with pytest.raises(UserError, match="logits of this 'llama' depend on more than its head reads"):
        answers_at(model, INPUTS, ANSWERED)


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes inside."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor) and not leaf._is_view()]
        self.numbers = max([self.numbers, *sizes])
        return out


@pytest.mark.parametrize("trained", ["adapter", "head"])
def test_no_tensor_is_larger_than_a_chunk(trained, monkeypatch):
    vocabulary, chunk = 5000, 4
    monkeypatch.setattr(lm_head, "LOGITS", chunk * vocabulary)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**GATED | {"vocab_size": vocabulary, "hidden_size": 4, "head_dim": 4})
    )
    model.lm_head.requires_grad_(trained == "head")
    ids = torch.arange(60).view(3, 20)
    answered = torch.ones_like(ids, dtype=torch.bool)
    answers_at(model, {"input_ids": ids}, answered)  # the first pass compares one position
    with Largest() as largest:
        answers_at(model, {"input_ids": ids}, answered).losses(ids.flatten()).sum().backward()
    assert largest.numbers == chunk * vocabulary


@torch.no_grad()
def test_a_pass_without_a_head_does_the_rest():
    model = made("gemma2")
    seen = []
    model.model.register_forward_hook(lambda module, args, output: seen.append(output[0].clone()))
    expected = model(**INPUTS).logits
    with headless(model):
        assert model(**INPUTS).logits.numel() == 0
    assert torch.equal(*seen)
    assert torch.equal(copy.deepcopy(model)(**INPUTS).logits, expected)
