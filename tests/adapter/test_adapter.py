"""The adapter core: the equation, where it goes, what trains, merging."""

from functools import partial

import pytest
import small
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lowrank_cli.adapter.adapted_model import inject
from lowrank_cli.adapter.files import save_load
from lowrank_cli.adapter.linear import AdaptedLinear
from lowrank_cli.adapter.low_rank import LowRank
from lowrank_cli.adapter.spans import index
from lowrank_cli.adapter.target_sites import ROLES, find_sites
from lowrank_cli.errors import UserError


def low_rank(inputs=6, outputs=5, rank=3, alpha=4.0, dropout=0.0):
    part = LowRank(inputs, outputs, rank, alpha, dropout)
    nn.init.normal_(part.lora_b)
    return part


def adapted_linear(part, base=None):
    linear = AdaptedLinear(base or nn.Linear(6, 5))
    linear.add("whole", part, None)
    return linear


def test_forward_is_the_equation_with_both_gates():
    part = low_rank()
    linear = adapted_linear(part)
    x = torch.randn(4, 7, 6)
    part.rank_gate = torch.tensor([1.0, 0.0, 0.5])
    part.module_gate = torch.tensor([0.0, 1.0, 2.0, 0.3])
    expected = linear.base(x)
    for row in range(4):
        hidden = part.rank_gate * (x[row] @ part.lora_a.T)
        expected[row] = expected[row] + 4.0 / 3 * part.module_gate[row] * (hidden @ part.lora_b.T)
    torch.testing.assert_close(linear(x), expected)


def test_rank_gates_may_differ_from_row_to_row():
    part = low_rank()
    linear = adapted_linear(part)
    x = torch.randn(3, 7, 6)
    gates = torch.eye(3)
    part.rank_gate = gates
    together = linear(x)
    for row in range(3):
        part.rank_gate = gates[row]
        torch.testing.assert_close(together[row : row + 1], linear(x[row : row + 1]))


def test_module_gate_of_tokens():
    part = low_rank()
    linear = adapted_linear(part)
    x = torch.randn(2, 3, 6)
    part.module_gate = torch.tensor([[1.0, 0.0, 2.0], [0.0, 0.0, 1.0]])
    expected = linear.base(x) + part.module_gate.unsqueeze(-1) * (part.scale * (x @ part.lora_a.T) @ part.lora_b.T)
    torch.testing.assert_close(linear(x), expected)


def test_gradients_equal_those_of_the_plain_formula():
    part, base = low_rank(), nn.Linear(6, 5)
    linear = adapted_linear(part, base)
    x = torch.randn(2, 3, 6, requires_grad=True)
    linear(x).square().sum().backward()
    found = [x.grad, part.lora_a.grad, part.lora_b.grad]
    again = [t.detach().clone().requires_grad_() for t in (x, part.lora_a, part.lora_b)]
    (base(again[0]) + part.scale * (again[0] @ again[1].T) @ again[2].T).square().sum().backward()
    for ours, plain in zip(found, again, strict=True):
        torch.testing.assert_close(ours, plain.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_laid_out_once_for_decoding_follows_every_change(dtype):
    part, base = low_rank(), nn.Linear(6, 5).to(dtype)
    linear = adapted_linear(part, base)
    x = torch.randn(2, 1, 6).to(dtype)

    def check():
        with torch.no_grad():
            found = linear(x)
            kept = part.operands(dtype)
            assert all(one is two for one, two in zip(kept, part.operands(dtype), strict=True))
        expected = base(x).float() + part.scale * (x.float() @ part.lora_a.T) @ part.lora_b.T
        torch.testing.assert_close(found.float(), expected, atol=1e-5 if dtype == torch.float32 else 0.1, rtol=0.01)

    check()
    with torch.no_grad():
        part.lora_b.neg_()
    check()
    part.load_state_dict(low_rank().state_dict())
    check()
    part.lora_a = nn.Parameter(torch.randn(3, 6))
    check()
    part.to(torch.float64).to(torch.float32)
    part.lora_a.data = part.lora_a.data * 2
    check()


def test_dropout_keeps_the_mean_and_is_off_in_evaluation():
    part = low_rank(dropout=0.5)
    x = torch.ones(1, 20000, 6)
    part.eval()
    exact = part.hidden(x, part.lora_a)
    assert torch.equal(exact, part.hidden(x, part.lora_a))
    part.train()
    torch.testing.assert_close(part.hidden(x, part.lora_a).mean(1), exact.mean(1), atol=0.1, rtol=0.05)
    assert not torch.equal(part.hidden(x, part.lora_a), part.hidden(x, part.lora_a))


@pytest.mark.parametrize("family", small.FAMILIES)
def test_every_family_is_adapted_at_every_role_and_unchanged_at_the_start(family):
    bare = small.model(family)
    before = bare(input_ids=small.ids()).logits
    adapter = small.adapted("lora", family, trained=False)
    assert torch.equal(adapter.model(input_ids=small.ids()).logits, before)
    roles = [[site.role for site in adapter.sites.values() if site.layer == layer] for layer in range(2)]
    assert roles == [list(small.ROLES[family])] * 2


@pytest.mark.parametrize("family", small.FAMILIES)
def test_every_role_changes_the_output_and_gets_a_gradient(family):
    adapter = small.adapted("lora", family)
    adapter.model(input_ids=small.ids()).logits.square().sum().backward()
    for key, part in adapter.modules.items():
        assert part.lora_a.grad.abs().sum() > 0, key
        assert part.lora_b.grad.abs().sum() > 0, key


def test_grouped_query_attention_has_narrow_keys_and_values():
    sites = {site.role: site for site in small.adapted().sites.values() if site.layer == 0}
    assert (sites["Q"].out_features, sites["K"].out_features, sites["V"].out_features) == (32, 16, 16)


def test_packed_roles_of_gpt2_update_their_own_span_only():
    adapter = small.adapted("lora", "gpt2", target_modules=["K"])
    linear = adapter.linears["transformer.h.0.attn.c_attn"]
    assert isinstance(linear.base, Conv1D)
    x = torch.randn(2, 3, 32)
    change = linear(x) - linear.base(x)
    assert change[..., 32:64].abs().min() > 0
    assert change[..., :32].abs().max() == 0
    assert change[..., 64:].abs().max() == 0


def test_targets_by_role_name_and_path():
    model = small.model()
    assert {s.role for s in find_sites(model, ["Q", "D"])} == {"Q", "D"}
    named = find_sites(model, ["q_proj", "model.layers.1.mlp.up_proj"])
    assert [(s.layer, s.role) for s in named] == [(0, "Q"), (1, "Q"), (1, "U")]
    assert [s.path for s in find_sites(model, ["lm_head"])] == ["lm_head"]
    assert len(find_sites(model, ["all", "Q", "q_proj"])) == 14
    assert set(ROLES) == {s.role for s in find_sites(model, ["all"])}


def test_a_packed_linear_by_name_is_one_site():
    (first, *_) = find_sites(small.model("gpt2"), ["c_attn"])
    assert (first.out_features, first.span, first.role) == (96, None, None)


@pytest.mark.parametrize(
    ("family", "targets", "message"),
    [
        ("llama", ["v_porj"], "'v_porj'; did you mean 'v_proj'?"),
        ("bert", ["G"], "family 'bert' has no role 'G' (it has Q K V O U D)"),
        ("gpt2", ["c_attn", "Q"], "given both as a whole and by roles"),
        ("roberta", ["classifier.dense"], "no linear of this model is called 'classifier.dense'"),
    ],
)
def test_unknown_targets_are_errors(family, targets, message):
    with pytest.raises(UserError) as error:
        find_sites(small.model(family), targets)
    assert message in str(error.value)


def test_an_unknown_family_without_known_names_takes_linears_but_no_roles():
    model = small.model()
    model.config.model_type = "brandnew"
    for layer in model.model.layers:
        layer.self_attn.mix, layer.mlp.mix = layer.self_attn.o_proj, layer.mlp.down_proj
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            delattr(layer.self_attn, name)
        for name in ("gate_proj", "up_proj", "down_proj"):
            delattr(layer.mlp, name)
    assert len(find_sites(model, ["self_attn.mix"])) == 2
    with pytest.raises(UserError, match="the layers and roles of this 'brandnew' cannot be found from its modules"):
        find_sites(model, ["all"])


def test_rank_above_the_matrix_is_an_error():
    with pytest.raises(UserError, match=r"method.rank: 17 is above the matrix .*k_proj.* \(allowed: 1 to 16\)"):
        small.adapted("lora", rank=17)


def test_a_classification_head_trains_with_the_adapter():
    adapter = small.adapted("lora", "bert")
    assert {"classifier.weight", "classifier.bias"} <= adapter.trained.keys()
    assert not any(site.path == "classifier" for site in adapter.sites.values())


@pytest.mark.parametrize("family", small.FAMILIES)
def test_merge_is_the_same_function_and_unmerge_restores_every_bit(family):
    adapter = small.adapted("lora", family)
    weights = {n: p.clone() for n, p in adapter.model.named_parameters()}
    deltas = {key: part.delta() for key, part in adapter.modules.items()}
    logits = adapter.model(input_ids=small.ids()).logits
    adapter.merge()
    once = {path: linear.weight.clone() for path, linear in adapter.linears.items()}
    adapter.merge()
    for path, linear in adapter.linears.items():
        assert torch.equal(linear.weight, once[path]), "merging twice is merging once"
        before = weights[f"{path}.base.weight"]
        change = linear.weight - before
        change = change.T if isinstance(linear.base, Conv1D) else change
        expected = torch.zeros_like(change)
        for site in adapter.sites.values():
            if site.path == path:
                expected[index(site.span, len(expected))] += deltas[site.key]
        torch.testing.assert_close(change, expected, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(adapter.model(input_ids=small.ids()).logits, logits, atol=1e-5, rtol=1e-4)
    adapter.unmerge()
    for name, parameter in adapter.model.named_parameters():
        assert torch.equal(parameter, weights[name]), name
    assert torch.equal(adapter.model(input_ids=small.ids()).logits, logits)


def test_merge_is_refused_into_a_tied_embedding():
    adapter = small.adapted("lora", "gpt2", target_modules=["lm_head"])
    assert adapter.model.lm_head.weight is adapter.model.transformer.wte.weight
    with pytest.raises(UserError, match="shares its weight with the input embedding"):
        adapter.merge()


@pytest.mark.parametrize("name", ["lora", "milora"])
def test_disabled_is_the_bare_model_and_restores_the_previous_state(name):
    bare = small.model()(input_ids=small.ids()).logits
    adapter = small.adapted(name)
    logits = adapter.model(input_ids=small.ids()).logits
    with adapter.disabled():
        with adapter.disabled():
            pass
        assert torch.equal(adapter.model(input_ids=small.ids()).logits, bare)
    assert torch.equal(adapter.model(input_ids=small.ids()).logits, logits)
    assert not torch.equal(logits, bare)


@pytest.mark.parametrize("name", ["lora", "milora"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_bf16_weights_keep_fp32_masters_and_compute_close_to_fp32(name, family):
    exact = small.adapted(name, family, k=6) if name == "milora" else small.adapted(name, family)
    with torch.no_grad():
        expected = exact.model(input_ids=small.ids()).logits
    model = small.model(family).to(torch.bfloat16)
    settings = {"k": 6} if name == "milora" else {}
    adapter = small.method(name, **settings).adapt(model)
    with torch.no_grad():
        for key, parameter in adapter.trained.items():
            parameter.copy_(exact.trained[key])
        for key, constant in adapter.constants.items():
            constant.copy_(exact.constants[key])
    assert {p.dtype for p in (adapter.trained | adapter.constants).values()} == {torch.float32}
    logits = model(input_ids=small.ids()).logits
    error = (logits.float() - expected).abs().max() / expected.abs().max()
    assert error < 0.05
    logits.float().square().mean().backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in adapter.trained.values())
    assert all(part.lora_b.grad.dtype == torch.float32 for part in adapter.modules.values())


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_autocast_computes_close_to_fp32(family):
    adapter = small.adapted("lora", family)
    expected = adapter.model(input_ids=small.ids()).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = adapter.model(input_ids=small.ids()).logits
    logits.float().square().mean().backward()
    assert (logits.float() - expected).abs().max() / expected.abs().max() < 0.05
    assert all(part.lora_a.grad.dtype == torch.float32 for part in adapter.modules.values())


class Shifted(LowRank):
    """A kind with a tensor and a setting of its own."""

    width: int  #: of the tensor

    def build(self):
        self.shift = nn.Parameter(self.lora_a.new_zeros(self.width))

    def tensors(self):
        return super().tensors() | {"shift": self.shift}


def injected(**settings):
    """Query modules of the kind above."""
    model = small.model()
    kind = partial(Shifted, width=2, **settings)
    return inject(model, find_sites(model, ["Q"]), rank=2, alpha=8, dropout=0.0, kind=kind)


def test_a_kind_adds_tensors_and_settings_without_a_constructor():
    adapter = injected()
    adapter.require_declared()
    assert [parameter.shape for name, parameter in adapter.trained.items() if name.endswith(".shift")] == [(2,)] * 2


def test_a_fixed_tensor_is_saved_and_never_trained():
    adapter = injected(fixed=["shift"])
    adapter.require_declared()
    assert not any(name.endswith("shift") for name in adapter.trained)
    saved = save_load.tensors(adapter)
    assert sum(name.endswith("shift") for name in saved) == 2
    other = injected(fixed=["shift"])
    for name, tensor in saved.items():
        saved[name] = tensor + 1
    save_load.assign(other, saved, "here")
    assert all(part.shift.tolist() == [1, 1] and not part.shift.requires_grad for part in other.modules.values())


def test_what_is_left_out_of_training_by_another_way_is_an_error_that_says_how():
    adapter, undeclared = injected(), injected()
    for part in adapter.modules.values():
        part.shift.requires_grad_(False)
    with pytest.raises(AssertionError, match=r"shift' .* takes no gradient; .* the kind's setting ``fixed``"):
        save_load.tensors(adapter)
    for key in undeclared.modules:
        del undeclared.trained[f"{key}.shift"]
    with pytest.raises(
        AssertionError, match=r"Shifted\.shift takes a gradient but is not declared as trained; .*``fixed``"
    ):
        save_load.assign(undeclared, {}, "here")
    with pytest.raises(AssertionError, match=r"Shifted declares no setting 'wide'"):
        injected(wide=3)
    with pytest.raises(AssertionError, match=r"Shifted declares no setting 'training'"):
        injected(training=False)  # an annotation of torch's
    with pytest.raises(AssertionError, match=r"fixed names \['shaft'\], not in tensors\(\)"):
        injected(fixed=["shaft"])


def test_the_rank_sets_the_scale_once():
    adapter = inject(small.model(), find_sites(small.model(), ["Q"]), rank=2, alpha=8, dropout=0.0)
    assert {part.scale for part in adapter.modules.values()} == {4.0}


def test_a_head_is_never_a_site_also_when_its_linears_are_named_like_others():
    paths = [site.path for site in find_sites(small.model("roberta"), ["dense"])]
    assert paths
    assert not any(path.startswith("classifier") for path in paths)
