"""Our own kernels for CPUs compute what torch does, and a model with them what it computes without."""

from __future__ import annotations

import tempfile
from functools import partial

import pytest
import small
import torch
from torch.nn import functional as F
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lowrank_cli.adapter.kv_cache import pass_cache
from lowrank_cli.adapter.spans import Span, index
from lowrank_cli.adapter.tenants.bank import Bank
from lowrank_cli.adapter.tenants.row_updates import RowUpdates
from lowrank_cli.models.decode_attention import MARK, attention
from lowrank_cli.models.prepack import multiplier, prepack
from lowrank_cli.native import kernels as native
from lowrank_cli.native.kernels import Kernels, RowUpdate, kernels, kernels_for, pack
from lowrank_cli.runs import Run

pytestmark = pytest.mark.skipif(kernels() is None, reason="needs Linux, AVX-512 and a C compiler")
EQUAL = {"atol": 2e-5, "rtol": 2e-5}


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 7, 5), (8, 64, 96), (15, 40, 33), (4, 1, 32)])
def test_linears(threads, rows, inputs, outputs):
    x, weight, bias = torch.randn(2, rows, inputs), torch.randn(outputs, inputs), torch.randn(outputs)
    for of in (None, bias):
        y = kernels().linear(x, *pack(weight, of), outputs)
        torch.testing.assert_close(y, F.linear(x, weight, of), **EQUAL)
    x = x.transpose(0, 1)  # not contiguous
    torch.testing.assert_close(kernels().linear(x, *pack(weight, None), outputs), F.linear(x, weight), **EQUAL)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("span", [None, Span(2, 9)])
@pytest.mark.parametrize("tokens", [1, 3])
def test_updates_of_rows(threads, tokens, span, dtype):
    width = 11 if span is None else 7
    made = [
        RowUpdate(torch.randn(rank, 6), torch.randn(rank, width), row, gate)
        for row, rank, gate in ((3, 8, 1.0), (0, 3, 0.5), (1, 19, 1.0))
    ]
    x, wide = torch.randn(4, tokens, 6).to(dtype), torch.randn(4, tokens, 30).to(dtype)
    y = wide[..., 5:16] if span is None else wide[..., 5:16].clone()
    expected = y.clone()
    for a, b, row, gate in made:
        expected[row, :, index(span, 11)] += (gate * (x[row].float() @ a.t()) @ b).to(dtype)
    before = wide.clone()
    RowUpdates(kernels(), made, span, 4).add_to(y, x)
    torch.testing.assert_close(y, expected, **(EQUAL if dtype == torch.float32 else {"atol": 0.2, "rtol": 0.02}))
    assert torch.equal(wide[..., :5], before[..., :5]) and torch.equal(wide[..., 16:], before[..., 16:])


def test_updates_of_single_tokens_in_any_layout():
    update, x = RowUpdate(torch.randn(2, 6), torch.randn(2, 4), 1), torch.randn(3, 1, 6)
    y = torch.zeros(3, 4, 1).mT  # (B, T, O) whose stride of T, unused, is 1
    RowUpdates(kernels(), [update], None, 3).add_to(y, x)
    torch.testing.assert_close(y[1], x[1] @ update.a.t() @ update.b, **EQUAL)
    assert not y[0].any() and not y[2].any()


@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(6, 2, 64), (4, 4, 16), (3, 1, 80)])
def test_attention_of_one_token(threads, heads, kv_heads, width):
    q, storage = torch.randn(3, heads, 1, width), torch.randn(2, 5, kv_heads, 40, width)
    keys, values = storage[0, :3, :, 4:33], storage[1, :3, :, 4:33]
    seen = torch.ones(3, 1, 1, 29, dtype=torch.bool)
    seen[1, ..., :28], seen[2] = False, False  # the third row sees nothing
    for mask in (None, seen, seen[:1]):
        expected = F.scaled_dot_product_attention(q, keys, values, mask, scale=0.3, enable_gqa=True).transpose(1, 2)
        torch.testing.assert_close(kernels().attend(q, keys, values, mask, 0.3), expected, **EQUAL)


@pytest.mark.parametrize(
    ("rows", "options"),
    [(3, {}), (1, {}), (3, {"dropout": 1.0}), (3, {"position_bias": torch.randn(1, 4, 1, 7)})],
    ids=["plain", "one query for all rows", "dropout", "position bias"],
)
def test_attention_is_that_of_transformers(rows, options, monkeypatch):
    attended, attend = [], Kernels.attend
    monkeypatch.setattr(Kernels, "attend", lambda *args: attended.append(args) or attend(*args))
    marked = torch.nn.Module()
    setattr(marked, MARK, True)
    q, (keys, values) = torch.randn(rows, 4, 1, 16), torch.randn(2, 3, 4, 7, 16)
    with torch.no_grad():
        found, expected, plain = (
            compute(module, q, keys, values, None, **options)[0]
            for compute, module in (
                (partial(attention, sdpa_attention_forward), marked),
                (sdpa_attention_forward, marked),
                (partial(attention, sdpa_attention_forward), torch.nn.Module()),
            )
        )
    torch.testing.assert_close(found, expected, **EQUAL)
    assert torch.equal(plain, expected)
    assert len(attended) == (rows == 3 and not options)


def compiler(folder, script):
    """A folder with a C compiler that does what ``script`` says."""
    (folder / "cc").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "cc").chmod(0o755)
    return str(folder)


@pytest.mark.parametrize("script", ["exit 1", "exit 0", "exec sleep 60"])
def test_no_kernels_with_a_compiler_that_fails(script, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", compiler(tmp_path, script), prepend=":")
    monkeypatch.setattr(native, "COMPILE_SECONDS", 0.5)
    assert kernels.__wrapped__() is None


def test_no_kernels_without_a_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    assert kernels.__wrapped__() is None


@pytest.fixture
def everywhere(monkeypatch):
    """Small models use the kernels too."""
    monkeypatch.setattr(native, "LEAST_BYTES", 0)


def test_kernels_suit_large_models_in_fp32(everywhere, monkeypatch):
    assert kernels_for(small.model()) is kernels() and kernels_for(small.model().bfloat16()) is None
    monkeypatch.setattr(native, "LEAST_BYTES", 1e9)
    assert kernels_for(small.model()) is None


def llama():
    torch.manual_seed(7)
    return LlamaForCausalLM(LlamaConfig(**small.GATED, head_dim=16)).eval().requires_grad_(False)


def opt():
    return small.model("opt").requires_grad_(False)


@pytest.mark.parametrize(("make", "steps"), [(llama, 5), (opt, 0), (small.sparse, 0)])
def test_a_model_generates_the_same(make, steps, everywhere, monkeypatch):
    attended, attend = [], Kernels.attend
    monkeypatch.setattr(Kernels, "attend", lambda *args: attended.append(args) or attend(*args))
    found, ids = [], small.ids(3)
    mask = torch.ones_like(ids)
    mask[2, :2] = 0
    for packed in (False, True):
        model = make()
        if packed:
            prepack(model)
        found.append(small.generated_logits(model, ids, attention_mask=mask))
        assert multiplier(model) == ("our kernels" if packed else None)
    torch.testing.assert_close(found[1], found[0], **EQUAL)
    assert len(attended) == 2 * steps, "by the packed model's 2 layers; the heads of the other models do not fit"


@pytest.mark.parametrize("names", [["lora", None, "alora", "lora"], ["milora", "lora", "milora", None]])
def test_rows_of_a_bank_are_computed_as_by_torch(names, everywhere):
    adapters, logits, ids = {name: small.adapted(name) for name in {*names} - {None}}, [], small.ids(4)
    for grouped in ("torch", None):
        model = small.model()
        bank = Bank(model, grouped=grouped)
        assert bank.grouped == (grouped or "our kernels")
        for name, adapter in adapters.items():
            bank.add(name, adapter)
        cache = DynamicCache()
        with torch.no_grad(), bank.batch(names) as batch:
            assert (batch.bytes > 0) == (grouped == "torch"), "the kernels read the adapters' own factors"
            passes = [model(input_ids=part, **pass_cache(model, cache)) for part in (ids, ids[:, :1])]
            logits.append(torch.cat([one.logits for one in passes], dim=1))  # (B, T + 1, V)
    torch.testing.assert_close(logits[1], logits[0], **EQUAL)


@pytest.mark.parametrize("grouped", ["null", "torch"])
def test_a_benchmark_says_what_computes_its_adapters(grouped, everywhere, lrk, monkeypatch):
    added, add = [], Kernels.add_updates
    monkeypatch.setattr(Kernels, "add_updates", lambda *args: added.append(args) or add(*args))
    quick = ("bench.rounds=1", "bench.tenants=2", "bench.prompt_length=5", "bench.new_tokens=2")
    shape = "model.shape=2x32x48x4"
    ended = lrk("bench", "prepack", "hardware.threads=1", f"hardware.grouped={grouped}", shape, *quick)
    assert ended.code == 0, ended
    expected = "our kernels" if grouped == "null" else "torch"
    assert Run.open("outputs/latest").read_json("bench.json")["grouped"] == expected
    assert bool(added) == (grouped == "null")
