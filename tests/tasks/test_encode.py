"""Examples as tokens, and their batches."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from lowrank_cli.errors import UserError
from lowrank_cli.tasks import encode
from lowrank_cli.tasks.task import Example

TEXTS = ["Review: a fine film\nSentiment: positive", "Review: dull, dull, dull\nSentiment: negative", "yes no maybe"]


def make(*, bos: bool, eos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-pair tokenizer, with the special tokens that families of models add in front or behind."""
    core = Tokenizer(models.BPE())

    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<s>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(TEXTS, trainer)
    front, behind = "<s> " if bos else "", " </s>" if eos else ""
    core.post_processor = processors.TemplateProcessing(
        single=f"{front}$A{behind}", pair=f"{front}$A{behind} $B:1{behind}", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture(scope="module", params=[(True, False), (False, False), (True, True)], ids=["bos", "bare", "bos-eos"])
def tokenizer(request):
    bos, eos = request.param
    return make(bos=bos, eos=eos)


def example(prompt="Review: a fine film\nSentiment:", answer=" positive", choices=(" negative", " positive")):
    return Example(prompt, answer, choices, 1 if choices else None, ("a fine film",), (answer.strip(),))


def front(tokenizer):
    return [1] if tokenizer("x")["input_ids"][0] == 1 else []


def test_prompt_answer_and_eos(tokenizer):
    made = encode.encode(tokenizer, example(), 100)
    prompt, answer = made.input_ids[: made.prompt_length], made.input_ids[made.prompt_length :]
    assert tokenizer.decode(answer[:-1]) == " positive" and answer[-1] == tokenizer.eos_token_id
    assert prompt == front(tokenizer) + tokenizer(example().prompt, add_special_tokens=False)["input_ids"]
    assert prompt == encode.encode_prompt(tokenizer, example().prompt, 100)
    assert encode.candidates(tokenizer, example().prompt, example().choices)[1] == answer[:-1]


def test_batched_encoding_equals_one_by_one(tokenizer):
    items = [example(), example("Is it?", " yes", ()), example("dull " * 40)]
    assert encode.encode_all(tokenizer, items, 30) == [encode.encode(tokenizer, item, 30) for item in items]


def test_long_prompts_lose_their_beginning_but_keep_bos(tokenizer):
    item = example("dull, " * 50 + "fine film\nSentiment:")
    made = encode.encode(tokenizer, item, 30)
    assert len(made.input_ids) <= 30
    prompt = made.input_ids[: made.prompt_length]
    assert prompt[: len(front(tokenizer))] == front(tokenizer)
    assert tokenizer.decode(prompt).endswith(" fine film\nSentiment:")


def test_training_and_scoring_keep_the_same_prompt(tokenizer):
    long = "dull, " * 50 + "Sentiment:"
    choices = (" no", " maybe negative")
    room = encode.max_prompt_length(encode.candidates(tokenizer, long, choices), 40)
    scored = encode.encode_prompt(tokenizer, long, room)
    for answer in choices:
        made = encode.encode(tokenizer, example(long, answer, choices), 40)
        assert made.input_ids[: made.prompt_length] == scored


def test_prompt_that_only_the_shorter_answer_leaves_room_for(tokenizer):
    choices = (" no", " maybe negative")
    prompt = example().prompt
    lengths = [len(tokens) for tokens in encode.candidates(tokenizer, prompt, choices)]
    tight = len(encode.encode_prompt(tokenizer, prompt, 99)) + min(lengths) + 1
    kept = {encode.encode(tokenizer, example(prompt, answer, choices), tight).prompt_length for answer in choices}
    assert kept == {tight - max(lengths) - 1}


def test_long_answers_lose_their_end_where_they_are_cut(tokenizer):
    long = example(answer=" maybe," * 30, choices=())
    (cut,) = encode.encode_all(tokenizer, [long], 40, cut=True)
    whole = encode.encode(tokenizer, long, 1000)
    assert cut.input_ids == whole.input_ids[:40] and cut.prompt_length == whole.prompt_length < 20
    both = example("dull, " * 50 + "Sentiment:", " maybe," * 30, ())
    (halved,) = encode.encode_all(tokenizer, [both], 40, cut=True)
    assert (len(halved.input_ids), halved.prompt_length) == (40, 20)
    assert tokenizer.decode(halved.input_ids[:20]).endswith("Sentiment:")
    items = [example(), example("dull, " * 50, choices=())]
    assert encode.encode_all(tokenizer, items, 30, cut=True) == encode.encode_all(tokenizer, items, 30)


def test_answer_without_room(tokenizer):
    with pytest.raises(UserError, match=r"^task.max_length: 6 leaves no room for a prompt .* 'maybe, maybe"):
        encode.encode(tokenizer, example(answer=" maybe," * 9, choices=()), 6)
    with pytest.raises(UserError, match=r"^task.max_length: leaves no room for a prompt"):
        encode.encode_prompt(tokenizer, "Review: fine", 0)


def test_answer_is_tokenised_alone_where_joining_changes_the_prompt():
    tokenizer = make(bos=True)
    item = example("It is posi", "tive", ())
    together = tokenizer(item.prompt + item.answer)["input_ids"]
    made = encode.encode(tokenizer, item, 50)
    prompt = tokenizer(item.prompt)["input_ids"]
    assert together[: len(prompt)] != prompt, "the case that this test is about"
    assert made.input_ids[: made.prompt_length] == prompt == encode.encode_prompt(tokenizer, item.prompt, 50)
    assert tokenizer.decode(made.input_ids[made.prompt_length : -1]) == "tive"


def test_causal_batch():
    rows = [encode.Encoded([1, 5, 6, 7, 2], 3), encode.Encoded([1, 8, 2], 1)]
    batch = encode.collate_causal(rows, pad_id=0)
    assert {key: value.tolist() for key, value in batch.items()} == {
        "input_ids": [[1, 5, 6, 7, 2], [1, 8, 2, 0, 0]],
        "attention_mask": [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]],
        "labels": [[-100, -100, -100, 7, 2], [-100, 8, 2, -100, -100]],
        "prompt_mask": [[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]],
    }


def test_prompt_batch_is_padded_on_the_left():
    batch = encode.collate_prompts([[1, 5], [1, 6, 7]], pad_id=0)
    assert batch["input_ids"].tolist() == [[0, 1, 5], [1, 6, 7]]
    assert batch["attention_mask"].tolist() == [[0, 1, 1], [1, 1, 1]]


def test_encoder_texts_and_pairs():
    tokenizer = make(bos=True, eos=True)
    single = encode.encode_text(tokenizer, example(), 50, 2)
    assert single.input_ids == tokenizer("a fine film")["input_ids"] and single.label == 1
    pair = Example("", " yes", (" no", " yes"), 1, ("dull " * 40, "fine film"), ("yes",))
    cut = encode.encode_text(tokenizer, pair, 20, 2)
    assert len(cut.input_ids) == 20 and tokenizer.decode(cut.input_ids).count("fine film") == 1


def test_encoder_batch():
    rows = [encode.EncodedText([1, 5, 2], [0, 0, 1], 1), encode.EncodedText([1, 2], [0, 1], 0)]
    batch = encode.collate_encoder(rows, pad_id=9)
    assert batch["input_ids"].tolist() == [[1, 5, 2], [1, 2, 9]]
    assert batch["token_type_ids"].tolist() == [[0, 0, 1], [0, 1, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].dtype == torch.int64 and batch["labels"].tolist() == [1, 0]
    without = [encode.EncodedText(row.input_ids, None, row.label) for row in rows]
    assert "token_type_ids" not in encode.collate_encoder(without, pad_id=9)
