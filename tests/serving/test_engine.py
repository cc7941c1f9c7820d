"""The engine: each answer of mixed traffic is that of its adapter alone, and nothing stays behind."""

from __future__ import annotations

import gc
import threading

import pytest
import small
import torch
from serving_cases import METHODS, PROMPTS, Adapters, Client, ask, bundled, engine, request
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, MistralConfig, MistralForCausalLM

from lowrank_cli.adapter.tenants.bank import Bank
from lowrank_cli.errors import UserError
from lowrank_cli.serving.engine import Closing, Full, UnknownModel
from lowrank_cli.serving.lanes import BankLane
from lowrank_cli.serving.requests import Answer, Model, Request
from lowrank_cli.serving.sampling import Sampling


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    return Adapters(tmp_path_factory.mktemp("adapters"))


@pytest.fixture
def made():
    """Makes engines, and closes them."""
    engines = []

    def make(adapters=None, tenants=METHODS, **settings):
        engines.append(engine(**settings))
        for tenant in tenants if adapters else ():
            engines[-1].load(tenant, adapters.folders[tenant])
        return engines[-1]

    yield make
    for one in engines:
        one.close()


def held(engine):
    """A lock that the engine waits for between two steps, held."""
    lock, waits = threading.Event(), threading.Event()

    def wait():
        waits.set()
        assert lock.wait(60)

    threading.Thread(target=engine.between_steps, args=(wait,), daemon=True).start()
    assert waits.wait(60)
    return lock


def test_mixed_traffic_answers_as_each_adapter_alone(adapters, made):
    """More answers than rows, of unequal lengths: rows join and leave at different steps."""
    engine = made(adapters, max_rows=5)
    asked = [
        (tenant, prompt, 3 + (at * 5 + number * 3) % 11)
        for number, prompt in enumerate(PROMPTS)
        for at, tenant in enumerate(["base", *METHODS, "ben"])
    ]
    clients = [ask(engine, *one) for one in asked]
    for one, client in zip(asked, clients, strict=True):
        assert client.texts == [adapters.alone(*one)], one
    assert len({adapters.alone(tenant, PROMPTS[0], 10) for tenant in ("base", *METHODS)}) == 7, "adapters differ"
    for one, client in zip(asked, clients):
        assert len(client.pieces[0]) == one[2] or client.finish == ["stop"], "a piece for each token"


def windowed():
    """Models whose attention spans four tokens in some layers."""
    sizes = {**small.GATED, "head_dim": 8, "sliding_window": 4}
    gemma = Gemma3TextConfig(**sizes, layer_types=["sliding_attention", "full_attention"])
    return {"gemma3": Gemma3ForCausalLM(gemma), "windowed": MistralForCausalLM(MistralConfig(**sizes))}


class Numbers:
    """A tokenizer whose text is the tokens' numbers."""

    pad_token_id = 0

    def decode(self, ids, **options):
        return "".join(f"{token} " for token in ids)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "opt", "gemma3", "windowed"])
def test_every_family_generates_as_alone(family):
    """Rows of unequal prompts, one of which joins when the others have begun, and grows beyond the first storage."""
    torch.manual_seed(7)
    plain = family in small.FAMILIES
    bare = small.model(family) if plain else windowed()[family].eval()
    bank = Bank(bare)
    models = {name: small.adapted(name, family) for name in ("lora", "milora")} if plain else {}
    for name, adapter in models.items():
        bank.add(name, adapter)
    lane, clients, expected = BankLane(bank, Numbers(), False), [], []

    def asked(name, tokens, new, count=1):
        ids = small.ids(1, tokens)[0].tolist()
        client = Client(count)
        clients.append(client)
        model = models[name].model if name in models else small.model(family) if models else bare
        expected.append((model, ids, new, count))
        adapter = name if name in models else None
        return Request(Model("any", adapter), ids, Sampling(new), client, count)

    lane_requests = [asked("lora", 3, 20), asked("milora", 9, 6, count=2), asked("base", 6, 12)]
    lane.join(lane_requests, lane.read(lane_requests))
    for step in range(60):
        if step == 4:
            late = [asked("milora", 14, 40), asked("lora", 1, 9)]
            lane.join(late, lane.read(late))
        lane.step()
    assert not lane.answers and not lane.rows.lengths
    for (model, ids, new, count), client in zip(expected, clients, strict=True):
        inputs = torch.tensor([ids])
        model.generation_config.eos_token_id = None
        alone = model.generate(inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=new, do_sample=False)
        text = Numbers().decode(alone[0, len(ids) :].tolist())
        assert client.texts == [text] * count


def test_sampled_answers_depend_on_their_seed_alone(adapters, made):
    engine = made(adapters)
    settings = {"temperature": 1.0, "top_p": 0.9, "seed": 5}
    alone = ask(engine, "ben", PROMPTS[0], 12, count=3, **settings)
    first = alone.texts
    assert len(set(first)) == 3
    noise = [ask(engine, tenant, PROMPTS[1], 9, temperature=1.0) for tenant in ("ann", "base", "ben")]
    again = ask(engine, "ben", PROMPTS[0], 12, count=3, **settings)
    other = ask(engine, "ben", PROMPTS[0], 12, count=3, **{**settings, "seed": 6})
    assert again.texts == first and not set(other.texts) & set(first)
    assert all(client.texts for client in noise)


def test_log_probabilities_are_those_of_the_model(adapters, made):
    client = ask(made(adapters), "ben", PROMPTS[0], 6, logprobs=3, temperature=0.5, seed=1)
    assert client.texts
    tokenizer = bundled()[1]
    prompt = tokenizer(PROMPTS[0]).input_ids
    tokens = [piece.tokens[0] for piece in client.pieces[0]]
    model, found = adapters.models["ben"], []
    cache = None
    with torch.no_grad():  # step by step, since a prompt of all tokens would be routed otherwise
        for token in tokens:
            ids = torch.tensor([prompt if cache is None else [found[-1][0]]])
            output = model(ids, use_cache=True, **({} if cache is None else {"cache": cache}))
            cache = output.cache
            found.append((token.id, output.logits[0, -1].log_softmax(-1)))
    for token, (at, logprobs) in zip(tokens, found, strict=True):
        assert token.logprob == pytest.approx(logprobs[at].item(), abs=1e-4)
        values, ids = logprobs.topk(3)
        assert [one for one, _ in token.top] == ids.tolist()
        assert [value for _, value in token.top] == pytest.approx(values.tolist(), abs=1e-4)


def test_stop_strings_and_stop_tokens_end_an_answer(adapters, made):
    engine = made(adapters)
    whole = adapters.alone("ann", PROMPTS[0], 12)
    stop = whole[5:8]
    client = ask(engine, "ann", PROMPTS[0], 12, stop=("no such text", stop))
    assert client.texts == [whole[: whole.find(stop)]] and client.finish == ["stop"]
    tokens = bundled()[1](PROMPTS[0]).input_ids
    first = ask(engine, "ann", PROMPTS[0], 1)
    assert first.texts and first.finish == ["length"]
    ended = ask(engine, "ann", PROMPTS[0], 12, stop_ids=frozenset([first.pieces[0][0].tokens[0].id]))
    assert ended.texts == [""] and ended.finish == ["stop"] and len(tokens)


def test_a_cancelled_request_leaves_and_the_others_go_on(adapters, made):
    engine = made(adapters, max_rows=2)
    lock = held(engine)
    gone = [request(engine, tenant, PROMPTS[0], 200) for tenant in ("ann", "dan")]
    engine.submit(gone)
    stays = ask(engine, "ben", PROMPTS[1], 10)
    lock.set()
    while not gone[0].listener.pieces[0]:
        assert not stays.ended.is_set()
    for one in gone:
        one.cancelled = True
    assert stays.texts == [adapters.alone("ben", PROMPTS[1], 10)]
    assert not gone[0].listener.ended.is_set()


def test_a_full_queue_and_unknown_models_are_refused_whole(adapters, made):
    engine = made(adapters, ("ann",), max_rows=2, max_waiting=4)
    lock = held(engine)
    waiting = [ask(engine, "ann", PROMPTS[0], 3, count=2)]
    ghost = request(engine, "base", PROMPTS[0], 3)
    ghost.model = Model("ghost")
    for refused, error in [([request(engine, "ann", PROMPTS[0], 3) for _ in range(3)], Full), ([ghost], UnknownModel)]:
        with pytest.raises(error):
            engine.submit(refused)
    waiting.append(ask(engine, "ann", PROMPTS[0], 3, count=2))
    assert engine.waiting == 4
    cancelled = request(engine, "ann", PROMPTS[0], 3)
    with pytest.raises(Full):
        engine.submit([cancelled])
    lock.set()
    assert [client.texts for client in waiting] == [[adapters.alone("ann", PROMPTS[0], 3)] * 2] * 2
    with pytest.raises(UnknownModel, match="there is no model 'anna'; did you mean 'ann'"):
        engine.model("anna")


def test_an_unloaded_adapter_answers_what_was_asked_before(adapters, made):
    engine = made(adapters, ("ann", "ben", "eve"), max_rows=2)
    lock = held(engine)
    clients = {tenant: [ask(engine, tenant, PROMPTS[0], 8) for _ in range(2)] for tenant in ("ann", "ben", "eve")}
    for tenant in clients:
        engine.unload(tenant)
    assert [model.name for model in engine.models] == ["base"]
    again = threading.Thread(target=engine.load, args=("ann", adapters.folders["dan"]))
    again.start()
    lock.set()
    for tenant, of_tenant in clients.items():
        assert [client.texts for client in of_tenant] == [[adapters.alone(tenant, PROMPTS[0], 8)]] * 2
    again.join()
    assert ask(engine, "ann", PROMPTS[0], 8).texts == [adapters.alone("dan", PROMPTS[0], 8)], "another of the name"
    engine.unload("ann")
    assert ask(engine, "base", PROMPTS[0], 8).texts
    engine.between_steps(lambda: None)
    assert len(engine.lanes) == 1 and engine.adapters.bank.names == []
    with pytest.raises(UserError, match="'base' is the model that all adapters share"):
        engine.unload("base")


def test_an_adapter_that_does_not_fit_leaves_the_others_alone(adapters, made, tmp_path):
    engine = made(adapters, ("ann",))
    running = ask(engine, "ann", PROMPTS[0], 60)
    foreign = small.adapted("lora")
    (tmp_path / "foreign").mkdir()
    from lowrank_cli.adapter.files import save_load

    save_load.save(foreign, tmp_path / "foreign", {})
    for name, folder, message in [
        ("x", "nowhere", "there is no folder 'nowhere'"),
        ("x", ".", "'.' is no run with an adapter"),
        ("x", str(tmp_path / "foreign"), "belongs to another model"),
        ("ann", adapters.folders["ben"], "there is a model 'ann' already"),
    ]:
        with pytest.raises(UserError, match=message):
            engine.load(name, folder)
    assert running.texts == [adapters.alone("ann", PROMPTS[0], 60)]
    assert [model.name for model in engine.models] == ["base", "ann"]


def test_a_failing_pass_ends_its_own_requests_only(adapters, made, monkeypatch, capsys):
    engine = made(adapters, ("ann", "eve"))
    lane = engine.adapters.bank_lane
    forward = lane.forward

    def failing(inputs, cache):
        if 31 in inputs["input_ids"]:
            raise RuntimeError("out of memory")
        return forward(inputs, cache)

    monkeypatch.setattr(lane, "forward", failing)
    lock = held(engine)
    good, bad = request(engine, "ann", PROMPTS[0], 8), request(engine, "ann", PROMPTS[0], 8)
    bad.prompt = [*bad.prompt, 31]
    engine.submit([good, bad])
    lock.set()
    assert good.listener.texts == [adapters.alone("ann", PROMPTS[0], 8)]
    assert bad.listener.ended.wait(60) and bad.listener.error.startswith("the model failed (RuntimeError)")
    assert "out of memory" in capsys.readouterr().err
    lock = held(engine)
    both = [ask(engine, tenant, PROMPTS[0], 8) for tenant in ("ann", "eve")]
    monkeypatch.setattr(lane, "step", lambda: 1 / 0)
    lock.set()
    assert both[1].texts == [adapters.alone("eve", PROMPTS[0], 8)], "it has a lane of its own"
    assert both[0].ended.wait(60) and "ZeroDivisionError" in both[0].error
    monkeypatch.undo()
    assert ask(engine, "ann", PROMPTS[0], 8).texts == [adapters.alone("ann", PROMPTS[0], 8)]


def test_adapters_that_do_not_fit_together_take_turns(adapters, made):
    roomy = made(adapters, ("ann", "ben"))
    largest = max(roomy.adapters.bank.bytes(tenant) for tenant in ("ann", "ben"))
    roomy.close()
    engine = made(adapters, ("ann", "ben"), max_bytes=largest + 2**20)
    clients = [ask(engine, tenant, PROMPTS[0], 5) for tenant in ("ann", "ben") * 3]
    assert [client.texts for client in clients] == [
        [adapters.alone(tenant, PROMPTS[0], 5)] for tenant in ("ann", "ben") * 3
    ]


def test_a_closing_engine_finishes_what_it_has(adapters, made):
    engine = made(adapters, ("ann",), max_rows=1)
    lock = held(engine)
    clients = [ask(engine, "ann", PROMPTS[0], 20) for _ in range(2)]
    closer = threading.Thread(target=engine.close, args=(60,))
    closer.start()
    lock.set()
    closer.join()
    assert [client.texts for client in clients] == [[adapters.alone("ann", PROMPTS[0], 20)]] * 2
    with pytest.raises(Closing):
        ask(engine, "base", PROMPTS[0])
    with pytest.raises(Closing):
        engine.load("dan", adapters.folders["dan"])
    late = made(adapters, ("ann",), max_rows=1)
    clients = [ask(late, "ann", PROMPTS[0], 240) for _ in range(2)]
    late.close()
    assert all(client.ended.is_set() and client.error == "the server was stopped" for client in clients)


def test_nothing_of_a_request_stays(adapters, made):
    engine = made(adapters, ("ann", "ben", "eve"), max_rows=4)
    for number in range(12):
        clients = [ask(engine, tenant, PROMPTS[number % 4], 3 + number % 5) for tenant in ("ann", "ben", "eve", "base")]
        assert all(client.texts for client in clients)
    engine.between_steps(lambda: None)
    del clients
    gc.collect()
    left = [item for item in gc.get_objects() if type(item) in (Answer, Request)]
    assert left == []
    for lane in set(engine.lanes.values()):
        assert lane.rows.lengths == [] and all(layer.storages == [] for layer in lane.rows.layers)
