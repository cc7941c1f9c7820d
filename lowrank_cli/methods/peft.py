"""Any tuner of the PEFT library that adapts linears, as a baseline: IA³, VeRA, BOFT, LoHa, LoKr, RandLoRA, HRA, ….

The tuner is PEFT's own code, put into the model in place; training, seeds, selection on dev, resuming and comparing are
those of every method. What it trains is saved under the names of its parameters; what it draws at random and keeps is
drawn again from its seed, and the saved adapter's canary proves that it came out the same. It is neither merged nor
scored by rank here.

LoRA's initial values from the weights alone (``init_lora_weights`` olora, loftq, pissa, …) are PEFT's. Those of EVA
(Paischer et al. 2024, arXiv 2410.07170) need a pass over data, see :meth:`Peft.prepare`.
"""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from omegaconf import MISSING

from lowrank_cli.errors import UserError, unknown
from lowrank_cli.methods.protocol import Method, Start
from lowrank_cli.schema import MethodConfig

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from lowrank_cli.adapter.adapted_model import Adapter
    from lowrank_cli.adapter.target_sites import Site

#: Options of PEFT's configurations that follow from the rest of a run's.
DERIVED = ("target_modules", "feedforward_modules", "peft_type", "task_type", "inference_mode", "modules_to_save")
#: Tuners that train vectors alone take about ten times LoRA's learning rate: the papers of (IA)³ and VeRA have 3e-3
#: (Liu et al. 2022, arXiv 2205.05638) and 4e-3 (Kopiczko et al. 2024, arXiv 2310.11454) for models of billions.
SCALES = {"ia3": 10.0, "vera": 10.0}
EVA_PROMPTS = 256  #: training prompts that EVA reads; its paper stops after about as many, when components settle
#: Initial values that need gradients or a second model, which PEFT computes before it wraps a model.
UNSUPPORTED_INITS = ("corda", "lora_ga")
#: Warnings of what the tuners mend themselves: GPT-2's transposed weights, and BOFT without its CUDA extension.
EXPECTED = "fan_in_fan_out is set to False but|Failed to load the CUDA extension|Setting boft_n_butterfly_factor to 1"


@dataclass
class PeftConfig(MethodConfig):
    """A tuner and its options."""

    made_with: ClassVar[tuple[str, ...]] = ("type", "target_modules", "options")
    type: str = MISSING  #: the tuner, by PEFT's name in small letters: ``ia3``, ``vera``, ``boft``, ``loha``, …
    #: ``all``, roles (Q K V O attention; G U D gate, up, down), or names of linears (``q_proj`` or a full path)
    target_modules: list[str] = MISSING
    options: dict[str, Any] = field(default_factory=dict)  #: of PEFT's configuration, such as ``{r: 8}``


class Peft(Method):
    """Trains what a tuner of the PEFT library adds to the model."""

    Config = PeftConfig
    config: PeftConfig
    unmergeable = "the updates of a PEFT tuner are kept apart"
    unprunable = "its tuner is PEFT's, which has no ranks to judge one by one"

    def rate_scale(self) -> float:
        """See :data:`SCALES`."""
        return SCALES.get(self.config.type, 1.0)

    def sites(self, model: PreTrainedModel) -> list[Site]:
        """The target linears. Raises UserError for an unknown tuner, an unknown option or a missing linear."""
        from lowrank_cli.adapter.target_sites import find_sites

        kind, config = self._kind(), self.config
        known = [item.name for item in dataclasses.fields(kind) if item.name not in DERIVED]
        for name in config.options:
            if name not in known:
                raise unknown(f"method.options of method.type={config.type}", name, known)
        return find_sites(model, list(config.target_modules))

    @property
    def _eva(self) -> bool:
        return self.config.options.get("init_lora_weights") == "eva"

    def prepare(self, start: Start) -> None:
        """EVA: set each A to the principal components of its input on training prompts, padding left out.

        All modules keep their rank, as with EVA's ρ = 1.
        """
        if not self._eva:
            return
        from peft.tuners.lora import LoraLayer

        model = start.adapter.model
        layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
        inputs = [_PrincipalInputs(layer.r["default"]) for layer in layers]

        def set_mask(model: Any, args: tuple, kwargs: dict[str, Any]) -> None:
            for components in inputs:
                components.mask = kwargs.get("attention_mask")

        hooks = [model.register_forward_pre_hook(set_mask, with_kwargs=True)]
        hooks += [layer.register_forward_pre_hook(components) for layer, components in zip(layers, inputs)]
        try:
            start.read(EVA_PROMPTS)
        finally:
            for hook in hooks:
                hook.remove()
        for layer, components in zip(layers, inputs):
            matrix: Any = layer.lora_A["default"].weight
            matrix.data.copy_(components.result(matrix.shape))
        start.say(f"EVA: initial values from the inputs of {len(layers)} linears on training prompts")

    def adapt(self, model: PreTrainedModel) -> Adapter:
        """Put the tuner into ``model``; a classification head, if any, trains in full."""
        import torch
        from peft import EvaConfig, LoftQConfig
        from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

        from lowrank_cli.adapter.adapted_model import Adapter, train_heads

        sites, kind = self.sites(model), self._kind()
        options = dict(self.config.options)
        if (init := options.get("init_lora_weights")) in UNSUPPORTED_INITS:
            raise UserError(f"method.options.init_lora_weights: '{init}' needs a preparation that method=peft has not")
        if "eva_config" in options:
            raise UserError("method.options.eva_config: EVA has no settings here (its rho is 1)")
        if self._eva:
            options["eva_config"] = EvaConfig(rho=1.0)
        if init == "loftq" and not torch.cuda.is_available():
            raise UserError("method.options.init_lora_weights: PEFT computes 'loftq' on a GPU only")
        loftq = options.get("loftq_config")
        if "feedforward_modules" in (item.name for item in dataclasses.fields(kind)):
            options["feedforward_modules"] = sorted({site.path for site in sites if site.role == "D"})
        adapter = Adapter(model, {site.key: site for site in sites})
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=EXPECTED)
                if loftq:
                    options["loftq_config"] = LoftQConfig(**loftq)  # with its defaults
                config = kind(target_modules=sorted({site.path for site in sites}), **options)
                tuner = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type](model, config, "default")
        except (ValueError, TypeError, NotImplementedError, ImportError) as error:
            raise UserError(f"method.type: '{self.config.type}' cannot adapt this model so: {error}") from error
        adapter.adopt(tuner)
        train_heads(adapter)
        return adapter

    def _kind(self) -> Any:
        """The class of the tuner's configuration."""
        try:
            from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
        except ModuleNotFoundError:
            raise UserError("method=peft needs PEFT; install it with: pip install 'lowrank-cli[peft]'") from None
        known = {
            kind.value.lower(): PEFT_TYPE_TO_CONFIG_MAPPING[kind]
            for kind in PEFT_TYPE_TO_TUNER_MAPPING
            if "target_modules" in (item.name for item in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[kind]))
        }
        if self.config.type not in known:
            raise unknown("method.type", self.config.type, sorted(known))
        return known[self.config.type]


class _PrincipalInputs:
    """A forward pre-hook of a linear that keeps the ``count`` principal components of its inputs."""

    def __init__(self, count: int):
        from peft.utils.incremental_pca import IncrementalPCA

        self.count = count
        self.mask: torch.Tensor | None = None  # (B, T), of the current pass; images have none
        self._pca = IncrementalPCA(count, lowrank=True, lowrank_seed=0)

    def __call__(self, linear: Any, args: tuple[torch.Tensor, ...]) -> None:
        rows = args[0].detach().reshape(-1, args[0].shape[-1]).float()  # (B, T, I) -> (B * T, I)
        if self.mask is not None:
            rows = rows[self.mask.flatten().bool()]  # (tokens, I)
        if len(rows) >= self.count:
            self._pca.partial_fit(rows)  # type: ignore[no-untyped-call]

    def result(self, shape: torch.Size) -> torch.Tensor:
        """The components (R, I). Raises UserError if no pass had enough tokens."""
        components = getattr(self._pca, "components_", None)
        if components is None or components.shape != shape:
            raise UserError("method.options.init_lora_weights: 'eva' needs more training prompts than there are")
        return components
