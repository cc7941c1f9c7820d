"""Adapters on disk: exactly the same function after loading, or an error."""

import json

import pytest
import small
import torch
from safetensors.torch import load_file, save_file

from lowrank_cli.adapter.files import optimizer_state, save_load
from lowrank_cli.errors import UserError

ABOUT = {"task": "t", "template_hash": "h"}


@pytest.fixture
def saved(tmp_path):
    def save(name="lora", family="llama", **settings):
        adapter = small.adapted(name, family, **settings)
        folder = tmp_path / "adapter"
        folder.mkdir()
        save_load.save(adapter, folder, ABOUT)
        return adapter, folder

    return save


@pytest.mark.parametrize("name", ["lora", "milora", "full"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_loading_gives_the_same_logits(saved, name, family):
    adapter, folder = saved(name, family)
    fresh = small.adapted(name, family, trained=False)
    assert save_load.load(fresh, folder) == ABOUT
    ids = small.ids()
    assert torch.equal(fresh.model(input_ids=ids).logits, adapter.model(input_ids=ids).logits)


@pytest.mark.parametrize("name", ["lora", "milora"])
@pytest.mark.parametrize(("first", "second"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_loading_works_across_precisions(tmp_path, name, first, second):
    adapter, fresh = (small.adapted(name), small.adapted(name, trained=False))
    for one, dtype in ((adapter, first), (fresh, second)):
        one.model.to(getattr(torch, dtype))
        for tensor in (*one.trained.values(), *one.constants.values()):
            tensor.data = tensor.data.float()
    save_load.save(adapter, tmp_path, ABOUT)
    save_load.load(fresh, tmp_path)
    for key, parameter in adapter.trained.items():
        assert torch.equal(parameter, fresh.trained[key])


def test_a_truncated_weights_file_is_refused(saved):
    _, folder = saved()
    path = folder / save_load.WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"adapter_model.safetensors was truncated or altered"):
        save_load.load(small.adapted(trained=False), folder)


def test_one_changed_bit_is_refused(saved):
    _, folder = saved()
    data = bytearray((folder / save_load.WEIGHTS).read_bytes())
    data[-1] ^= 1
    (folder / save_load.WEIGHTS).write_bytes(data)
    with pytest.raises(UserError, match="altered"):
        save_load.load(small.adapted(trained=False), folder)


@pytest.mark.parametrize("name", [save_load.WEIGHTS, save_load.CANARY, save_load.PROOF])
def test_a_missing_file_is_refused(saved, name):
    _, folder = saved()
    (folder / name).unlink()
    with pytest.raises(UserError, match=rf"{name}.* is missing"):
        save_load.load(small.adapted(trained=False), folder)


def test_a_file_outside_the_folder_is_refused(saved):
    _, folder = saved()
    proof = json.loads((folder / save_load.PROOF).read_text())
    proof["files"]["../elsewhere"] = "0"
    (folder / save_load.PROOF).write_text(json.dumps(proof))
    with pytest.raises(UserError, match=r"a key of files is '../elsewhere'; expected a plain name"):
        save_load.load(small.adapted(trained=False), folder)


@pytest.mark.parametrize("damage", ["{", '{"format": 1, "files": {}}', "[]"])
def test_a_damaged_proof_is_refused(saved, damage):
    _, folder = saved()
    (folder / save_load.PROOF).write_text(damage)
    with pytest.raises(UserError, match=r"lrk.json.*(cannot be read|is missing|it is \[\])"):
        save_load.load(small.adapted(trained=False), folder)


def test_another_model_is_refused(saved):
    _, folder = saved()
    other = small.model()
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    with pytest.raises(UserError, match="belongs to another model"):
        save_load.load(small.method("lora").adapt(other), folder)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("lora", {"rank": 5}, r"lora_A.weight' is \(4, 32\), but this method makes it \(5, 32\)"),
        ("lora", {"target_modules": ["Q"]}, "which this method does not make"),
        ("milora", {}, "lacks '.*prompt_router.*"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(saved, name, settings, message):
    _, folder = saved()
    with pytest.raises(UserError, match=message):
        save_load.load(small.adapted(name, trained=False, **settings), folder)


def test_the_canary_notices_a_different_computation(saved):
    """The files are whole and fit, but the method computes something else (another scale)."""
    _, folder = saved(alpha=8)
    with pytest.raises(UserError, match="does not compute what it did when it was saved"):
        save_load.load(small.adapted(trained=False, alpha=16), folder)


def test_moments_survive_the_round_trip(tmp_path):
    def optimizer():
        torch.manual_seed(0)
        parameters = [torch.nn.Parameter(torch.randn(3, 2)), torch.nn.Parameter(torch.randn(4))]
        return parameters, torch.optim.AdamW(parameters, lr=0.1)

    def step(parameters, optimizer):
        for parameter in parameters:
            parameter.grad = parameter.detach().sin()
        optimizer.step()

    parameters, one = optimizer()
    step(parameters, one)
    save_file(optimizer_state.moments(one), tmp_path / "moments.safetensors")
    others, two = optimizer()
    with torch.no_grad():
        for mine, theirs in zip(others, parameters, strict=True):
            mine.copy_(theirs)
    optimizer_state.load_moments(two, load_file(tmp_path / "moments.safetensors"), "moments")
    step(parameters, one)
    step(others, two)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(others, parameters, strict=True))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_the_peft_library_loads_lora_with_equal_logits(saved, family):
    peft = pytest.importorskip("peft")
    adapter, folder = saved("lora", family)
    model = peft.PeftModel.from_pretrained(small.model(family), folder).eval()
    ids = small.ids()
    torch.testing.assert_close(model(input_ids=ids).logits, adapter.model(input_ids=ids).logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "family"), [("milora", "llama"), ("lora", "gpt2"), ("pissa", "llama"), ("full", "llama")]
)
def test_what_peft_would_compute_differently_has_no_peft_config(saved, name, family):
    _, folder = saved(name, family)
    assert not (folder / save_load.CONFIG).exists()


def test_a_sharded_checkpoint_is_the_same_model(saved, tmp_path):
    """An adapter of the whole checkpoint fits the sharded one; pretrained weights are named by their content."""
    adapter, folder = saved()
    small.model().save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    fresh = small.method("lora").adapt(type(small.model()).from_pretrained(tmp_path / "shards").eval())
    save_load.load(fresh, folder)
    assert torch.equal(fresh.model(input_ids=small.ids()).logits, adapter.model(input_ids=small.ids()).logits)
