"""Random models of each family, small enough for milliseconds, and adapters on them whose updates are not zero."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
import yaml
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DeepseekV32Config,
    DeepseekV32ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from lowrank_cli import methods
from lowrank_cli.adapter.kv_cache import growing_cache
from lowrank_cli.methods.protocol import Adapts, AddsLoss, BeforeStep, Step

VOCABULARY = 64
GATED = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "num_labels": 3,
    "pad_token_id": 0,
}
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**GATED)),
    "llama_classifier": lambda: LlamaForSequenceClassification(LlamaConfig(**GATED, num_labels=3)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**GATED)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**GATED)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**GATED, head_dim=8)),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**GATED, head_dim=8)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, **_TOKENS)
    ),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            word_embed_proj_dim=32,
            max_position_embeddings=64,
            **_TOKENS,
        )
    ),
    "bert": lambda: BertForSequenceClassification(BertConfig(**ENCODER)),
    "roberta": lambda: RobertaForSequenceClassification(RobertaConfig(**ENCODER)),
}
#: Roles a family has, in the order of a layer's sites.
ROLES = dict.fromkeys(FAMILIES, "QKVOGUD") | dict.fromkeys(("gpt2", "opt", "bert", "roberta"), "QKVOUD")
CONF = Path(__file__).parent.parent / "conf" / "method"
#: Keys whose values in a method's YAML are made for other models than these, and what fits here.
FITTING = {"setting": str(Path(__file__).parent / "setting.yaml")}
#: Every method that trains an adapter: what holds for all of them is tested over this list.
TRAINABLE = [name for name in methods.names() if methods.can(name, Adapts)]
RANK = 16  #: the largest that fits every matrix here: 16 × 32, the keys and values


def model(family: str = "llama"):
    """The family's random model, always the same one, in evaluation mode."""
    torch.manual_seed(7)
    return FAMILIES[family]().eval()


def sparse() -> DeepseekV32ForCausalLM:
    """DeepSeek V3.2's attention, which sees the 4 keys that its indexer chooses."""
    torch.manual_seed(7)
    config = DeepseekV32Config(
        **(GATED | {"num_key_value_heads": GATED["num_attention_heads"]}),
        index_topk=4,
        index_head_dim=32,
        index_n_heads=2,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=16,
        qk_nope_head_dim=16,
        v_head_dim=32,
        first_k_dense_replace=2,
        moe_intermediate_size=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
    )
    return DeepseekV32ForCausalLM(config).eval().requires_grad_(False)


def config(name: str, **settings):
    """A method's YAML with half the rank, at the same scale, and what else fits small models; then ``settings``."""
    values = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    del values["defaults"]
    if "rank" in values:
        rank = min(-(-values["rank"] // 2), RANK)
        values |= {"rank": rank, "alpha": values["alpha"] * rank / values["rank"]}
    values |= {key: value for key, value in FITTING.items() if key in values} | settings
    made = methods.config_classes()[name](**values)
    for key, value in made.values_from_files(settings).items():
        setattr(made, key, value)
    made.validate()
    return made


def method(name: str, **settings):
    """A method with small settings."""
    return methods.create(config(name, **settings))


def adapted(name: str = "lora", family: str = "llama", *, trained: bool = True, **settings):
    """A fresh model with an adapter; ``trained`` fills what is zero at the start, as training would."""
    torch.manual_seed(3)
    adapter = method(name, **settings).adapt(model(family))
    if trained:
        with torch.no_grad():
            for part in adapter.modules.values():
                part.lora_b.normal_(std=0.2)
                for name, parameter in part.tensors().items():
                    if name == "lora_magnitude_vector":
                        parameter.mul_(torch.rand_like(parameter) + 0.5)
            for router in adapter.routing.routers if adapter.routing else []:
                for name, parameter in router.named_parameters():
                    if name.startswith("pooler."):
                        parameter.normal_()
                router.projection.weight.normal_(std=0.3 if router.standardized else 3.0)
                if router.standardized:
                    width = router.projection.in_features
                    router.standardize(0.3 * torch.randn(width), torch.rand(width) + 0.5)
    return adapter


def ids(rows: int = 3, tokens: int = 9) -> torch.Tensor:
    """Random token ids (rows, tokens) without special tokens."""
    return torch.randint(3, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(5))


def generated_logits(model, ids: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
    """Logits (6, B, V) of six generated tokens, the likeliest each; ``inputs`` go to ``generate``."""
    made = model.generate(
        ids,
        max_new_tokens=6,
        do_sample=False,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
        **growing_cache(model, 6),
        **inputs,
    )
    return torch.stack(made.logits)


def train(method, adapter, steps: Iterable[int], total: int, *, learning_rate: float = 0.05) -> None:
    """Plain gradient steps of a method, in the order in which the training stage calls it."""
    for number in steps:
        tokens = torch.randint(3, VOCABULARY, (4, 9), generator=torch.Generator().manual_seed(number))
        logits = adapter.model(input_ids=tokens).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        if isinstance(method, AddsLoss):
            loss = loss + method.extra_loss(adapter)
        loss.backward()
        del logits, loss  # their graph would hold the tensors to the shapes that they have now
        step = Step(number, total, adapter, learning_rate, dev_loss=None, average=lambda tensor: tensor)
        if isinstance(method, BeforeStep):
            method.before_step(step)
        with torch.no_grad():
            for parameter in adapter.trained.values():
                parameter -= learning_rate * parameter.grad
                parameter.grad = None
        method.after_step(step)
