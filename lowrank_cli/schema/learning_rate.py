"""The usual learning rate by method and model size: what ``train.learning_rate=null`` stands for.

| model | adapters | full fine-tuning |
|---|---|---|
| bundled | 2e-3 | 2e-3 |
| decoder of width H | 5e-4 · (2000 / H)^0.781 | a tenth |
| encoder of width H | 5e-4 · (768 / H)^0.781 | a tenth |

Small models get no more than the bundled one, 2e-3 for adapters, because the rule was found at widths above 1000.

The rule for decoders is that of Schulman et al., "LoRA Without Regret" (Thinking Machines, 2025): the best rate of LoRA
is about ten times that of full fine-tuning at any size, and falls with the width by this power in Llama models. It
gives 2.9e-4 for 7B, next to the 1e-4 to 3e-4 of the examples of PEFT, LLaMA-Factory and torchtune. Encoders need less:
at its own width RoBERTa-base gets the 5e-4 of LoRA's paper (table 9), full fine-tuning BERT's 5e-5. The rate of the
bundled model was found by tuning. A method's own factor is :meth:`lowrank_cli.methods.protocol.Method.rate_scale`.
"""

from __future__ import annotations

from dataclasses import dataclass

from lowrank_cli.schema.model import ModelConfig

BUNDLED = 2e-3  #: at width 128
BASE = 5e-4  #: of LoRA at the reference width
POWER = 0.781  #: how the rate falls with the width
REFERENCE = {"causal": 2000, "encoder": 768}  #: width at which the rate is BASE
FAR = 5  #: a rate this many times higher or lower than the usual one deserves a remark


@dataclass(frozen=True)
class UsualRate:
    """A peak learning rate and where it comes from."""

    value: float
    source: str

    def is_usual(self, rate: float) -> bool:
        """Whether ``rate`` is this one."""
        return rate == self.value

    def is_far(self, rate: float) -> bool:
        """Whether ``rate`` is more than :data:`FAR` times higher or lower than this one."""
        return not self.value / FAR <= rate <= self.value * FAR

    def described(self, rate: float) -> str:
        """``rate``, in relation to the usual one."""
        if self.is_usual(rate):
            return f"{rate:g}, {self.source}"
        if not self.is_far(rate):
            return f"{rate:g} (usual: {self.value:g}, {self.source})"
        ratio = rate / self.value
        times = f"{ratio:.0f} times" if ratio > 1 else f"1/{1 / ratio:.0f} of" if ratio else "far below"
        return f"{rate:g} is {times} the usual {self.value:g} ({self.source})"


def usual_rate(model: ModelConfig, width: int | None, scale: float) -> UsualRate:
    """The usual peak learning rate for training ``model``.

    Args:
        width: hidden size; None if it is not known.
        scale: the method's rate in relation to LoRA's.
    """
    if model.bundled and not (model.path or model.gguf):
        return UsualRate(BUNDLED, "tuned on the bundled model")
    reference = REFERENCE[model.kind]
    rate = scale * min(BUNDLED, BASE * (reference / (width or reference)) ** POWER)
    known = f"width {width}" if width else f"a width of {reference}, since the model's is not known before its download"
    kind = {"causal": "a decoder", "encoder": "an encoder"}[model.kind]
    factor = "" if scale == 1 else f", × {scale:g} for this method"
    return UsualRate(float(f"{rate:.1e}"), f"for {kind} of {known}{factor}")
