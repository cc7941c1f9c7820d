"""Adapters on encoders of images: sites, scores, the proof, and stock PEFT."""

import image_encoders
import pytest
import small
import torch
from transformers import ViTConfig, ViTForImageClassification

from lowrank_cli.adapter.files import save_load
from lowrank_cli.adapter.files.export import as_lora, loaded_error, lora_error, merge_into_model, save_lora
from lowrank_cli.adapter.image_input import image_shape, image_tokens, input_width
from lowrank_cli.adapter.target_sites import known_sites, structure_of
from lowrank_cli.errors import UserError
from lowrank_cli.scoring.ablation import ablate
from lowrank_cli.scoring.module_scores import score
from lowrank_cli.scoring.probe import Probe

EVERY = pytest.mark.parametrize("kind", image_encoders.KINDS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("encoders")
    return {kind: image_encoders.model(root / kind, kind) for kind in image_encoders.KINDS}


def adapted(folder, method="lora"):
    """An adapter whose updates are not zero."""
    adapter = small.method(method).adapt(image_encoders.loaded(folder))
    torch.manual_seed(3)
    with torch.no_grad():
        for module in adapter.modules.values():
            module.lora_b.normal_(std=0.2)
    return adapter


@EVERY
def test_the_sites_of_the_image_encoder_are_known(kind, folders):
    model = image_encoders.loaded(folders[kind])
    assert "".join(site.role for site in known_sites(model) if site.layer == 1) == "QKVOUD"
    assert structure_of(model).position_wise
    config = model.config.to_dict()
    assert (image_tokens(config), input_width(model)) == (16, 64)


def test_sizes_of_images_that_are_not_square():
    assert image_tokens({"image_size": [32, 48], "patch_size": [8, 16]}) == 12
    model = ViTForImageClassification(ViTConfig(image_size=[32, 48], hidden_size=8, num_attention_heads=2))
    assert image_shape(model) == (3, 32, 48)


@EVERY
def test_exact_scores_with_what_is_reused_equal_those_without(kind, folders):
    adapter, probe = adapted(folders[kind]), Probe(image_encoders.batch(), 48)
    units = [(key, None) for key in adapter.modules]
    fast = ablate(adapter, probe, units)
    object.__setattr__(structure_of(adapter.model), "position_wise", False)
    plain = ablate(adapter, probe, units)
    for one, other in zip((fast.without, fast.alone), (plain.without, plain.alone)):
        assert one == pytest.approx(other, abs=1e-5)
    assert max(plain.without.values()) - min(plain.without.values()) > 1e-4


def test_magnitudes_count_every_patch(folders):
    adapter, batch = adapted(folders["vit"]), image_encoders.batch()
    seen = {}
    path, linear = next(iter(adapter.linears.items()))
    linear.register_forward_hook(lambda module, args, output: seen.setdefault("x", args[0]))
    scores = score("magnitude", adapter, Probe(batch, 10_000), 0)
    x, module = seen["x"].flatten(0, 1), adapter.modules[path]  # (B, T, I) -> (B * T, I)
    update = module.scale * x @ module.lora_a.T @ module.lora_b.T
    ratio = update.norm(dim=1).sum() / (x @ linear.weight.T).norm(dim=1).sum()
    assert scores.values[path] == [pytest.approx(ratio.item(), rel=1e-4)]


@EVERY
def test_what_is_saved_proves_what_it_computes(kind, folders, tmp_path):
    adapter, fresh = adapted(folders[kind]), small.method("lora").adapt(image_encoders.loaded(folders[kind]))
    save_load.save(adapter, tmp_path, {})
    save_load.load(fresh, tmp_path)
    pixels = image_encoders.batch()["pixel_values"]
    with torch.no_grad():
        assert torch.equal(fresh.model(pixel_values=pixels).logits, adapter.model(pixel_values=pixels).logits)
    changed = image_encoders.loaded(folders[kind])
    with torch.no_grad():
        changed.get_submodule(known_sites(changed)[2].path).weight.neg_()
    with pytest.raises(UserError, match="another model"):
        save_load.load(small.method("lora").adapt(changed), tmp_path)
    with torch.no_grad():
        fresh.model.get_submodule(known_sites(changed)[2].path).weight.neg_()
    with pytest.raises(UserError, match="does not compute what it did"):
        save_load.load(fresh, tmp_path)


@EVERY
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing")  # PEFT asks transformers by the old name
def test_stock_peft_computes_the_same(kind, folders, tmp_path):
    from peft import PeftModel

    adapter = adapted(folders[kind], "dora")
    loras, _ = as_lora(adapter, None)
    save_lora(adapter, loras, tmp_path)
    assert lora_error(adapter, loras) < 1e-4
    stock = PeftModel.from_pretrained(image_encoders.loaded(folders[kind]), tmp_path).eval()
    pixels = image_encoders.batch()["pixel_values"]
    with torch.no_grad():
        expected = adapter.model(pixel_values=pixels).logits
        assert torch.allclose(stock(pixel_values=pixels).logits, expected, atol=1e-4)
    ids, logits = save_load.canary(adapter)
    merge_into_model(adapter)
    assert loaded_error(adapter.model, ids, logits) < 1e-5
