"""IDAICL as users run it: fitted once, exact without augmentation, the same demonstrations for all calibrations."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowrank_cli import config, tasks
from lowrank_cli.calibration import statistics_files
from lowrank_cli.calibration.logits_processor import AnswerProcessor
from lowrank_cli.errors import UserError
from lowrank_cli.icl import arrangement_stats, demonstrations
from lowrank_cli.icl.demonstrations import Arrangement
from lowrank_cli.inference import choice_scores
from lowrank_cli.launch import single_run
from lowrank_cli.methods.idaicl import IDAICL
from lowrank_cli.methods.protocol import Plan
from lowrank_cli.models.load import BUNDLED
from lowrank_cli.runs import Run
from lowrank_cli.tasks import encode
from lowrank_cli.tasks.task import Example, Task

pytestmark = pytest.mark.slow
QUICK = ["task=tiny_sentiment", "task.limit=24", "hardware.threads=1"]
PLAIN = ["method.strength=0", "method.tau=0"]


def lrk(verb: str, *overrides: str, outputs="outputs") -> Run:
    single_run.start(verb, [*overrides, f"outputs={outputs}"], None, f"lrk {verb}")
    return Run.open(Run.open(Path(outputs) / "latest").path.absolute())


def predictions(run: Run) -> list[dict]:
    return [json.loads(line) for line in (run.path / "predictions.jsonl").read_text().splitlines()]


def quick_task() -> Task:
    return tasks.load(config.compose("train", ["method=idaicl", *QUICK]).config.task)


def tokens(texts: list[str]) -> list[list[int]]:
    return encode.encode_prompts(AutoTokenizer.from_pretrained(BUNDLED), texts, [10_000] * len(texts))


@torch.no_grad()
def hidden(rows: list[list[int]]) -> torch.Tensor:
    """What the head of the bundled model reads behind each row of tokens, one pass a row: (n, D)."""
    model = AutoModelForCausalLM.from_pretrained(BUNDLED).eval()
    return torch.stack([model.model(input_ids=torch.tensor([row])).last_hidden_state[0, -1] for row in rows])


@pytest.fixture
def asked(monkeypatch) -> list[tuple[list[Example], list[str]]]:
    """What is scored behind each arrangement: examples and their prompts."""
    seen, scores = [], choice_scores.choice_scores

    def watching(session, examples, prompts, shots, **more):
        seen.append((examples, prompts))
        return scores(session, examples, prompts, shots, **more)

    monkeypatch.setattr("lowrank_cli.icl.queries.choice_scores", watching)
    return seen


@pytest.fixture(scope="module")
def fitted(tmp_path_factory) -> Run:
    """Statistics of both wordings, tested behind four arrangements of four demonstrations."""
    return lrk(
        "train",
        *QUICK,
        "method=idaicl",
        "evaluate.shots=4",
        "method.draws=2",
        "method.templates=2",
        outputs=tmp_path_factory.mktemp("fitted"),
    )


def test_fitting_keeps_the_statistics_and_reports_the_spread(fitted):
    tensors, about = statistics_files.load(fitted.path / "statistics")
    assert tensors["0.mean"].shape == (128,) and tensors["1.factor"].shape == (24, 128)
    assert tensors["0.shares"].sum() == pytest.approx(1)
    assert about["label_words"] == ["negative", "positive"] and len(about["answers"]) == 2
    found = json.loads((fitted.path / "arrangements.json").read_text())
    values = [row["accuracy"] for row in found]
    assert [(row["template"], row["draw"]) for row in found] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert fitted.metrics["test/accuracy"] == pytest.approx(sum(values) / 4)
    assert fitted.metrics["test/accuracy_worst"] == min(values)
    assert {path.name for path in (fitted.path / "plots").iterdir()} == {"confusion.png", "spread.png"}


def test_the_statistics_are_those_of_the_hidden_states_behind_the_answers(fitted):
    examples = quick_task().train
    features = hidden(tokens([example.prompt + example.answer for example in examples]))
    found, _ = statistics_files.load(fitted.path / "statistics")
    torch.testing.assert_close(found["0.mean"], features.mean(dim=0), rtol=1e-4, atol=1e-4)
    covariance = torch.cov(features.t(), correction=0)
    torch.testing.assert_close(found["0.factor"].t() @ found["0.factor"], covariance, rtol=1e-3, atol=1e-3)
    behind_prompts = hidden(tokens([example.prompt for example in examples]))
    assert (features.mean(dim=0) - behind_prompts.mean(dim=0)).abs().max() > 0.1


def test_answers_of_several_tokens_add_their_tokens_scores():
    run = lrk(
        "train",
        *QUICK,
        "task.label_words=[very bad,good]",
        "method=idaicl",
        "method.examples=10",
        "method.tau=0",
    )
    found, about = statistics_files.load(run.path / "statistics")
    assert about["examples"] == 10 and found["0.factor"].shape == (10, 128)
    lengths = [len(answer) for answer in about["answers"]]
    assert max(lengths) > 1
    head = AutoModelForCausalLM.from_pretrained(BUNDLED).get_output_embeddings().weight.detach()
    sigma = found["0.factor"].t() @ found["0.factor"]
    for record in predictions(run)[:2]:
        (prompt,) = tokens([record["prompt"]])
        for answer, value in zip(about["answers"], record["scores"], strict=True):
            features = hidden([prompt + answer[:at] for at in range(len(answer))])
            total = 0.0
            for feature, token in zip(features, answer, strict=True):
                apart = head - head[token]  # (V, D)
                moved = apart @ (feature + 0.5 * found["0.mean"]) + 0.25 * (apart @ sigma * apart).sum(dim=-1)
                total -= moved.logsumexp(dim=0).item()
            assert value == pytest.approx(total, rel=1e-4, abs=2e-3)
    normalised = lrk("evaluate", f"run={run.path}", "method.normalize_length=true")
    for whole, each in zip(predictions(run), predictions(normalised), strict=True):
        expected = [value / length for value, length in zip(whole["scores"], lengths, strict=True)]
        assert each["scores"] == pytest.approx(expected, abs=1e-4)


def shown_statistics(examples: list[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and covariance of the hidden states behind the answers."""
    features = hidden(tokens([example.prompt + example.answer for example in examples]))
    return features.mean(dim=0), torch.cov(features.t(), correction=0)


@pytest.mark.parametrize("own", [False, True], ids=["one set", "a set for each query"])
def test_statistics_may_be_those_of_the_demonstrations_shown(own, asked):
    run = lrk(
        "train",
        *QUICK,
        "task.limit=6",
        "method=idaicl",
        "method.statistics=shown",
        f"method.per_query={own}",
        "method.draws=2",
        "evaluate.shots=2",
    )
    assert not statistics_files.load(run.path / "statistics")[0]
    task = tasks.load(config.compose("train", ["method=idaicl", *QUICK, "task.limit=6"]).config.task)
    pool = {example.prompt: example for example in task.train}
    _, prompts = asked[2]  # dev is asked behind two sets, then test
    sets = [[pool[block.rpartition(" ")[0]] for block in prompt.split("\n\n")[:-1]] for prompt in prompts]
    shown = list({example.prompt: example for examples in sets for example in examples}.values())
    assert (len({tuple(example.prompt for example in examples) for examples in sets}) > 1) == own
    mean, covariance = shown_statistics(shown)
    head = AutoModelForCausalLM.from_pretrained(BUNDLED).get_output_embeddings().weight.detach()
    words = tokens([" negative", " positive"])
    counts = torch.tensor([sum(example.label == label for example in shown) for label in (0, 1)])
    prior = ((counts + 1) / (len(shown) + 2)).log()
    behind = hidden(tokens(prompts))
    for record, feature in zip(predictions(run), behind, strict=True):
        for label, (*_, token) in enumerate(words):
            apart = head - head[token]  # (V, D)
            moved = apart @ (feature + 0.5 * mean) + 0.25 * (apart @ covariance * apart).sum(dim=-1)
            assert record["scores"][label] == pytest.approx(
                -moved.logsumexp(dim=0).item() - prior[label].item(), abs=2e-3
            )
    again = lrk("evaluate", f"run={run.path}")
    assert predictions(again) == predictions(run)
    with pytest.raises(UserError, match=r"method\.statistics: train, but .* was made with shown"):
        lrk("evaluate", f"run={run.path}", "method.statistics=train")
    with pytest.raises(UserError, match=r"method\.statistics: shown, but export shows no demonstrations"):
        lrk("export", f"run={run.path}")


def test_content_free_inputs_stand_behind_the_demonstrations_of_their_query(fitted, asked):
    common = [
        f"run={fitted.path}",
        "method.calibration=dconca",
        "method.probes=2",
        "method.draws=1",
        "method.templates=1",
    ]
    run = lrk("evaluate", *common, "method.per_query=true", "evaluate.shots=2", "task.limit=24")
    ((examples, prompts),) = asked
    assert len(prompts) == 3 * 24
    before = [prompt.removesuffix(example.prompt) for prompt, example in zip(prompts, examples, strict=True)]
    assert before[24::2] == before[25::2] == before[:24] and len(set(before)) > 20
    assert json.loads((run.path / "arrangements.json").read_text())[0]["demonstrations"] is None


def test_evaluation_predicts_with_what_was_kept(fitted, monkeypatch):
    monkeypatch.setattr("lowrank_cli.icl.fit.fit", None)
    again = lrk("evaluate", f"run={fitted.path}")  # with its task, templates, draws and shots
    assert predictions(again) == predictions(fitted)
    assert again.metrics["test/accuracy"] == fitted.metrics["test/accuracy"]


@pytest.mark.parametrize("shots", [0, 4])
def test_without_augmentation_and_prior_it_is_plain_in_context_learning(fitted, shots):
    ours = lrk("evaluate", f"run={fitted.path}", *PLAIN, f"evaluate.shots={shots}", "method.templates=1", "seed=1")
    vanilla = lrk("evaluate", *QUICK, "method=none", f"evaluate.shots={shots}", "seed=1")
    off = lrk("evaluate", f"run={fitted.path}", "method.calibration=none", f"evaluate.shots={shots}", "seed=1")
    for run in (ours, off):
        first = [{key: line[key] for key in line if key != "correct_share"} for line in predictions(run)]
        assert first == predictions(vanilla)


@pytest.mark.parametrize("kind", ["ida", "conca", "dconca", "proca"])
def test_every_calibration_answers_differently_from_none(fitted, kind):
    common = [f"run={fitted.path}", "evaluate.shots=2", "method.draws=1", "method.templates=1"]
    ours = lrk("evaluate", *common, f"method.calibration={kind}")
    plain = lrk("evaluate", *common, "method.calibration=none")
    pairs = list(zip(predictions(ours), predictions(plain), strict=True))
    assert all(a["scores"] != b["scores"] and a["label"] == b["label"] for a, b in pairs)


def test_demonstrations_run_once_for_all_queries_and_probes(fitted, monkeypatch):
    made = []
    make = choice_scores.Prefix.__init__

    def counting(prefix, model, ids):
        made.append(len(ids))
        make(prefix, model, ids)

    monkeypatch.setattr(choice_scores.Prefix, "__init__", counting)
    lrk("evaluate", f"run={fitted.path}", "method.calibration=dconca", "evaluate.shots=4", "evaluate.batch_size=5")
    assert len(made) == 4  # arrangements
    assert min(made) > 4 * 8  # tokens: the demonstrations, not only what every prompt begins with


def test_a_demonstration_too_long_for_the_room_changes_no_other_answer():
    common = [*QUICK, "method=none", "evaluate.shots=4"]
    task = quick_task()
    prompts = choice_scores.with_demonstrations(task.test, demonstrations.draw(task.train, 4, 0))
    lengths = [len(row) for row in tokens(prompts)]
    room = sorted(lengths)[len(lengths) // 2] // 5  # tokens of each of five texts
    uncut = [length <= 5 * room - 2 for length in lengths]  # beside an answer of one token and EOS
    assert any(uncut) and not all(uncut)
    whole, cut = (predictions(lrk("evaluate", *common, f"task.max_length={most}")) for most in (64, room))
    same = [a["scores"] == pytest.approx(b["scores"], abs=1e-3) for a, b in zip(whole, cut, strict=True)]
    assert same == uncut


@pytest.mark.parametrize("choice", ["similar", "dissimilar"])
def test_demonstrations_may_be_chosen_for_each_query(fitted, choice, asked):
    run = lrk(
        "evaluate",
        f"run={fitted.path}",
        f"method.demonstrations={choice}",
        "evaluate.shots=3",
        "method.draws=1",
        "method.permutations=2",
        "method.templates=1",
    )
    found = json.loads((run.path / "arrangements.json").read_text())
    assert [row["permutation"] for row in found] == [0, 1] and found[0]["demonstrations"] is None
    examples, ((queries, first), (_, second)) = quick_task().train, asked
    known, behind = (hidden(tokens([example.prompt for example in part])) for part in (examples, queries[:4]))
    likeness = torch.cosine_similarity(behind[:, None], known[None], dim=-1)  # (4, n)
    nearest = likeness.topk(3, largest=choice == "similar").indices.flip(1).tolist()
    for query, picked, one, other in zip(queries, nearest, first, second):
        blocks = [examples[index].prompt + examples[index].answer for index in picked]
        assert one == "\n\n".join([*blocks, query.prompt])
        assert other != one and sorted(other.split("\n\n")) == sorted(one.split("\n\n"))


def test_a_share_holds_in_the_statistics_and_in_the_prompts():
    run = lrk(
        "train",
        *QUICK,
        "task.limit=80",
        "method=idaicl",
        "method.demonstrations=imbalanced",
        "method.share=0.25",
        "evaluate.shots=8",
    )
    tensors, about = statistics_files.load(run.path / "statistics")
    assert tensors["0.shares"].tolist() == pytest.approx([0.25, 0.75], abs=0.02)
    assert about["share"] == 0.25
    plain, weighed = (
        predictions(lrk("evaluate", f"run={run.path}", "evaluate.shots=8", "method.strength=0", f"method.tau={tau}"))
        for tau in (0, 2)
    )
    expected = (-2 * tensors["0.shares"].log()).tolist()  # the rare label gains most
    for a, b in zip(plain, weighed, strict=True):
        gained = [y - x for x, y in zip(a["scores"], b["scores"], strict=True)]
        assert gained == pytest.approx(expected, abs=1e-4) and gained[0] > gained[1]


def test_a_wording_may_have_label_words_of_its_own():
    other = "{template: 'Review: {sentence}\\nQuality:', label_words: [bad, good]}"
    run = lrk("train", *QUICK, f"task.templates=[{other}]", "method=idaicl", "method.templates=2", "evaluate.shots=2")
    alone = lrk(
        "train", *QUICK, "task.template='Review: {sentence}\\nQuality:'", "task.label_words=[bad,good]",
        "method=idaicl", "evaluate.shots=2",
    )  # fmt: skip
    rows = json.loads((run.path / "arrangements.json").read_text())
    assert rows[1]["accuracy"] == alone.metrics["test/accuracy"]
    found, about = statistics_files.load(run.path / "statistics")
    assert torch.equal(found["1.mean"], statistics_files.load(alone.path / "statistics")[0]["0.mean"])
    assert about["templates"][1]["label_words"] == ["bad", "good"]
    model = AutoModelForCausalLM.from_pretrained(BUNDLED)
    own, others = (AnswerProcessor.from_folder(run.path / "statistics", model, 0, index) for index in (0, 1))
    assert (
        set(own.following[()])
        != set(others.following[()])
        == set(AnswerProcessor.from_folder(alone.path / "statistics", model, 0).following[()])
    )
    assert lrk("evaluate", f"run={run.path}").metrics["test/accuracy"] == run.metrics["test/accuracy"]


def test_other_calibrations_share_the_passes_and_answer_as_alone(fitted, asked, capsys):
    common = [f"run={fitted.path}", "evaluate.shots=2", "method.templates=1", "method.draws=2", "method.unlabelled=5"]
    beside = {"plain": "calibration: none", "shown": "statistics: shown", "proca": "calibration: proca"}
    named = ", ".join(f"{name}: {{{keys}}}" for name, keys in beside.items())
    run = lrk("evaluate", *common, f"method.beside={{{named}}}")
    assert len(asked) == 2 and {len(examples) for examples, _ in asked} == {24 + 5}  # the queries, and PROCA's
    assert "proca" in capsys.readouterr().out
    for name, keys in beside.items():
        alone = lrk("evaluate", *common, f"method.{keys.replace(': ', '=')}")
        for end in ("", "_std", "_worst"):
            assert run.metrics[f"test/accuracy_{name}{end}"] == alone.metrics[f"test/accuracy{end}"]
        ours, theirs = predictions(run), predictions(alone)
        assert [line["beside"][name] for line in ours] == [line["correct_share"] for line in theirs]
    shares = [line["correct_share"] for line in predictions(run)]
    assert sum(shares) / len(shares) == pytest.approx(run.metrics["test/accuracy"])


def test_each_demonstration_is_asked_after_the_others(fitted, asked):
    common = [f"run={fitted.path}", "method.templates=1", "method.draws=1", "evaluate.shots=3"]
    run = lrk("evaluate", *common, "method.calibration=loo")
    (_, prompts), (left_out, their_prompts) = asked
    shown = [
        quick_task().train[i] for i in json.loads((run.path / "arrangements.json").read_text())[0]["demonstrations"]
    ]
    assert [example.prompt for example in left_out] == [example.prompt for example in shown]
    for number, prompt in enumerate(their_prompts):
        others = [example for index, example in enumerate(shown) if index != number]
        assert prompt == "".join(f"{one.prompt}{one.answer}\n\n" for one in others) + shown[number].prompt
    assert all(prompt.startswith(shown[0].prompt) for prompt in prompts)  # the queries, after all of them
    plain = lrk("evaluate", *common, "method.calibration=none")
    shifts = torch.tensor([line["scores"] for line in predictions(run)])
    shifts -= torch.tensor([line["scores"] for line in predictions(plain)])
    assert (shifts - shifts[0]).abs().max() < 1e-4 < shifts.abs().max()  # the same constants for every query
    alone = lrk("evaluate", *common, "method.calibration=loo", "evaluate.shots=0")
    assert predictions(alone) == predictions(lrk("evaluate", *common, "method.calibration=none", "evaluate.shots=0"))


def test_curves_cover_the_values_asked_for(fitted, pictures):
    run = lrk("evaluate", f"run={fitted.path}", "method.strengths=[0.0,0.5]", "method.taus=[0,1]", "method.templates=1")
    assert {"strength.png", "tau.png"} <= {path.name for path in (run.path / "plots").iterdir()}
    curves = {figure["file"]: figure for figure in json.loads((run.path / "figures.json").read_text())}
    own = run.metrics["test/accuracy"]
    assert curves["strength.png"]["columns"] == [0.0, 0.5] and curves["strength.png"]["values"][0][1] == own
    assert curves["tau.png"]["values"][0][1] == own


def test_it_stands_on_an_adapter_that_another_method_trained():
    lora = lrk("train", *QUICK, "method=lora", "train.max_steps=3", "train.learning_rate=0.02", "train.batch_size=8")
    at_once = lrk("evaluate", "method=idaicl", f"run={lora.path}", "evaluate.shots=2")
    kept = lrk("train", "method=idaicl", f"run={lora.path}", "evaluate.shots=2")
    again = lrk("evaluate", f"run={kept.path}", "evaluate.shots=2")
    assert predictions(at_once) == predictions(kept) == predictions(again)
    bare = lrk("evaluate", f"run={lora.path}", "evaluate.shots=2")
    plain = lrk("evaluate", f"run={kept.path}", "evaluate.shots=2", *PLAIN)
    assert predictions(plain) == predictions(bare)
    assert plain.metrics["trainable_parameters"] == bare.metrics["trainable_parameters"] > 0
    frozen = lrk("evaluate", *QUICK, "method=none", "evaluate.shots=2")
    assert predictions(frozen) != predictions(bare)
    (lora.path / "adapter" / "lrk.json").write_text((lora.path / "adapter" / "lrk.json").read_text() + "\n")
    with pytest.raises(UserError, match="were fitted with adapter"):
        lrk("evaluate", f"run={kept.path}")


def test_proca_is_fitted_on_examples_that_are_not_shown(fitted, asked):
    common = [f"run={fitted.path}", "method.calibration=proca", "method.draws=1", "method.templates=1"]
    lrk("evaluate", *common, "evaluate.shots=4")
    ((examples, prompts),) = asked
    unlabelled = examples[24:]  # of 24 in D, behind 24 queries
    assert len(unlabelled) == 20
    assert all(prompt.count(example.prompt) == 1 for example, prompt in zip(unlabelled, prompts[24:], strict=True))
    with pytest.raises(UserError, match=r"evaluate\.shots: all examples are shown"):
        lrk("evaluate", *common, "evaluate.shots=24")


def test_inputs_without_content_have_texts_of_each_column():
    method = IDAICL(
        config.compose("train", ["method=idaicl", "method.calibration=dconca", "method.probes=9"]).config.method
    )
    pair = {"premise": ["a b c d", "e f g h"], "hypothesis": ["x", "y"]}
    probes = method.probes(pair, [0, 1], Random(0))
    rows = probes.texts
    assert len(rows) == 9 and not probes.examples
    assert {len(row["premise"].split()) for row in rows} == {4} and {row["hypothesis"] for row in rows} == {"x", "y"}
    assert {word for row in rows for word in row["premise"].split()} <= set("abcdefgh")
    method.config.calibration = "conca"
    rows = method.probes(pair, [0, 1], Random(0)).texts
    assert rows == [{"premise": text, "hypothesis": text} for text in ("N/A", "[MASK]", "")]


def test_oracles_bound_the_metric_and_are_named_so(fitted, capsys):
    common = [
        f"run={fitted.path}",
        "method.calibration=none",
        "method.draws=3",
        "method.templates=1",
        "evaluate.shots=2",
    ]
    plain, bounded = lrk("evaluate", *common), lrk("evaluate", *common, "method.oracles=true")
    assert "oracle: one offset" in capsys.readouterr().out
    assert not any("oracle" in name for name in plain.metrics)
    names = ("test/accuracy", "test/accuracy_oracle_all_sets", "test/accuracy_oracle_each_set")
    values = [bounded.metrics[name] for name in names]
    assert values == sorted(values) and values[0] == plain.metrics["test/accuracy"] < values[2]
    assert bounded.metrics["test/accuracy_oracle_each_set_worst"] <= values[2]
    rows = json.loads((bounded.path / "arrangements.json").read_text())
    first = max(
        sum((row["scores"][0] + shift > row["scores"][1]) == (row["label"] == 0) for row in predictions(bounded))
        for shift in [0, *(row["scores"][1] - row["scores"][0] + 1e-4 for row in predictions(bounded)), -1e9]
    )
    assert rows[0]["oracle_each_set"] == pytest.approx(first / 24)


def test_a_channel_scores_the_query_behind_each_answer(fitted):
    common = [*QUICK, "task.limit=6", "method=idaicl", "method.calibration=none", "evaluate.shots=2"]
    run = lrk("train", *common, "method.channel=true")
    task = tasks.load(config.compose("train", [*QUICK, "task.limit=6"]).config.task)
    shown = demonstrations.draw(task.train, 2, 0)
    model = AutoModelForCausalLM.from_pretrained(BUNDLED).eval()

    def flip(example: Example, word: str) -> tuple[str, str]:
        return f"Sentiment: {word}", "\n" + example.prompt.removesuffix("\nSentiment:")

    before = "".join("".join(flip(example, example.answer.strip())) + "\n\n" for example in shown)
    for record, query in zip(predictions(run), task.test, strict=True):
        for word, value in zip(("negative", "positive"), record["scores"], strict=True):
            start, text = flip(query, word)
            (beginning,), (whole,) = tokens([before + start]), tokens([before + start + text])
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([whole])).logits[0].log_softmax(dim=-1)  # (T, V)
            assert whole[: len(beginning)] == beginning
            expected = sum(logits[at - 1, whole[at]].item() for at in range(len(beginning), len(whole)))
            assert value == pytest.approx(expected, abs=2e-3)
    with pytest.raises(UserError, match=r"method\.channel: True, but .* was made with"):
        lrk("evaluate", f"run={fitted.path}", "method.channel=true")
    augmented = lrk("train", *common, "method.channel=true", "method.calibration=ida")
    assert predictions(augmented)[0]["scores"] != predictions(run)[0]["scores"]


def test_generate_with_the_kept_statistics_gives_the_answers_of_the_evaluation(fitted):
    run = lrk("evaluate", f"run={fitted.path}", "evaluate.shots=0", "method.templates=1")
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(BUNDLED).eval()
    processor = AnswerProcessor.from_folder(fitted.path / "statistics", model, tokenizer.eos_token_id)
    prompts = tokenizer([row["prompt"] for row in predictions(run)], padding=True, return_tensors="pt")
    made = model.generate(
        input_ids=prompts["input_ids"],
        attention_mask=prompts["attention_mask"],
        logits_processor=[processor],
        num_beams=processor.beams,
        length_penalty=0.0,
        max_new_tokens=4,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    said = tokenizer.batch_decode(made[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
    assert [text.strip() for text in said] == [row["prediction"] for row in predictions(run)]
    with torch.no_grad():
        model.get_input_embeddings().weight[0, 0] += 1
    with pytest.raises(UserError, match="belong to another model"):
        AnswerProcessor.from_folder(fitted.path / "statistics", model, tokenizer.eos_token_id)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"adapter": "of a run", "vocabulary": 9}, "belong to another model"),
        ({"method.calibration": "conca"}, "go with method.calibration=conca; in generate .* method.calibration=ida"),
        ({"method.normalize_length": True}, "go with method.normalize_length=True"),
    ],
)
def test_generate_refuses_what_it_cannot_follow(fitted, tmp_path, said, message):
    tensors, about = statistics_files.load(fitted.path / "statistics")
    for key, value in said.items():
        place = about["method"] if key.startswith("method.") else about
        place[key.removeprefix("method.")] = value
    statistics_files.save(tmp_path, tensors, about)
    with pytest.raises(UserError, match=message):
        AnswerProcessor.from_folder(tmp_path, AutoModelForCausalLM.from_pretrained(BUNDLED), 0)


def test_export_writes_what_generate_answers_with(fitted):
    run = lrk("export", f"run={fitted.path}", "method.strength=0.25")
    assert run.metrics["export/score_error"] < 1e-4
    assert statistics_files.load(run.path / "export")[1]["method"]["strength"] == 0.25
    with pytest.raises(UserError, match=r"in generate answers are scored with method\.calibration=ida"):
        lrk("export", f"run={fitted.path}", "method.calibration=conca")


def test_prompts_of_a_routed_adapter_are_never_cut():
    """MiLoRA routes by the whole prompt, so its demonstrations have no cache of their own."""
    milora = lrk("train", *QUICK, "method=milora", "train.max_steps=2", "train.batch_size=8")
    run = lrk("evaluate", "method=idaicl", f"run={milora.path}", "evaluate.shots=2", *PLAIN)
    assert predictions(run) == predictions(lrk("evaluate", f"run={milora.path}", "evaluate.shots=2"))


# ------------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method.features=prompt"], "method.features: prompt, but .* was made with answer; leave it out"),
        (["task.limit=23"], r"were fitted with data 24 examples \(\w+\), not 23 examples"),
        (["task.max_length=63"], "were fitted with max_length 64, not 63; .*method.templates=2 task.max_length=63"),
        (["export.format=lora"], "export.format: 'idaicl' exports its statistics"),
        (["evaluate.shots=25"], "evaluate.shots: 25 are asked for, there are 24 demonstrations"),
    ],
)
def test_statistics_of_something_else_are_refused(fitted, overrides, message):
    with pytest.raises(UserError, match=message):
        lrk("export" if "export" in overrides[0] else "evaluate", f"run={fitted.path}", *overrides)


def test_options_without_effect_are_said(fitted, capsys):
    lrk("evaluate", f"run={fitted.path}", "evaluate.shots=0", "method.draws=2", "method.templates=1")
    said = capsys.readouterr().err
    assert "method.draws=2 has no effect with evaluate.shots=0" in said and "permutations" not in said


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method.calibration=idaa"], "method.calibration: unknown value 'idaa'; did you mean 'ida'?"),
        (["method.strength=-1"], "method.strength: -1.0 is out of range"),
        (["method.share=0.5"], "method.share: 0.5 with method.demonstrations=random"),
        (["method.demonstrations=imbalanced"], "method.share: missing; method.demonstrations=imbalanced"),
        (["method.demonstrations=ballanced"], "method.demonstrations: unknown value 'ballanced' (allowed: random"),
        (["method.templates=99"], "method.templates: 99, but task=tiny_sentiment has"),
        (["task=tiny_arithmetic"], "task.answer: tiny_arithmetic has task.answer=free"),
        (["method.demonstrations=similar", "method.draws=2"], "method.draws: 2, but similar demonstrations"),
        (["method.beside={a: {draws: 2}}"], "method.beside.a: unknown value 'draws' (allowed: calibration, statistics"),
        (
            ["method.calibration=loo", "method.per_query=true"],
            "method.calibration: loo asks the demonstrations of a set",
        ),
        (["method.beside={a: none}"], "method.beside.a: 'none' names no keys, such as {calibration: none}"),
        (
            ["method.beside.a.calibration=idaa"],
            "method.beside.a: calibration: unknown value 'idaa'; did you mean 'ida'",
        ),
        (["method.statistics=shown", "method.beside.a.statistics=train"], "method.beside.a.statistics: train needs"),
        (["model=minilm"], "method: 'idaicl' would leave the head of the encoder minilm random"),
    ],
)
def test_values_that_do_not_go_together(overrides, message):
    with pytest.raises(UserError) as caught:
        single_run.preview("train", ["method=idaicl", "task=tiny_sentiment", *overrides], None)
    assert str(caught.value).startswith(message)


def test_only_what_calibrates_stands_on_a_run():
    composed = config.compose("train", ["method=lora"])
    run = Run.create(
        "outputs", stage="train", config=composed.resolved, choices=composed.choices, overrides=[], command=""
    )
    run.finish({})
    used = config.compose("train", ["method=idaicl", f"run={run.path}", "seed=3"]).config
    assert (used.method.name, used.run, used.seed) == ("idaicl", str(run.path.absolute()), 3)
    for overrides, message in (
        (
            ["method=milora"],
            "run: method=milora trains from the pretrained model; on a trained run stands method=idaicl",
        ),
        (["method=idaical"], "method: unknown value 'idaical'"),
    ):
        with pytest.raises(UserError) as caught:
            config.compose("train", [f"run={run.path}", *overrides])
        assert str(caught.value).startswith(message)
    with pytest.raises(UserError, match="was trained with 'lora', not 'milora'"):
        config.compose("evaluate", [f"run={run.path}", "method=milora"])


# ------------------------------------------------------------------------------------------ choosing demonstrations


def example(number: int, label: int) -> Example:
    return Example(f"q{number}", "", (), label, (f"q{number}",), ())


def plan(**values) -> Plan:
    usual = {
        "choice": "random",
        "share": None,
        "examples": None,
        "draws": 1,
        "permutations": 1,
        "templates": 1,
        "answered": True,
        "normalize_length": False,
    }
    return Plan(**(usual | values))


EXAMPLES = [example(number, number % 2) for number in range(40)]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_the_pool_is_the_largest_with_the_share(share):
    found = demonstrations.pool(EXAMPLES, plan(choice="imbalanced", share=share), 0)
    first = sum(e.label == 0 for e in found)
    assert first == round(len(found) * share) and len(found) >= 20
    assert len(set(map(id, found))) == len(found)
    skewed = plan(choice="imbalanced", share=share)
    for shown in (
        *demonstrations.sets(skewed, 10, found, 0),
        *demonstrations.own_sets(skewed, 10, found, 0, 0, EXAMPLES[:3]),
    ):
        assert sum(found[index].label == 0 for index in shown) == round(10 * share)


def test_a_limited_pool_is_drawn_by_the_seed():
    limited = plan(examples=5)
    found = demonstrations.pool(EXAMPLES, limited, 1)
    assert len(found) == 5 and found == demonstrations.pool(EXAMPLES, limited, 1)
    assert found != demonstrations.pool(EXAMPLES, limited, 2)


def test_the_first_set_is_that_of_a_plain_evaluation_and_orders_keep_it():
    many = plan(draws=2, permutations=3, templates=2)
    first, _ = demonstrations.sets(many, 6, EXAMPLES, 4)
    assert [EXAMPLES[index] for index in first] == demonstrations.draw(EXAMPLES, 6, 4)
    orders = [demonstrations.ordered(first, Arrangement(0, 0, order), 4) for order in range(3)]
    assert orders[0] == first and len(set(map(tuple, orders))) == 3
    assert all(sorted(order) == sorted(first) for order in orders)
    assert len(demonstrations.arrangements(many, 6)) == 12
    assert len(demonstrations.arrangements(many, 1)) == 4  # one demonstration has one order
    assert len(demonstrations.arrangements(many, 0)) == 2


def test_sets_are_disjoint_as_long_as_the_pool_goes():
    drawn = demonstrations.sets(plan(draws=11), 4, EXAMPLES, 0)
    assert len({index for chosen in drawn[:10] for index in chosen}) == 40
    assert len(set(drawn[10])) == 4 and drawn[10] not in drawn[:10]
    skewed = demonstrations.sets(plan(draws=6, share=0.25), 4, EXAMPLES, 0)  # 3 of 20 in each set
    assert len({index for chosen in skewed for index in chosen}) == 24


def test_sets_of_neighbouring_seeds_have_nothing_to_do_with_each_other():
    many = [example(number, number % 2) for number in range(2000)]
    one, other = ([set(chosen) for chosen in demonstrations.sets(plan(draws=10), 8, many, seed)] for seed in (0, 1))
    assert not [chosen for chosen in one if chosen in other]
    common = set.union(*one) & set.union(*other)  # 80 of 2000 twice: 3.2 expected
    assert len(common) < 12


def test_each_query_draws_its_own_set_without_itself():
    drawn = demonstrations.own_sets(plan(per_query=True), 39, EXAMPLES, 0, 0, EXAMPLES)
    assert all(sorted(chosen) == [at for at in range(40) if at != number] for number, chosen in enumerate(drawn))
    of_draws = [
        demonstrations.own_sets(plan(per_query=True), 4, EXAMPLES, 0, draw, [example(99, 0)]) for draw in (0, 1)
    ]
    assert of_draws[0] != of_draws[1]


def test_confusion_is_the_share_of_each_labels_queries():
    rows = [{"label": 0, "choice": 0}, {"label": 0, "choice": 1}, {"label": 1, "choice": 1}, {"label": 0, "choice": 1}]
    results = [
        arrangement_stats.Result(Arrangement(0, 0, 0), "accuracy", 0.5, None, part) for part in (rows[:1], rows[1:])
    ]
    found = arrangement_stats.confusion(results, ["a", "b", "c"], "test")
    assert found["values"] == [[1 / 3, 2 / 3, 0], [0, 1, 0], [None, None, None]]


def test_the_nearest_comes_last():
    features = torch.eye(4)
    queries = torch.tensor([[1.0, 0.5, 0.1, 0.0]])
    assert demonstrations.nearest(plan(choice="similar"), 2, features, queries) == [[1, 0]]
    assert demonstrations.nearest(plan(choice="dissimilar"), 2, features, queries) == [[2, 3]]
