"""The bank: every row of a batch computes what its adapter computes alone, whatever stands in the other rows."""

from __future__ import annotations

import json

import pytest
import small
import torch
from safetensors.torch import load_file, save_file
from transformers import StoppingCriteria, StoppingCriteriaList

from lowrank_cli.adapter.files import save_load
from lowrank_cli.adapter.files.export import as_lora, save_lora
from lowrank_cli.adapter.kv_cache import pass_cache, returned_cache
from lowrank_cli.adapter.ranks import resize
from lowrank_cli.adapter.tenants.bank import Bank
from lowrank_cli.adapter.tenants.grouped_update import GroupedLinear, group
from lowrank_cli.adapter.tenants.tenant import saved_canary
from lowrank_cli.errors import UserError

EQUAL = {"atol": 1e-5, "rtol": 1e-5}


def mixed_ranks(family):
    """As ALoRA leaves it: other ranks in other modules, and one module without any."""
    adapter = small.adapted("lora", family)
    plan = {}
    for at, (key, part) in enumerate(adapter.modules.items()):
        plan[key] = (list(range(at % 3 + (at > 0))), at % 2)
        assert part.rank == 4
    resize(adapter, plan)
    with torch.no_grad():
        for part in adapter.modules.values():
            part.lora_b.normal_(std=0.2)
    return adapter


def another(name, family, **settings):
    """An adapter with numbers of its own."""
    adapter = small.adapted(name, family, **settings)
    with torch.no_grad():
        for part in adapter.modules.values():
            part.lora_a.mul_(torch.rand_like(part.lora_a) + 0.5)
        for router in adapter.routing.routers if adapter.routing else []:
            router.projection.weight.neg_()
    return adapter


def adapters(family):
    roles = small.ROLES[family]
    return {
        "lora": small.adapted("lora", family),
        "wide": another("lora", family, rank=7, alpha=3),
        "ranks": mixed_ranks(family),
        "few": another("lora", family, target_modules=["V", "D"], rank=6),
        "milora": small.adapted("milora", family),
        "milora2": another("milora", family, k=1, pooler="max", target_modules=list(roles[1:5])),
        "pissa": another("pissa", family),
        "sora": small.adapted("sora", family),
    }


def filled(family, found):
    bank = Bank(small.model(family))
    for name, adapter in found.items():
        bank.add(name, adapter)
    return bank


def padded(rows, tokens=9):
    """Token ids and attention mask (rows, tokens); every row has more padding on the left than the one before."""
    ids, mask = small.ids(rows, tokens), torch.ones(rows, tokens, dtype=torch.long)
    for row in range(rows):
        mask[row, : row % 5] = 0
        ids[row, : row % 5] = 0
    return ids, mask


@pytest.mark.parametrize("family", ["llama", "gemma", "qwen3", "gpt2", "opt"])
def test_each_row_has_the_logits_of_its_adapter_alone(family):
    found = adapters(family)
    bank = filled(family, found)
    names = [*found, None, "few", "milora", "lora", "lora", "milora2", None, "lora"]
    ids, mask = padded(len(names))
    with torch.no_grad():
        bare = bank.model(input_ids=ids, attention_mask=mask).logits
        with bank.batch(names):
            together = bank.model(input_ids=ids, attention_mask=mask).logits
        assert torch.equal(bank.model(input_ids=ids, attention_mask=mask).logits, bare), (
            "the model is the bare one again"
        )
        for row, name in enumerate(names):
            model = found[name].model if name else bank.model
            alone = model(input_ids=ids[row : row + 1], attention_mask=mask[row : row + 1]).logits[0]
            torch.testing.assert_close(together[row, row % 5 :], alone[row % 5 :], **EQUAL)
            if name:
                assert (alone - bare[row])[row % 5 :].abs().max() > 1e-3, "the adapter does something"


@pytest.mark.parametrize("names", [["milora", "lora"], ["lora", "wide"], ["wide", None, "wide"], ["milora"] * 2])
def test_a_batch_runs_under_autocast(names):
    found = adapters("llama")
    bank, ids = filled("llama", found), small.ids(len(names))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        with bank.batch(names):
            together = bank.model(input_ids=ids).logits
        for row, name in enumerate(names):
            model = found[name].model if name else bank.model
            torch.testing.assert_close(together[row], model(input_ids=ids[row : row + 1]).logits[0], atol=0.05, rtol=0)


def test_an_adapter_computes_in_the_dtype_of_the_bank():
    bank, ids = Bank(small.model().bfloat16()), small.ids(2)
    for name in ("lora", "milora"):
        adapter = small.adapted(name)
        bank.add(name, adapter)
        with torch.no_grad(), bank.batch([name, name]):
            found, expected = bank.model(input_ids=ids).logits, adapter.model(input_ids=ids).logits
        torch.testing.assert_close(found.float(), expected, atol=0.1, rtol=0)


def generated(model, ids, mask, beams):
    return model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=7,
        min_new_tokens=7,
        num_beams=beams,
        num_return_sequences=beams,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
    )


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_generation_is_that_of_each_adapter_alone(family, beams):
    found = adapters(family)
    bank = filled(family, found)
    names = ["milora", "few", None, "milora", "ranks", "milora2"]
    ids, mask = padded(len(names))
    with bank.batch(names):
        together = generated(bank.model, ids, mask, beams)
    for row, name in enumerate(names):
        model = found[name].model if name else bank.model
        alone = generated(model, ids[row : row + 1], mask[row : row + 1], beams)
        own = slice(row * beams, (row + 1) * beams)
        assert torch.equal(together.sequences[own], alone.sequences)
        for one, other in zip(together.scores, alone.scores, strict=True):
            torch.testing.assert_close(one[own], other, **EQUAL)


def test_a_prompt_of_a_routed_adapter_is_routed_once_for_all_its_beams(monkeypatch):
    adapter = small.adapted("milora")
    bank = filled("llama", {"milora": adapter})
    seen = []
    routes = bank.tenant("milora").routes
    gates = routes.gates
    monkeypatch.setattr(routes, "gates", lambda *args: seen.append(len(args[1])) or gates(*args))
    with bank.batch(["milora", None, "milora"]):
        bank.model.generate(small.ids(3), max_new_tokens=4, num_beams=3, do_sample=False)
    assert seen == [2, 2], "two prompts in each of two layers, and nothing for later tokens"


def test_a_cache_continued_by_more_rows_keeps_each_rows_adapter():
    found = adapters("llama")
    bank = filled("llama", found)
    names, ids = ["milora", "lora", "milora2"], small.ids(3, 6)
    with torch.no_grad():
        with bank.batch(names):
            cache = returned_cache(bank.model(input_ids=ids, use_cache=True))
            cache.batch_repeat_interleave(2)
            after = torch.arange(3, 9).view(6, 1)
            together = bank.model(input_ids=after, **pass_cache(bank.model, cache)).logits
        for row, name in enumerate(names):
            for copy in range(2):
                at = 2 * row + copy
                model = found[name].model
                cache = returned_cache(model(input_ids=ids[row : row + 1], use_cache=True))
                alone = model(input_ids=after[at : at + 1], **pass_cache(model, cache)).logits
                torch.testing.assert_close(together[at], alone[0], **EQUAL)


def test_only_the_cache_of_the_latest_prompts_is_continued():
    bank, after = filled("llama", {"milora": small.adapted("milora")}), torch.tensor([[5]])

    def refused(cache):
        with pytest.raises(AssertionError, match="belong to another KV cache"):
            bank.model(input_ids=after, **pass_cache(bank.model, cache))

    with torch.no_grad():
        with bank.batch(["milora"]):
            first, second = (returned_cache(bank.model(input_ids=small.ids(1, n), use_cache=True)) for n in (4, 6))
            refused(first)
            bank.model(input_ids=after, **pass_cache(bank.model, second))
            bank.model(input_ids=after, **pass_cache(bank.model, second))
        with bank.batch(["milora"]):
            refused(second)


class Meanwhile(StoppingCriteria):
    """Calls ``act`` after the second token."""

    def __init__(self, act):
        self.act, self.tokens = act, 0

    def __call__(self, input_ids, scores, **kwargs):
        self.tokens += 1
        if self.tokens == 2:
            self.act()
        return torch.zeros(len(input_ids), dtype=torch.bool)


def test_adapters_come_and_go_while_a_batch_runs():
    found = adapters("llama")
    bank, ids = filled("llama", found), small.ids(2)
    arguments = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}

    def act():
        bank.remove("milora")
        bank.remove("lora")
        bank.add("lora", found["wide"])
        bank.add("new", found["few"])

    with bank.batch(["milora", "lora"]):
        before = bank.model.generate(ids, **arguments)
    with bank.batch(["milora", "lora"]):
        meanwhile = bank.model.generate(ids, stopping_criteria=StoppingCriteriaList([Meanwhile(act)]), **arguments)
    assert torch.equal(before, meanwhile)
    assert bank.names[-2:] == ["lora", "new"] and "milora" not in bank.names
    with bank.batch(["lora", "new"]), torch.no_grad():
        together = bank.model(input_ids=ids).logits
        for row, name in enumerate(["wide", "few"]):
            torch.testing.assert_close(
                together[row], found[name].model(input_ids=ids[row : row + 1]).logits[0], **EQUAL
            )


def test_adapters_come_while_a_routed_batch_leaves_modules_unused():
    found = adapters("llama")
    bank, ids = filled("llama", {"milora": found["milora"]}), small.ids(1)
    with torch.no_grad(), bank.batch(["milora"]):
        before = bank.model(input_ids=ids).logits
        bank.add("lora", found["lora"])
        assert torch.equal(bank.model(input_ids=ids).logits, before)
    assert bank.names == ["milora", "lora"] and bank.resident == ["milora", "lora"]


def test_memory_is_bounded_and_the_least_recently_used_leave_the_device():
    adapter = small.adapted("lora")
    size = filled("llama", {"one": adapter}).bytes("one")
    assert size == 4 * adapter.count()
    bank = Bank(small.model(), max_bytes=4 * size)
    for name in "abcde":
        bank.add(name, adapter)
    assert bank.resident == ["b", "c", "d", "e"] and bank.names == list("abcde")
    with bank.batch(["b", "b"]):  # one adapter needs no operands of its own
        assert bank.resident == ["c", "d", "e", "b"]
    with bank.batch(["a", "b"]) as batch:
        assert batch.bytes == 2 * size and bank.resident == ["a", "b"], "two adapters and as many operands"
        bank.model(input_ids=small.ids(2))
    with pytest.raises(UserError, match=r"bank: 3 adapters and a batch's operands take .* MB, and max_bytes is"):  # noqa: SIM117
        with bank.batch(["a", "b", "c"]):
            pass
    bank.max_bytes = size
    with pytest.raises(UserError, match=r"bank: 'big' and a batch's operands take"):
        bank.add("big", small.adapted("lora", rank=7))
    assert "big" not in bank.names
    bank.remove("a")
    assert bank.resident == ["b"]


def test_adapters_of_the_running_batch_stay_on_the_device():
    adapter = small.adapted("milora")
    size = filled("llama", {"one": adapter}).bytes("one")
    bank = filled("llama", {"a": adapter, "b": adapter})
    with bank.batch(["a"]) as batch:
        bank.max_bytes = 2 * size + batch.bytes
        bank.add("c", adapter)
        bank.add("d", adapter)
        assert bank.resident == ["a", "d"], "others leave, though they came later"
        bank.max_bytes -= 1
        with pytest.raises(UserError, match=r"bank: 2 adapters and a batch's operands take"):
            bank.add("e", adapter)
        bank.remove("a")
        with pytest.raises(UserError, match=r"bank: 2 adapters and a batch's operands take"):
            bank.add("a", adapter)  # the batch still holds the one of before
    assert bank.names == ["b", "c", "d"] and bank.resident == ["d"]


def test_what_cannot_run_now_is_one_line():
    bank = filled("llama", {"lora": small.adapted("lora")})
    with pytest.raises(UserError, match="bank: a batch has no prompts"), bank.batch([]):
        pass
    with bank.batch(["lora"]):
        with pytest.raises(UserError, match="bank: a batch is running"):
            bank.check(["lora"])
        with pytest.raises(UserError, match="bank: a batch is running"), bank.batch(["lora"]):
            pass
    assert bank.check(["lora"]) == {}


def held(batch):
    """Memory of a batch's operands, but for what lies in its adapters."""
    own = {part.data_ptr() for tenant in batch.tenants.values() for pair in tenant.updates.values() for part in pair}
    linears = (module for module in batch.model.modules() if isinstance(module, GroupedLinear))
    updates = [update for linear in linears for update in linear.updates.values()]
    parts = {part.data_ptr(): part for update in updates for part in (update.a, update.b)}
    return sum(part.numel() * part.element_size() for at, part in parts.items() if at not in own)


@pytest.mark.parametrize(
    "names", [["lora"] * 4 + ["wide"], ["milora"], ["milora", None, "milora"], ["milora", "milora2", "lora"] * 2]
)
@pytest.mark.parametrize("beams", [1, 3])
def test_a_batch_holds_no_more_than_it_declares(names, beams):
    bank = filled("llama", adapters("llama"))
    with torch.no_grad(), bank.batch(names) as batch:
        declared = batch.bytes
        bank.model(input_ids=small.ids(len(names)).repeat_interleave(beams, dim=0))
        assert held(batch) <= declared == batch.bytes


def test_groups_may_be_bounded():
    rows = (1,) * 8 + (2,)
    assert group(rows).owners == (1, 1, 2) and group(rows, 2).owners == (1, 2)
    assert group((None,), 1).owners == ()


@pytest.mark.parametrize(
    ("owners", "size"),
    [
        ([1, 2, 3, 4], 1),
        ([1, 1, 1, 1], 4),
        ([1, 2] * 8, 8),
        ([1] * 57 + [2, 3, 4, 5, 6, 7, 8], 6),
        ([None, 1, None], 1),
    ],
)
def test_rows_are_grouped_by_owner(owners, size):
    found = group(tuple(owners))
    assert len(found.rows) == size * len(found.owners)
    assert sorted(row for row in found.rows if row >= 0) == [row for row, own in enumerate(owners) if own is not None]
    for at, row in enumerate(found.rows):
        assert row == -1 or owners[row] == found.owners[at // size]
    assert group((None,)).owners == ()


def test_what_cannot_be_one_of_many_is_refused():
    bank = filled("llama", {"lora": small.adapted("lora")})
    refused = {
        "dora": "its change of a weight is no product of small factors",
        "moelora": "the experts are chosen token by token",
    }
    for name, why in refused.items():
        with pytest.raises(UserError, match=f"bank: '{name}' cannot be one of many: {why}"):
            bank.add(name, small.adapted(name))
    with pytest.raises(UserError, match="bank: there is an adapter 'lora' already"):
        bank.add("lora", small.adapted("lora"))
    with pytest.raises(UserError, match="bank: unknown value 'lara'; did you mean 'lora'"), bank.batch(["lara"]):
        pass
    with pytest.raises(UserError, match="bank: unknown value 'gone'"):
        bank.remove("gone")
    with pytest.raises(UserError, match="bank: 'other' belongs to another model"):
        bank.add("other", small.adapted("lora", "gemma"))
    with pytest.raises(UserError, match="bank: 'head' trains a part of the model in full"):
        filled("llama_classifier", {"head": small.adapted("lora", "llama_classifier")})


@pytest.mark.parametrize("name", ["lora", "ranks", "exported"])
def test_saved_adapters_are_read_without_their_method(name, tmp_path):
    adapter = mixed_ranks("llama") if name == "ranks" else small.adapted("lora")
    if name == "exported":
        adapter = small.adapted("pissa")
        save_lora(adapter, as_lora(adapter, None)[0], tmp_path)
    else:
        save_load.save(adapter, tmp_path, {})
    bank, ids = Bank(small.model()), small.ids(2)
    bank.load("it", tmp_path)
    assert not bank.check(["it"])
    with torch.no_grad(), bank.batch(["it", "it"]):
        torch.testing.assert_close(bank.model(input_ids=ids).logits, adapter.model(input_ids=ids).logits, **EQUAL)


def test_canaries_prove_what_was_saved(tmp_path):
    bank = Bank(small.model())
    for name in ("lora", "milora", "sora"):
        (tmp_path / name).mkdir()
        adapter = small.adapted(name)
        save_load.save(adapter, tmp_path / name, {})
        bank.add(name, adapter, saved_canary(tmp_path / name, save_load.read_proof(tmp_path / name), small.VOCABULARY))
    assert not bank.check(bank.names)
    bank.tenant("milora").routes.routers[1].projection.weight.data.neg_()
    a, _ = next(iter(bank.tenant("lora").updates.values()))
    a.mul_(3)
    failed = bank.check(bank.names)
    assert sorted(failed) == ["lora", "milora"] and "does not compute what it did" in str(failed["lora"])


def foreign_lora(adapter, folder):
    """A LoRA as the PEFT library writes it: without our proof."""
    save_lora(adapter, as_lora(adapter, None)[0], folder)
    (folder / save_load.PROOF).unlink()


def test_altered_weights_of_an_export_and_numbers_that_are_none_are_refused(tmp_path):
    adapter = small.adapted("lora")
    save_lora(adapter, as_lora(adapter, None)[0], tmp_path)
    tensors = load_file(tmp_path / save_load.WEIGHTS)
    next(iter(tensors.values())).fill_(float("nan"))
    save_file(tensors, tmp_path / save_load.WEIGHTS)
    with pytest.raises(UserError, match="was truncated or altered"):
        Bank(small.model()).load("it", tmp_path)
    (tmp_path / save_load.PROOF).unlink()
    with pytest.raises(UserError, match=r"the factors of '.*' hold NaN or infinity"):
        Bank(small.model()).load("it", tmp_path)


@pytest.mark.parametrize("start", [True, False, "gaussian", "eva", "orthogonal"])
def test_what_the_library_writes_for_a_plain_lora_is_read(start, tmp_path):
    adapter = small.adapted("lora")
    foreign_lora(adapter, tmp_path)
    usual = dict.fromkeys(
        "auto_mapping revision exclude_modules layers_to_transform layers_pattern megatron_config corda_config "
        "trainable_token_indices alora_invocation_tokens layer_replication target_parameters arrow_config".split()
    )
    usual |= dict.fromkeys(["use_rslora", "use_dora", "use_qalora", "lora_bias", "ensure_weight_tying"], False)
    usual |= {"peft_version": "0.21.2", "megatron_core": "megatron.core", "qalora_group_size": 16, "loftq_config": {}}
    usual |= {"init_lora_weights": start, "eva_config": {"rho": 2.0} if start == "eva" else None}
    config = tmp_path / save_load.CONFIG
    config.write_text(json.dumps(usual | json.loads(config.read_text())))
    bank, ids = Bank(small.model()), small.ids(1)
    bank.load("it", tmp_path)
    with torch.no_grad(), bank.batch(["it"]):
        torch.testing.assert_close(bank.model(input_ids=ids).logits, adapter.model(input_ids=ids).logits, **EQUAL)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "has use_dora=True, and a bank takes use_dora=False"),
        ({"bias": "all"}, "has bias=all"),
        ({"modules_to_save": ["score"]}, "has modules_to_save="),
        ({"peft_type": "IA3"}, "has peft_type=IA3"),
        ({"init_lora_weights": "pissa_niter_4"}, "has init_lora_weights=pissa_niter_4, and .* init_lora_weights=True"),
        ({"alora_invocation_tokens": [1, 2]}, r"has alora_invocation_tokens=\[1, 2\], and a bank takes .*=None"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "has layer_replication="),
        ({"arrow_config": {"top_k": 3}}, "has arrow_config="),
        ({"not_known_yet": 0.5}, "has not_known_yet=0.5"),
        ({"lora_alpha": None}, "lora_alpha is null; expected a finite number"),
        ({"lora_alpha": "8"}, "lora_alpha is '8'; expected a finite number"),
    ],
)
def test_other_adapters_of_the_library_are_refused(change, message, tmp_path):
    adapter = small.adapted("lora")
    config = tmp_path / save_load.CONFIG
    foreign_lora(adapter, tmp_path)
    text = config.read_text()
    config.write_text(json.dumps(json.loads(text) | change))
    with pytest.raises(UserError, match=message):
        Bank(small.model()).load("it", tmp_path)
    config.write_text("{")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        Bank(small.model()).load("it", tmp_path)
    config.unlink()
    with pytest.raises(UserError, match="not an adapter folder"):
        Bank(small.model()).load("it", tmp_path)
