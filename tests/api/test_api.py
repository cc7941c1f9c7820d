"""The public API, on small random models: every method in a plain loop, and what a user can get wrong."""

import json
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import small
import torch
from command import lrk  # noqa: F401 (a fixture)
from transformers import AutoModelForCausalLM, AutoTokenizer

import lowrank_cli as api
from lowrank_cli import methods
from lowrank_cli.api.batches import prompt_mask
from lowrank_cli.methods.protocol import AddsLoss, BeforeStep, Step
from lowrank_cli.tasks.encode import Encoded, collate_causal

ROOT = Path(__file__).parents[2]
BUNDLED = ROOT / "lowrank_cli" / "assets" / "tiny_llama"
MERGEABLE = [name for name in small.TRAINABLE if "export" in methods.capabilities(name)]
#: Schedules that do all they can within a few steps.
QUICK = {
    "first_epochs": 0.1,
    "round_epochs": 0.2,
    "dev_batch": 4,
    "phase": 1,
    "explore": 0.8,
    "interval": 1,
    "probe": 1,
}
DERIVED = ("name", "ranks", "layers", "chosen_by")  #: what no user gives
STEPS = 5


def settings(name: str, **more) -> dict:
    """What :func:`small.config` makes of a method's YAML, as a user of the API gives it."""
    values = {key: value for key, value in asdict(small.config(name)).items() if key not in DERIVED}
    return values | {key: value for key, value in QUICK.items() if key in values} | more


def batch(rows: int = 4, seed: int = 1) -> dict[str, torch.Tensor]:
    """Prompts of 3 tokens with answers of 1 to 6, padded on the right; every answer token is the same."""
    generator = torch.Generator().manual_seed(seed)
    encoded = []
    for row in range(rows):
        prompt = torch.randint(3, small.VOCABULARY, (3,), generator=generator).tolist()
        encoded.append(Encoded(prompt + [7] * (1 + row % 6), 3))
    made = collate_causal(encoded, 0)
    del made["prompt_mask"]
    return made


def adapter_of(name: str, family: str = "llama", **more) -> api.Adapter:
    torch.manual_seed(3)
    return api.adapt(small.model(family), name, **settings(name, **more))


def train(adapter: api.Adapter, steps: int = STEPS, rate: float = 1e-2) -> list[float]:
    """A plain loop over one batch; the losses."""
    model, rows, losses = adapter.model, batch(), []
    optimizer = torch.optim.AdamW(adapter.parameter_groups(rate), weight_decay=0.0)
    model.train()
    with adapter.training(optimizer, steps=steps, train=[rows], dev=[batch(3, 2), batch(2, 3)], steps_per_epoch=steps):
        for _ in range(steps):
            loss = model(**rows).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    model.eval()
    return losses


@torch.no_grad()
def logits(model, rows: int = 3) -> torch.Tensor:
    return model.eval()(input_ids=small.ids(rows)).logits


@pytest.mark.parametrize("name", small.TRAINABLE)
def test_every_method_trains_in_a_plain_loop_and_is_saved_and_loaded(name, tmp_path):
    adapter = adapter_of(name)
    bare = small.model()
    assert torch.equal(logits(adapter.model), logits(bare))
    with torch.no_grad():
        before = adapter.model(**batch()).loss.item()
    train(adapter)
    with torch.no_grad():
        assert adapter.model(**batch()).loss.item() < before
    trained = logits(adapter.model)
    adapter.save(tmp_path / "folder")
    again = api.load(small.model(), tmp_path / "folder")
    assert again.config == adapter.config and again.ranks() == adapter.ranks()
    torch.testing.assert_close(logits(again.model), trained, rtol=0, atol=1e-5)
    if name == "full":
        with pytest.raises(api.UserError, match=r"no bare model"):
            adapter.disabled()
    else:
        with adapter.disabled():
            torch.testing.assert_close(logits(adapter.model), logits(bare), rtol=0, atol=1e-5)
        assert torch.equal(logits(adapter.model), trained)


@pytest.mark.parametrize("name", MERGEABLE)
def test_merged_is_unmerged(name):
    adapter = adapter_of(name)
    train(adapter)
    before = logits(adapter.model)
    adapter.merge()
    torch.testing.assert_close(logits(adapter.model), before, rtol=1e-4, atol=1e-5)
    adapter.unmerge()
    assert torch.equal(logits(adapter.model), before)


def test_a_classifier_trains_its_head_too(tmp_path):
    adapter = adapter_of("lora", "bert")
    rows = {"input_ids": small.ids(4), "labels": torch.tensor([0, 1, 2, 1])}
    optimizer = torch.optim.SGD(adapter.parameter_groups(0.1))
    with adapter.training(optimizer, steps=3):
        for _ in range(3):
            adapter.model(**rows).loss.backward()
            optimizer.step()
    before, trained = logits(small.model("bert")), logits(adapter.model)
    assert not torch.equal(trained, before)
    adapter.save(tmp_path / "folder")
    fresh = small.model("bert")
    torch.nn.init.normal_(fresh.classifier.weight)  # as a checkpoint without a head is loaded
    assert torch.equal(logits(api.load(fresh, tmp_path / "folder").model), trained)


def test_ranks_move_and_are_reported():
    adapter = adapter_of("alora")
    before = adapter.ranks()
    train(adapter)
    assert adapter.ranks() != before and sum(adapter.ranks().values()) == sum(before.values())
    rounds = [row for row in adapter.history if "round" in row]
    assert rounds[-1]["ranks"] == adapter.ranks() and rounds[0]["step"] >= 1


@pytest.mark.parametrize("name", ["milora", "moelora", "adalora"])
def test_the_loss_includes_the_methods_own_term(name):
    adapter = adapter_of(name)
    rows = batch()
    optimizer = torch.optim.AdamW(adapter.parameter_groups(1e-3))
    adapter.model.train()
    with adapter.training(optimizer, steps=1, train=[rows], dev=[rows]):
        loss = adapter.model(**rows).loss
        extra = adapter.extra_loss()
        assert extra > 0
        with torch.no_grad():
            torch.testing.assert_close(loss - extra, adapter.model(**rows).loss)
        half = torch.tensor(2) * (rows["labels"][:, 1:] != -100).sum()  # as Trainer asks in one of two batches
        torch.testing.assert_close(adapter.model(**rows, num_items_in_batch=half).loss, loss / 2)
        loss.backward()
        optimizer.step()
        adapter.model(input_ids=rows["input_ids"]).logits.sum().backward()
        with pytest.raises(api.UserError, match=f"the loss lacks {name}'s own term"):
            optimizer.step()


def test_prompts_are_what_comes_before_the_answer():
    encoded = [Encoded([5, 6, 7, 8], 3), Encoded([5, 6], 1)]
    made = collate_causal(encoded, 0)
    assert torch.equal(prompt_mask(made["labels"], made["attention_mask"]), made["prompt_mask"].bool())
    turns = torch.tensor([[-100, -100, 4, -100, -100, 5]])  # what follows an answer is no prompt
    assert prompt_mask(turns, None).tolist() == [[True, True, False, False, False, False]]
    with pytest.raises(api.UserError, match="a row has no prompt"):
        prompt_mask(torch.tensor([[3, 4], [-100, 4]]), None)


def test_labels_route_as_a_prompt_mask_does():
    adapter, rows = adapter_of("milora"), batch()
    train(adapter, rate=0.1)
    inputs = {key: value for key, value in rows.items() if key != "labels"}
    mask = prompt_mask(rows["labels"], rows["attention_mask"])
    with torch.no_grad():
        by_labels = adapter.model(**rows).logits
        assert torch.equal(adapter.model(**inputs, prompt_mask=mask).logits, by_labels)
        assert not torch.equal(adapter.model(**inputs).logits, by_labels)


def test_a_banks_rows_are_each_as_alone(tmp_path):
    for name in ("lora", "milora", "pissa"):
        adapter = adapter_of(name)
        train(adapter, rate=0.05)
        adapter.save(tmp_path / name)
    bank = api.Bank(small.model())
    for name in ("lora", "milora", "pissa"):
        bank.add(name, tmp_path / name)
    bank.add("again", adapter)
    names = ["milora", None, "pissa", "lora", "again"]
    with bank.rows(names):
        together = logits(bank.model, len(names))
    for row, name in enumerate(names):
        model = (
            small.model() if name is None else api.load(small.model(), tmp_path / name.replace("again", "pissa")).model
        )
        alone = logits(model, len(names))[row]
        torch.testing.assert_close(together[row], alone, rtol=1e-4, atol=1e-5)
    assert torch.equal(logits(bank.model), logits(small.model()))
    bank.remove("again")
    assert bank.names == ["lora", "milora", "pissa"]


def test_a_bank_refuses_what_does_not_belong_and_stays_as_it_was(tmp_path):
    adapter = adapter_of("lora")
    adapter.save(tmp_path / "lora")
    adapter_of("dora").save(tmp_path / "dora")
    weights = tmp_path / "lora" / "adapter_model.safetensors"
    with pytest.raises(api.UserError, match="it is adapted already"):
        api.Bank(adapter.model)
    bank = api.Bank(small.model())
    with pytest.raises(api.UserError, match="use_dora"):
        bank.add("d", tmp_path / "dora")
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(api.UserError, match="truncated or altered"):
        bank.add("a", tmp_path / "lora")
    with pytest.raises(api.UserError, match="bank: unknown value 'a'"), bank.rows(["a"]):
        pass
    assert bank.names == []


def test_runs_load_from_python_and_saved_folders_serve_the_command_line(lrk):  # noqa: F811
    quick = ["hardware.threads=1", "task=tiny_sentiment", "task.limit=8"]
    ended = lrk("train", "method=milora", "train.max_steps=2", "train.batch_size=4", "train.eval_every=2", *quick)
    assert ended.code == 0, ended
    model = AutoModelForCausalLM.from_pretrained(BUNDLED)
    adapter = api.load(model, "outputs/latest")
    assert adapter.config.name == "milora" and adapter.config.rank == 8
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    adapter.save("mine")
    tokenizer, prompt = AutoTokenizer.from_pretrained(BUNDLED), "the zorp is red."
    Path("prompts.jsonl").write_text(json.dumps({"tenant": "mine", "prompt": prompt}) + "\n")
    ended = lrk("generate", "--tenants", "prompts.jsonl", "generate.max_new_tokens=6", "hardware.threads=1")
    assert ended.code == 0, ended
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    made = model.eval().generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    assert json.loads(ended.out)["answer"] == tokenizer.decode(made, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("milroa", {}, "method: unknown value 'milroa'; did you mean 'milora'?"),
        ("idaicl", {}, "method: unknown value 'idaicl' "),
        ("lora", {"rnak": 4}, "method.rnak: unknown key; did you mean 'rank'? (lora has: rank, alpha, "),
        ("lora", {"name": "dora"}, "method.name: unknown key"),
        ("lora", {"rank": "4"}, "adapt: method.rank is '4'; expected a whole number"),
        ("lora", {"rank": 0}, "adapt: method.rank: 0 is out of range (allowed: at least 1)"),
        ("lora", {"rank": 17}, "method.rank: 17 is above the matrix "),
        ("lora", {"target_modules": "Q"}, "adapt: method.target_modules is 'Q'; expected a list"),
        ("lora", {"target_modules": ["v_porj"]}, "is called 'v_porj'; did you mean 'v_proj'?"),
        ("milora", {"rank": 4, "target_modules": ("lm_head",), "k": 1}, "has no role in a layer"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_the_model_alone(name, given, message):
    model = small.model()
    before, keys = logits(model), list(model.state_dict())
    with pytest.raises(api.UserError) as raised:
        api.adapt(model, name, **given)
    assert message in str(raised.value) and "\n" not in str(raised.value)
    assert list(model.state_dict()) == keys and torch.equal(logits(model), before)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_models_that_cannot_be_adapted_are_refused():
    model = adapter_of("lora").model
    for wrong, message in [
        (model, "it is adapted already"),
        (torch.nn.Linear(2, 2), "Linear is no PreTrainedModel"),
        (small.model().model, "LlamaModel gives no logits"),
        (small.model().half(), "its weights are float16 (allowed: float32, bfloat16)"),
    ]:
        with pytest.raises(api.UserError, match=re.escape(message)):
            api.adapt(wrong, "lora", rank=4)


def test_a_folder_of_another_model_or_altered_is_refused(tmp_path):
    adapter_of("lora").save(tmp_path / "folder")
    torch.manual_seed(8)
    other = small.FAMILIES["llama"]()
    with pytest.raises(api.UserError, match="belongs to another model"):
        api.load(other, tmp_path / "folder")
    api.adapt(other, "lora", rank=4)  # it was left bare
    (tmp_path / "folder" / "canary.safetensors").unlink()
    with pytest.raises(api.UserError, match=r"canary\.safetensors is missing"):
        api.load(small.model(), tmp_path / "folder")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "does not say which method made the adapter"),
        (3, "about: method_config is 3; expected keys with values"),
        ({}, "about: method.name: unknown value 'None'"),
        ({"name": ["lora"]}, "about: method.name: unknown value"),
        ({"name": "lora"}, "about: method.rank is missing"),
        ({"name": "lora", "rank": 10**9}, "about: method.alpha is missing"),
        ({"name": "lora", "rnak": 4}, "about: method: unknown value 'rnak'; did you mean 'rank'?"),
    ],
)
def test_what_a_folder_says_of_its_method_is_checked(config, message, tmp_path):
    adapter_of("lora").save(tmp_path / "folder")
    proof = json.loads((tmp_path / "folder" / "lrk.json").read_text())
    proof["about"] = {} if config is None else {"method_config": config}
    (tmp_path / "folder" / "lrk.json").write_text(json.dumps(proof))
    with pytest.raises(api.UserError, match=re.escape(message)):
        api.load(small.model(), tmp_path / "folder")


def test_saving_replaces_an_adapter_and_nothing_else(tmp_path):
    adapter = adapter_of("lora")
    adapter.save(tmp_path / "folder")
    train(adapter)
    adapter.save(tmp_path / "folder")
    assert torch.equal(logits(api.load(small.model(), tmp_path / "folder").model), logits(adapter.model))
    (tmp_path / "folder" / "notes.txt").write_text("mine")
    with pytest.raises(api.UserError, match="holds other files"):
        adapter.save(tmp_path / "folder")
    with adapter.disabled(), pytest.raises(api.UserError, match="switched off"):
        adapter.save(tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_training_that_a_method_would_miss_is_refused():
    adapter, rows = adapter_of("milora", router_learning_rate=1e-4), batch()
    groups = adapter.parameter_groups(1e-3)
    assert sorted(group["lr"] for group in groups) == [1e-4, 1e-3]
    with pytest.raises(api.UserError, match="milora takes part in training; put the loop into `with"):
        adapter.model(**rows).loss.backward()
    trained = [parameter for parameter in adapter.model.parameters() if parameter.requires_grad]
    for optimizer, given, message in [
        (torch.optim.AdamW(trained), {}, "which milora steps itself; make it of adapter.parameter_groups"),
        (torch.optim.AdamW(groups[:1]), {}, "it lacks "),
        (torch.optim.AdamW(adapter.parameters()), {}, "has the learning rate 0.001, milora says 0.0001"),
        (torch.optim.AdamW(groups), {"dev": []}, "dev: missing; milora steps its activations"),
        (torch.optim.AdamW(groups), {"train": []}, "train: missing; milora reads training prompts"),
        (
            torch.optim.AdamW(groups),
            {"train": [batch(1)]},
            "all training prompts that the routers read (1) are alike",
        ),
        (torch.optim.AdamW(groups), {"steps": 0}, "steps: 0 is out of range"),
        (torch.optim.AdamW(groups), {}, "no step was taken with this optimizer"),
        (torch.optim.AdamW(groups), {"dev": [{"input_ids": rows["input_ids"]}]}, "it needs input_ids and labels"),
    ]:
        arguments = {"steps": 3, "train": [rows], "dev": [rows]} | given
        with pytest.raises(api.UserError, match=re.escape(message)), adapter.training(optimizer, **arguments):
            pass
    adapter = adapter_of("alora")
    optimizer = torch.optim.SGD(adapter.parameter_groups(1e-3))
    with (
        pytest.raises(api.UserError, match="SGD does not go with alora"),
        adapter.training(optimizer, steps=3, train=[rows], dev=[rows]),
    ):
        pass


def test_a_method_that_did_not_finish_says_so():
    adapter, rows = adapter_of("adalora"), batch()
    optimizer = torch.optim.AdamW(adapter.parameter_groups(1e-3))
    with (
        pytest.warns(UserWarning, match="adalora: 1 of 9 steps were taken; more ranks than the budget"),
        adapter.training(optimizer, steps=9),
    ):
        adapter.model(**rows).loss.backward()
        optimizer.step()


@pytest.mark.parametrize("name", ["sora", "adalora"])
def test_the_method_acts_as_in_the_training_stage(name):
    adapter, rows = adapter_of(name), batch()
    losses = train(adapter, rate=1e-2)
    method, own = methods.create(adapter.config), []
    torch.manual_seed(3)
    core = method.adapt(small.model())
    optimizer = torch.optim.AdamW(core.trained.values(), lr=1e-2, weight_decay=0.0)
    for number in range(1, STEPS + 1):
        loss = core.model(**rows).loss
        if isinstance(method, AddsLoss):
            loss = loss + method.extra_loss(core)
        own.append(loss.item())
        loss.backward()
        del loss  # its graph would hold the tensors to the shapes that they have now
        step = Step(number, STEPS, core, 1e-2, None, None, optimizer=optimizer)
        if isinstance(method, BeforeStep):
            method.before_step(step)
        optimizer.step()
        core.model.zero_grad()
        method.after_step(step)
    assert own == losses
    assert core.ranks() == adapter.ranks() != adapter_of(name).ranks()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")
@pytest.mark.parametrize("name", ["milora", "alora"])
def test_trainer_trains_with_the_callback(name):
    from transformers import Trainer, TrainingArguments

    adapter, rows = adapter_of(name), batch(16)
    with torch.no_grad():
        before = adapter.model(**rows).loss.item()
    data = [{key: value[row] for key, value in rows.items()} for row in range(16)]
    options = {"num_train_epochs": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    quiet = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    arguments = TrainingArguments("trainer", **options, **quiet, learning_rate=1e-2)
    callback = adapter.callback(dev=[batch(3, 2)])
    if name == "milora":
        with pytest.raises(api.UserError, match="which milora steps itself"):
            Trainer(adapter.model, arguments, train_dataset=data, callbacks=[callback]).train()
        optimizers = torch.optim.AdamW(adapter.parameter_groups(1e-2)), None
    else:
        optimizers = None, None
    Trainer(adapter.model, arguments, train_dataset=data, callbacks=[callback], optimizers=optimizers).train()
    with torch.no_grad():
        assert adapter.model.eval()(**rows).loss.item() < before
    assert name == "milora" or any("round" in row for row in adapter.history)


def test_trainers_copies_on_several_gpus_are_refused():
    with pytest.raises(api.UserError, match="Trainer copies the model to 2 GPUs"):
        adapter_of("lora").callback().on_train_begin(SimpleNamespace(n_gpu=2), None, None)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")
def test_the_page_runs_and_does_what_it_says(capsys):
    page = (ROOT / "docs" / "how-to" / "python.md").read_text()
    exec(compile("\n".join(re.findall(r"```python\n(.*?)```", page, flags=re.S)), "python.md", "exec"), {})
    out = capsys.readouterr().out
    assert out.count("The red box is red") == 2, "by the loaded adapter, and by a row of the bank"
    assert "2 and 2 is 4" in out


def test_the_package_is_light_and_names_what_is_public():
    program = (
        "import sys, lowrank_cli as lrk; assert set(lrk.__all__) <= set(dir(lrk)); print('torch' in sys.modules);"
        "print(lrk.adapt.__module__, all(getattr(lrk, name).__doc__ for name in lrk.__all__)); lrk.nothing"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split() == ["False", "lowrank_cli.api.adapted", "True"]
    assert "AttributeError: module 'lowrank_cli' has no attribute 'nothing'" in done.stderr
