"""Conversations: the forms of their rows, their tokens in a chat template, and what is trained of them."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from command import lrk, one_line  # noqa: F401 (a fixture)
from transformers import AutoTokenizer

from lowrank_cli import tasks
from lowrank_cli.config.composition import compose
from lowrank_cli.errors import UserError
from lowrank_cli.models.load import BUNDLED
from lowrank_cli.tasks import encode
from lowrank_cli.tasks.chat import chat_of
from lowrank_cli.tasks.conversations import Turn
from lowrank_cli.tasks.task import Example, template_hash

REAL = os.environ.get("LRK_REAL_MODELS")
CHATML = (
    "{% for message in messages %}{{ '<s>' + message['role'] + '\n' + message['content'] + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)
#: The same with the assistant's turns marked, but not their stop tokens.
MARKED = (
    "{% for message in messages %}{{ '<s>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}{% endgeneration %}{% else %}{{ message['content'] }}{% endif %}"
    "{{ '</s>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)
#: As Llama 2 asks: no text stands for the beginning of an answer, and contents are trimmed.
INSTRUCT = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'system' %}{{ raise_exception('no system turn') }}"
    "{% else %}{{ ' ' + message['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
#: As Qwen 3 does, the last answer is written otherwise than the earlier ones.
THINKING = (
    "{% for message in messages %}{{ '<s>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and loop.last %}{{ '[think]\n\n' }}{% endif %}"
    "{{ message['content'] + '</s>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)
TURNS = (
    Turn("user", "Is the zorp red?"),
    Turn("assistant", "It is red."),
    Turn("user", "And the dunk?"),
    Turn("assistant", "Blue, I think.  "),
)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BUNDLED)


def config(**overrides):
    composed = compose("train", ["task=chat", "task.path=."]).config.task
    return replace(composed, **overrides)


def example(turns=TURNS, **values) -> Example:
    return Example("p", turns[-1].content, (), None, (), (), turns=turns, where="talks.jsonl:3", **values)


def dicts(turns):
    return [{"role": turn.role, "content": turn.content} for turn in turns]


def trained_text(tokenizer, ids, trained) -> list[str]:
    """The trained stretches of a conversation."""
    spans, open_span = [], []
    for token, on in [*zip(ids, trained, strict=True), (0, 0)]:
        if on:
            open_span.append(token)
        elif open_span:
            spans.append(tokenizer.decode(open_span))
            open_span = []
    return spans


@pytest.mark.parametrize(
    "template", [CHATML, MARKED, INSTRUCT, THINKING, None], ids=["chatml", "marked", "instruct", "thinking", "plain"]
)
def test_a_conversation_has_the_tokens_of_its_template_and_loss_on_every_answer(tokenizer, template):
    chat = chat_of(tokenizer, config(chat_template=template))
    ids, trained = chat.tokens(TURNS, "talks.jsonl:3")
    whole = tokenizer.apply_chat_template(dicts(TURNS), chat_template=chat.template)["input_ids"]
    assert ids == whole and chat.stop == tokenizer.eos_token_id
    first, last = trained_text(tokenizer, ids, trained)
    assert first.split() == ["It", "is", "red.", "</s>"] or first == "It is red.</s>"
    assert "Blue, I think." in last and last.endswith("</s>")
    encoded = chat.encode(example(), 200)
    assert encoded.input_ids == whole[: len(encoded.input_ids)] and encoded.answered == sum(trained)
    labels = encode.collate_causal([encoded], 0)["labels"][0].tolist()
    assert [label if on else encode.IGNORED for label, on in zip(ids, trained, strict=True)][: len(labels)] == labels
    prompt = chat.rendered(example(), 200).prompt
    asked = tokenizer.apply_chat_template(dicts(TURNS[:-1]), chat_template=chat.template, add_generation_prompt=True)
    assert encode.encode_prompt(chat.tokenizer, prompt, 200) == asked["input_ids"] == ids[: len(asked["input_ids"])]


def test_marks_of_the_template_and_prefix_differences_agree(tokenizer):
    marked, plain = (chat_of(tokenizer, config(chat_template=text)) for text in (MARKED, CHATML))
    assert marked.tokens(TURNS, "x") == plain.tokens(TURNS, "x")
    row = tokenizer.apply_chat_template(
        dicts(TURNS), chat_template=MARKED, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, trained = marked.tokens(TURNS, "x")
    added = [token for token, on, before in zip(ids, trained, row["assistant_masks"], strict=True) if on and not before]
    assert added == [tokenizer.eos_token_id] * 2, "the stop tokens, which the template leaves out"


def test_a_template_that_cannot_be_masked_is_an_error(tokenizer):
    nothing = CHATML.replace("{% endfor %}", "{% endfor %}{% generation %}{% endgeneration %}")
    rewriting = CHATML.replace("{% for", "{{ messages | length }}{% for")
    endless = CHATML.replace("</s>", "#")
    refusing = config(chat_template=INSTRUCT, system="Be brief.")
    for chosen, message in [
        (config(chat_template=nothing), "talks.jsonl:3: task.chat_template marks no token of the assistant"),
        (
            config(chat_template=rewriting),
            "talks.jsonl:3: task.chat_template writes turn 2 otherwise than it asks for it",
        ),
        (config(chat_template=endless), "task.chat: task.chat_template ends answers with no special token"),
        (
            refusing,
            "talks.jsonl:3: task.chat_template refuses the conversation: no system turn; leave the system turn out",
        ),
    ]:
        with pytest.raises(UserError) as caught:
            chat_of(tokenizer, chosen).encode(example(), 200)
        assert str(caught.value).startswith(message)


def test_a_template_of_ones_own_is_checked(tokenizer):
    for text, message in [
        (
            "{% for m in mesages %}{{ m }}{% endfor %}",
            "unknown variable 'mesages'; did you mean 'messages'? (allowed: mes",
        ),
        ("{% for m in messages %}\n{{ m }", "line 2: "),
    ]:
        with pytest.raises(UserError, match=r"^task.chat_template: ") as caught:
            chat_of(tokenizer, config(chat_template=text))
        assert message in str(caught.value)
    Path("mine.jinja").write_text(MARKED)
    composed = compose("train", ["task=chat", "task.path=.", "task.chat_template=mine.jinja"])
    assert composed.resolved["task"]["chat_template"] == MARKED, "the saved configuration is what ran"
    with pytest.raises(UserError, match=r"^task.chat_template: there is no file 'nowhere.jinja'$"):
        compose("train", ["task=chat", "task.path=.", "task.chat_template=nowhere.jinja"])


def test_when_the_template_is_used(tokenizer):
    sst2 = compose("train", ["task=sst2"]).config.task
    chatty = AutoTokenizer.from_pretrained(BUNDLED)
    chatty.chat_template = CHATML
    assert chat_of(chatty, sst2) is None and chat_of(tokenizer, sst2, asked=True) is None
    assert (
        str(chat_of(chatty, sst2, asked=True))
        == "chat: the model's chat template (task.chat=auto); answers end with </s>"
    )
    assert chat_of(chatty, replace(sst2, chat="false"), asked=True) is None
    assert chat_of(chatty, config()).template == CHATML and chat_of(chatty, config(chat="false")).template != CHATML
    assert "plain turns, as the model has no chat template" in str(chat_of(tokenizer, config()))
    with pytest.raises(UserError, match=r"^task.chat: true, but the model's tokenizer has no chat template; set"):
        chat_of(tokenizer, replace(sst2, chat="True"))
    with pytest.raises(
        UserError, match=r"^task.system: needs a chat, and the prompts of sst2 are plain; set task.chat="
    ):
        chat_of(chatty, replace(sst2, system="Judge."))
    (row,) = tasks.examples(sst2, [{"sentence": "fine", "label": 1}], "rows")
    chat = chat_of(chatty, replace(sst2, chat="True", system="Judge."))
    shown = chat.rendered(row, 100)
    assert shown.prompt == "<s>system\nJudge.</s>\n<s>user\nReview: fine\nSentiment:</s>\n<s>assistant\n"
    assert shown.choices == ("negative", "positive") and shown.answer == "positive"
    options = encode.candidates(chat.tokenizer, shown.prompt, shown.choices)
    made = chat.encode(row, 100)
    assert made.input_ids[made.prompt_length :] == [*options[1], chat.stop], "trained as it is scored"


def test_a_long_conversation_loses_its_first_exchanges(tokenizer):
    chat = chat_of(tokenizer, config(chat_template=CHATML))
    turns = (Turn("system", "Be brief."), *TURNS)
    short = (turns[0], *TURNS[2:])
    whole, last = chat.encode(example(turns), 500), chat.encode(example(short), 500)
    assert chat.encode(example(turns), len(whole.input_ids) + 1) == whole
    assert chat.encode(example(turns), len(whole.input_ids) - 1) == last
    tight = chat.encode(example(turns), len(last.input_ids) - 4)
    assert tight.input_ids[0] == tokenizer.bos_token_id and tight.input_ids[1:] == last.input_ids[5:]
    with pytest.raises(UserError, match=r"^task.max_length: 8 leaves no room for a prompt before an answer of"):
        chat.encode(example(turns), 8)
    assert len(chat.encode(example(turns), 8, cut=True).input_ids) == 8
    shown = chat.rendered(example(turns), last.prompt_length)
    assert shown.prompt == chat.rendered(example(short), 500).prompt


USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
TALK = (Turn("user", "Hi"), Turn("assistant", "Hello"))
FORMS = {
    "openai": ({"messages": [USER, ASSISTANT]}, TALK),
    "openai parts": ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, ASSISTANT]}, TALK),
    "sharegpt": ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}, TALK),
    "alpaca": ({"instruction": "Hi", "input": "", "output": "Hello"}, TALK),
    "alpaca input": (
        {"instruction": "Add", "input": "1 2", "output": "3", "system": "Calculate."},
        (Turn("system", "Calculate."), Turn("user", "Add\n\n1 2"), Turn("assistant", "3")),
    ),
    "completion": ({"prompt": "Hi", "completion": "Hello"}, TALK),
    "completion messages": ({"prompt": [USER], "completion": [ASSISTANT]}, TALK),
}


@pytest.mark.parametrize("name", FORMS)
def test_forms_are_told_apart_by_their_columns(name):
    row, turns = FORMS[name]
    (read,) = tasks.examples(config(), [row], "talks")
    assert read.turns == turns and read.answer == turns[-1].content and read.references == (read.answer,)


BAD = {
    "no answer": (
        {"messages": [USER]},
        "no turn of the assistant, so nothing to train on; task.lenient=true leaves such",
    ),
    "unanswered": (
        {"messages": [USER, ASSISTANT, USER]},
        "the last turn is of user and has no answer; task.lenient=true",
    ),
    "assistant first": (
        {"messages": [ASSISTANT, USER, ASSISTANT]},
        "turn 1 is of assistant, where user is due; task.lenient",
    ),
    "twice": ({"messages": [USER, USER, ASSISTANT]}, "turn 2 is of user, where assistant is due"),
    "late system": (
        {"messages": [USER, ASSISTANT, {"role": "system", "content": "x"}, ASSISTANT]},
        "turn 3 is of system, where user is due (a system turn comes first)",
    ),
    "role": (
        {"messages": [{"role": "asistant", "content": "x"}]},
        "messages, turn 1: 'role' is 'asistant'; did you mean 'assistant'? (allowed: system,",
    ),
    "no role": ({"messages": [{"content": "x"}]}, "messages, turn 1: 'role' is None; its keys are content (allowed"),
    "no text": (
        {"messages": [{"role": "user", "content": None}]},
        "messages, turn 1: 'content' must be text, not None",
    ),
    "no list": ({"messages": "Hi"}, 'column \'messages\' must list turns such as {"role": …, "content": …}'),
    "empty": ({"messages": [USER, {"role": "assistant", "content": " "}]}, "turn 2, of the assistant, is empty"),
    "columns": (
        {"prompt": "Hi", "completions": "Hello"},
        "no conversation in columns prompt, completions; did you mean 'completion'? (allowed: messages; "
        "conversations; instruction and output; prompt and completion); task.columns.NAME=COLUMN says which column is "
        "meant",
    ),
    "mixed": (
        {"instruction": "Hi", "output": "Hello"},
        "the row has instruction and output, but the first has messages; give one form a file",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_one_line_with_its_place(name):
    row, message = BAD[name]
    rows = [{"messages": [USER, ASSISTANT]}, row] if name == "mixed" else [row]
    with pytest.raises(UserError) as caught:
        tasks.examples(config(), rows, "talks.jsonl")
    assert str(caught.value).startswith(f"talks.jsonl:{len(rows)}: {message}")


def test_lenient_leaves_out_what_has_no_answer():
    rows = [
        {"messages": [ASSISTANT, USER, ASSISTANT, USER]},
        {"messages": [USER]},
        {"messages": [{"role": "system", "content": "s"}]},
        {"messages": [{"role": "system", "content": "s"}, USER, ASSISTANT]},
    ]
    read = tasks.examples(config(lenient=True), rows, "talks")
    assert [item.turns for item in read] == [TALK, (Turn("system", "s"), *TALK)]
    assert [item.where for item in read] == ["talks:1", "talks:4"]


def test_a_hash_tells_templates_apart_and_is_the_old_one_for_other_tasks():
    assert template_hash(config()) == template_hash(config(chat="auto"))
    assert len({template_hash(config(**values)) for values in ({}, {"chat": "false"}, {"system": "s"})}) == 3


def write(rows: int) -> None:
    """A folder of two-turn conversations."""
    Path("talks").mkdir()
    for split, count in {"train": rows, "validation": 6, "test": 4}.items():
        talks = [
            [
                {"role": "user", "content": f"Is {number} even?"},
                {"role": "assistant", "content": "no" if number % 2 else "yes"},
                {"role": "user", "content": "And odd?"},
                {"role": "assistant", "content": "yes" if number % 2 else "no"},
            ]
            for number in range(count)
        ]
        lines = (json.dumps({"messages": talk}) + "\n" for talk in talks)
        Path(f"talks/{split}.jsonl").write_text("".join(lines))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "milora"])
def test_training_evaluation_and_generation_share_the_template(lrk, method):  # noqa: F811
    write(16)
    small = ["train.max_steps=2", "train.batch_size=4", "hardware.threads=1", "task.max_new_tokens=4"]
    data = ["task=chat", "task.path=talks", "task.dev_split=validation"]
    ended = lrk("train", f"method={method}", *data, *small)
    assert ended.code == 0, ended
    said = "chat: plain turns, as the model has no chat template; answers end with </s>"
    assert said in ended.err
    (first, *_) = [json.loads(line) for line in Path("outputs/latest/predictions.jsonl").read_text().splitlines()]
    assert first["prompt"].startswith("<s>User:\nIs ") and first["prompt"].endswith("\n\nAssistant:\n")
    asked = lrk("generate", "Is 3 even?", "generate.max_new_tokens=4", "hardware.threads=1")
    assert asked.code == 0 and said in asked.err, "it is asked as it was trained"


@pytest.mark.slow
def test_an_adapter_is_asked_in_the_template_that_it_was_trained_in(lrk):  # noqa: F811
    write(8)
    data = ["task=chat", "task.path=talks", "task.dev_split=validation", "task.max_new_tokens=2"]
    small = ["train.max_steps=1", "train.batch_size=4", "hardware.threads=1"]
    assert lrk("train", "method=lora", *data, *small).code == 0
    for words in (["generate", "Is 3 even?"], ["evaluate"]):
        ended = lrk(*words, "task.system=Be brief.", "hardware.threads=1")
        told = "was trained in another chat template or system turn" if words[0] == "generate" else "another template"
        assert ended.code == 2 and told in ended.err
    assert lrk("generate", "Is 3 even?", "hardware.threads=1", "generate.max_new_tokens=2").code == 0
    assert lrk("export", "export.format=merged", "hardware.threads=1").code == 0
    exported = AutoTokenizer.from_pretrained("outputs/latest/export")
    assert exported.apply_chat_template(dicts(TURNS[:1]), tokenize=False) == "<s>User:\nIs the zorp red?\n\n"


def test_a_template_that_writes_the_date_writes_the_same_one_every_day(tokenizer):
    dated = chat_of(tokenizer, config(chat_template="{{ strftime_now('%d %b %Y') }}\n" + CHATML))
    assert dated.rendered(example(), 200).prompt.startswith("26 Jul 2024")
    assert sum(dated.tokens(TURNS, "x")[1]) == sum(
        chat_of(tokenizer, config(chat_template=CHATML)).tokens(TURNS, "x")[1]
    )


def test_tasks_of_a_mix_share_a_template_or_have_none(lrk):  # noqa: F811
    write(8)
    Path("mine/task").mkdir(parents=True)
    Path("mine/task/both.yaml").write_text(
        "defaults: [_mix, chat@parts.chat, tiny_yesno@parts.tiny_yesno, _self_]\nname: both\nmax_length: 128\n"
        "max_new_tokens: 4\nparts: {chat: {path: talks, dev_split: validation}}\n"
    )
    words = ["train", "--config-dir", "mine", "task=both", "method=lora", "train.max_steps=1"]
    refused = one_line(lrk(*words, "hardware.threads=1"))
    assert refused.startswith(
        "task.parts.tiny_yesno.chat: auto, but chat is asked in a chat template; set task.parts.tiny_"
    )


def test_options_that_chat_rules_out(lrk):  # noqa: F811
    write(4)
    data = ["task=chat", "task.path=talks", "task.dev_split=validation"]
    for words, message in [
        (("evaluate", *data, "evaluate.shots=2", "method=none"), "evaluate.shots: 2 demonstrations go in front of a"),
        (("train", "task.chat=true", "method=idaicl"), "task.chat: true, but calibration compares label words after"),
        (("evaluate", "task.chat=yes", "method=none"), "task.chat: unknown value"),
    ]:
        assert one_line(lrk(*words)).startswith(message)


@pytest.mark.skipif(not REAL, reason="LRK_REAL_MODELS names no folder with smollm2/")
def test_smollm2_talks_in_its_own_template():
    smollm2 = AutoTokenizer.from_pretrained(Path(str(REAL)) / "smollm2")
    chat = chat_of(smollm2, config())
    ids, trained = chat.tokens(TURNS, "x")
    assert ids == smollm2.apply_chat_template(dicts(TURNS))["input_ids"]
    assert trained_text(smollm2, ids, trained) == ["It is red.<|im_end|>", "Blue, I think.  <|im_end|>"]
    assert chat.stops == [smollm2.convert_tokens_to_ids("<|im_end|>")]
