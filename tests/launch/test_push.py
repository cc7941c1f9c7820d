"""``lrk push``, against a stub of the Hub's HTTP, and the model cards that it uploads."""

import base64
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
import yaml

from lowrank_cli.report import model_card
from lowrank_cli.report.statistics import wilson_interval
from lowrank_cli.runs import Run, config_hash

GOLDEN = Path(__file__).parents[1] / "golden" / "runs" / "lora"
RUN = Path("outputs/2026-01-02/030405-lora-llama-tiny_yesno")
TOKEN = "hf_notToBePrinted"


@pytest.fixture
def run() -> Run:
    """The recorded run of a LoRA, with 5 of 8 answers marked as correct, and its card."""
    shutil.copytree(GOLDEN, RUN)
    made = Run.open(RUN)
    lines = [json.loads(line) for line in (RUN / "predictions.jsonl").read_text().splitlines()]
    marked = [json.dumps(line | {"correct": number < 5}) for number, line in enumerate(lines)]
    made.write_text("predictions.jsonl", "\n".join(marked) + "\n")
    model_card.write(made)
    return made


def change(run: Run, section: str, **values) -> None:
    """Change settings of a recorded run."""
    config = run.config()
    config[section] |= values
    run.write_text("config.yaml", yaml.safe_dump(config))
    run.update(config_hash=config_hash(config))


class Hub(BaseHTTPRequestHandler):
    """What the client asks of the Hub when it makes a repository and commits a folder."""

    requests: list[tuple[str, str | None, bytes]]
    status: int

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.requests.append((self.path, self.headers["Authorization"], body))
        name = self.path.rpartition("/")[2]
        url = f"http://{self.headers['Host']}/org/adapter"
        answer = {"url": url, "commitUrl": f"{url}/commit/1", "commitOid": "1"}
        if self.path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            answer = {
                "files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]
            }
        text = json.dumps({"error": "no such luck"} if self.status != 200 else answer).encode()
        self.send_response(self.status if name in ("main", "create") else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *arguments) -> None:
        pass


@pytest.fixture
def hub(monkeypatch):
    """A stub of the Hub on this machine."""
    handler = type("Handler", (Hub,), {"requests": [], "status": 200})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield handler
        server.shutdown()


@pytest.mark.parametrize("private", [True, False])
def test_the_folder_is_uploaded_with_a_card_that_names_it(lrk, run, hub, private):
    ended = lrk("push", "repo=org/adapter", *([] if private else ["private=false"]))
    assert ended.code == 0, ended.err
    assert "pushed: http://127.0.0.1:" in ended.out and "/org/adapter/commit/1" in ended.out
    assert ("(private, " in ended.out) == private
    assert TOKEN not in ended.out + ended.err
    assert {token for _, token, _ in hub.requests} == {f"Bearer {TOKEN}"}
    (create,) = [json.loads(body) for path, _, body in hub.requests if path == "/api/repos/create"]
    visibility = create.get("visibility", "private" if create.get("private") else "public")
    assert (create["organization"], create["name"]) == ("org", "adapter")
    assert visibility == ("private" if private else "public")
    (commit,) = [body for path, _, body in hub.requests if path.endswith("/api/models/org/adapter/commit/main")]
    lines = [json.loads(line) for line in commit.splitlines()]
    sent = {
        line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"
    }
    kept = {path.name: path.read_bytes() for path in (RUN / "adapter").iterdir()}
    assert b'PeftModel.from_pretrained(model, "org/adapter")' in sent["README.md"]
    assert b"ORG/NAME" in kept["README.md"], "the next push may go to another repository"
    assert sent == kept | {"README.md": kept["README.md"].replace(b"ORG/NAME", b"org/adapter")}


def test_a_dry_run_lists_the_files_and_sends_nothing(lrk, run, hub):
    before = (RUN / "adapter" / "README.md").read_bytes()
    ended = lrk("push", f"run={RUN}", "repo=org/adapter", "--dry-run")
    first, *files = ended.out.splitlines()
    assert ended.code == 0 and first.startswith(f"{RUN}/adapter → org/adapter (private, ")
    names = {path.name for path in (RUN / "adapter").iterdir()}
    assert {line.split()[0] for line in files if not line.startswith("note:")} == names
    assert not hub.requests and (RUN / "adapter" / "README.md").read_bytes() == before


@pytest.mark.parametrize("link", ["adapter/notes.txt", "adapter/more", "adapter"])
@pytest.mark.parametrize("words", [[], ["--dry-run"]])
def test_symbolic_links_are_refused(lrk, run, hub, tmp_path, link, words):
    outside = tmp_path / "outside"
    if link == "adapter":
        (RUN / link).rename(outside)
    else:
        outside.mkdir()
        (outside / "key").write_text("private")
    (RUN / link).symlink_to(outside / "key" if link.endswith(".txt") else outside)
    ended = lrk("push", f"run={RUN}", "repo=org/adapter", *words)
    assert ended.code == 2 and not hub.requests
    assert ended.err == (
        f"error: run: '{RUN / link}' is a symbolic link, and push uploads none; put the file itself there\n"
    )


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (403, 2, "the Hub does not let this token write 'org/adapter'; log in"),
        (500, 1, "the Hub answered 500 for 'org/"),
    ],
)
def test_what_the_hub_refuses_is_one_line(lrk, run, hub, status, code, message, monkeypatch):
    monkeypatch.setattr(huggingface_hub.utils._http.time, "sleep", lambda seconds: None)
    hub.status = status
    ended = lrk("push", "repo=org/adapter")
    assert ended.code == code and ended.err.startswith(f"error: push: {message}"), ended.err
    assert ended.err.count("\n") == 1 and TOKEN not in ended.out + ended.err


def test_mistakes_are_one_line(lrk, run, monkeypatch):
    shutil.copytree(RUN, "outputs/2026-01-02/020405-bare")
    shutil.rmtree("outputs/2026-01-02/020405-bare/adapter")
    for words, message in (
        (["repoo=a/b"], "push: unknown key 'repoo'; did you mean 'repo'? (allowed: run, repo, private, outputs)"),
        ([], "repo: missing; give repo=ORG/NAME"),
        (["repo="], "repo: '' is not the name of a repository on the Hub (allowed: ORG/NAME)"),
        (["repo=a//b"], "repo: 'a//b' is not the name of a repository"),
        (["repo=a/b", "private=maybe"], "private: unknown value 'maybe' (allowed: true, false)"),
        (["repo=a/b", "run=nowhere"], "run: there is no folder 'nowhere'"),
        (
            ["repo=a/b", "run=outputs/2026-01-02/020405-bare"],
            "has neither an export nor an adapter; write one with: lrk",
        ),
        (["repo=a/b"], "push: nobody is logged in to the Hub; log in with hf auth login, or set HF_TOKEN"),
    ):
        ended = lrk("push", *words)
        assert ended.code == 2 and ended.err.startswith("error: ") and message in ended.err, ended.err
        assert ended.err.count("\n") == 1
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    ended = lrk("push", "repo=a/b")
    assert ended.code == 1 and ended.err.startswith("error: push: the upload failed (ConnectError: ")


def test_the_card_says_what_the_hub_and_a_reader_need(run):
    change(run, "model", id="org/base", bundled=False, license="apache-2.0")
    change(run, "task", hub="org/data", generator=None)
    model_card.write(run)
    card = huggingface_hub.ModelCard.load(RUN / "adapter" / "README.md")
    data = card.data
    assert (data.base_model, data.license, data.library_name) == ("org/base", "apache-2.0", "peft")
    assert data.datasets == ["org/data"] and data.pipeline_tag == "text-generation" and data.metrics == ["accuracy"]
    (result,) = data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_type) == ("accuracy", 0.625, "org/data")
    low, high = wilson_interval(5 / 8, 8)
    assert (low, high) == (pytest.approx(0.30574, abs=1e-5), pytest.approx(0.86316, abs=1e-5))
    assert f"| test accuracy | 0.6250 | {low:.4f} to {high:.4f} |" in card.text
    assert 'AutoModelForCausalLM.from_pretrained("org/base")' in card.text
    assert "vllm serve org/base --enable-lora --max-lora-rank 8 --lora-modules tuned=ORG/NAME" in card.text
    assert "Question: {question}\nText: {passage}\nAnswer:" in card.text
    assert "  rank: 1\n" in card.text and "  learning_rate: " in card.text and "seed: 0" in card.text
    exec(card.text.partition("```python\n")[2].partition("\n\n")[0])  # the imports are real


def test_a_card_of_a_local_model_names_no_path_of_this_machine(run):
    change(run, "model", path=str(Path.cwd()), bundled=True)
    change(run, "method", adapter="/home/somebody/adapter")
    model_card.write(run)
    card = huggingface_hub.ModelCard.load(RUN / "adapter" / "README.md")
    assert card.data.base_model is None and card.data.license is None
    assert "(a local checkpoint)" in card.text and "`BASE_MODEL` below stands for its folder." in card.text
    assert str(Path.cwd()) not in card.content and "/home/" not in card.content


def test_a_card_loads_what_is_there(run):
    export = RUN / "export"
    export.mkdir()
    (export / "config.json").touch()
    change(run, "model", path=str(Path.cwd()), bundled=False)
    assert "BASE_MODEL" not in model_card.card(run, export)
    shutil.rmtree(export)
    change(run, "model", id="org/base", path=None)
    for file, library, line in (
        ("adapter.gguf", "gguf", "llama-server -m BASE.gguf --lora adapter.gguf"),
        ("model.gguf", "gguf", "llama-server -m model.gguf"),
        ("config.json", "transformers", 'model = AutoModelForCausalLM.from_pretrained("ORG/NAME")'),
    ):
        export.mkdir()
        (export / file).touch()
        card = huggingface_hub.ModelCard(model_card.card(run, export))
        assert card.data.library_name == library and line in card.text
        assert ("`BASE.gguf` below stands for that model in GGUF." in card.text) == (file == "adapter.gguf")
        assert card.data.base_model_relation == ("adapter" if file == "adapter.gguf" else "finetune")
        shutil.rmtree(export)
    change(run, "model", kind="encoder")
    card = huggingface_hub.ModelCard(model_card.card(run, RUN / "adapter"))
    assert card.data.pipeline_tag == "text-classification" and "vllm serve" not in card.text
    assert 'AutoModelForSequenceClassification.from_pretrained("org/base", num_labels=2)' in card.text
    change(run, "model", kind="causal")
    (RUN / "adapter" / "adapter_config.json").unlink()
    assert 'adapter = lrk.load(model, snapshot_download("ORG/NAME"))' in model_card.card(run, RUN / "adapter")


@pytest.mark.parametrize("name", ["adapter_config.json", "lrk.json"])
def test_a_card_has_no_command_of_an_engine_that_refuses_the_adapter(run, name):
    file = RUN / "adapter" / name
    file.write_text(json.dumps(json.loads(file.read_text()) | {"use_dora": True, "model_type": "gpt2"}))
    assert "vllm serve" in (RUN / "adapter" / "README.md").read_text()
    model_card.write(run)
    text = (RUN / "adapter" / "README.md").read_text()
    assert "vllm serve" not in text and "lrk import ORG/NAME" in text


def test_a_card_says_how_to_use_exported_statistics(run):
    shutil.copytree(RUN / "adapter", RUN / "export")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (RUN / "export" / name).unlink()
    run.update(stage="export", status="running")
    text = model_card.card(run, RUN / "export")
    assert "AnswerProcessor.from_folder('FOLDER', model, tokenizer.eos_token_id)" in text
