"""Tasks of lm-eval over small data folders, asked of tiny models."""

import bz2
import gzip
import json
import shutil

import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

import secateur
from secateur.errors import ConfigError, CorpusError
from secateur.evaluation.harness import evaluate
from secateur.evaluation.programs.journal import Journal
from secateur.evaluation.questions import running
from secateur.evaluation.questions.adapter import JournalLM
from secateur.evaluation.questions.catalogue import QUESTIONS
from secateur.evaluation.questions.running import load_question
from secateur.models.source import load_tokenizer, resolve_model
from secateur.runtime.loading import open_model
from tests.tiny import save_tiny, tiny_tokenizer

RIVERS = [
    {"query": f"Question: Which way does river {n} flow?", "choices": ["up", "down the hill", "not at all"], "gold": 1}
    for n in range(7)
]
SUMS = [
    {"question": f"What is {n} and {n}?", "answer": f"It is <<{n}+{n}={2 * n}>>{2 * n}.\n#### {2 * n}"}
    for n in range(12)
]


def lines(records):
    return "".join(json.dumps(record) + "\n" for record in records).encode()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A data folder with a few documents of each task, plain and packed."""
    root = tmp_path_factory.mktemp("data")
    place = root / "benchmarks" / "commonsense"
    place.mkdir(parents=True)
    (place / "arc_easy.jsonl.gz").write_bytes(gzip.compress(lines(RIVERS)))
    (place / "piqa.jsonl").write_bytes(lines([{"query": "Question: How?\n", "choices": ["so", "or so"], "gold": 0}]))
    passage = {"query": "Passage: It rains.\nQuestion: does it rain?", "choices": ["no", "yes"], "gold": 1}
    (place / "boolq.jsonl").write_bytes(lines([passage]))
    pronoun = {"context_options": ["A saw B so A", "A saw B so B"], "continuation": "waved.", "gold": 1}
    (place / "winogrande.jsonl").write_bytes(lines([pronoun]))
    endings = "Roofs: he [title] climbs\n2\na [step] b\nb\nc\nd\n"
    (place / "hellaswag_val_full.txt.bz2").write_bytes(bz2.compress(endings.encode()))
    (root / "benchmarks" / "gsm8k").mkdir()
    (root / "benchmarks" / "gsm8k" / "test.jsonl").write_bytes(lines(SUMS))
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = save_tiny(tmp_path_factory.mktemp("models") / "base", "llama", max_position_embeddings=4096)
    tiny_tokenizer().save_pretrained(made)
    return made


def requests_of(loaded):
    loaded.task.build_all_requests(samples=list(loaded.places))
    return loaded.task.instances


def test_a_question_reads_as_lm_eval_writes_it(data):
    def asked(name):
        return [request.args for request in requests_of(load_question(name, data, None))]

    assert asked("arc-easy")[:3] == [
        ("Question: Which way does river 0 flow?\nAnswer:", f" {choice}") for choice in RIVERS[0]["choices"]
    ]
    assert asked("piqa") == [("Question: How?\nAnswer:", " so"), ("Question: How?\nAnswer:", " or so")]
    assert asked("boolq")[1] == ("It rains.\nQuestion: does it rain?\nAnswer:", " yes")
    assert asked("winogrande") == [("A saw B so A", " waved."), ("A saw B so B", " waved.")]
    assert asked("hellaswag")[:2] == [("Roofs: he. climbs", " a b"), ("Roofs: he. climbs", " b")]


def test_solved_examples_stand_before_a_question(data):
    loaded = load_question("gsm8k", data, 3)
    prompts = [request.args[0] for request in requests_of(loaded)]
    assert len(prompts) == 3
    for prompt, place in zip(prompts, loaded.places, strict=True):
        assert prompt.endswith(f"\n\nQ: What is {place} and {place}?\nA:")
        assert prompt.startswith("Q: There are 15 trees in the grove.")
        assert prompt.count("Q: ") == prompt.count("The answer is") + 1 == 9
    assert [request.args[0] for request in requests_of(load_question("gsm8k", data, 3))] == prompts


def test_answers_are_those_of_lm_evals_own_model(data, folder, tmp_path):
    """The torch engine beside lm-eval's way to run a transformers model, in float32."""
    resolved = resolve_model(str(folder))
    model = secateur.load(folder, engine="torch")
    model.model.float()
    peer = HFLM(open_model(resolved).float(), tokenizer=load_tokenizer(resolved), batch_size=1, max_length=4096)
    requests = requests_of(load_question("arc-easy", data, None))
    with Journal(tmp_path / "a.jsonl") as journal:
        ours = JournalLM(model, journal, lambda *_: None).loglikelihood(requests)
    theirs = peer.loglikelihood(requests, disable_tqdm=True)
    assert [one[0] for one in ours] == pytest.approx([one[0] for one in theirs], abs=1e-3)
    assert [one[1] for one in ours] == [one[1] for one in theirs]
    texts = [Instance("generate_until", {}, (f"a {n}", {"until": ["\n"], "max_gen_toks": 12}), 0) for n in range(5)]
    whole = [Instance("loglikelihood_rolling", {}, ("the river flows down the hill",), 0)]
    with Journal(tmp_path / "b.jsonl") as journal:
        ours = JournalLM(model, journal, lambda *_: None, batch=2)
        assert ours.generate_until(texts) == peer.generate_until(texts, disable_tqdm=True)
        assert ours.loglikelihood_rolling(whole) == pytest.approx(
            peer.loglikelihood_rolling(whole, disable_tqdm=True), abs=1e-3
        )


def test_native_and_torch_answer_nearly_alike(data, folder, tmp_path):
    requests = requests_of(load_question("arc-easy", data, None))
    found = []
    for engine in ("native", "torch"):
        model = secateur.load(folder, engine=engine)
        with Journal(tmp_path / engine) as journal:
            found.append([one[0] for one in JournalLM(model, journal, lambda *_: None).loglikelihood(requests)])
    assert found[0] == pytest.approx(found[1], rel=0.02)


def test_the_share_of_right_answers_is_told(data, folder, tmp_path, monkeypatch):
    """A model whose answers are known: of even rivers the right choice, of odd ones another."""

    def likely(self, requests):
        right = [int(one.args[0].split()[5]) % 2 == 0 for one in requests]
        return [(-float(("down" in one.args[1]) != even), False) for one, even in zip(requests, right, strict=True)]

    monkeypatch.setattr(JournalLM, "loglikelihood", likely)
    monkeypatch.setattr(
        JournalLM, "generate_until", lambda self, requests: ["so 4", "The answer is 6.", "The answer is 7.", "", "8 9"]
    )
    found = evaluate(folder, ["arc-easy", "gsm8k"], data=data, output=tmp_path / "out", problems=5)
    river = found.cell("arc-easy", str(folder)).result
    assert list(river.means) == ["acc", "acc_norm"]
    assert len(river.values) == 5
    assert river.values == {name: float(int(name.removeprefix("arc-easy/")) % 2 == 0) for name in river.values}
    assert 0 < river.main.value < 1
    sums = found.cell("gsm8k", str(folder)).result
    assert list(sums.means) == ["exact_match,flexible-extract", "exact_match,strict-match"]
    places = load_question("gsm8k", data, 5).places
    expected = {
        f"gsm8k/{place}": float(answer == 2 * place) for place, answer in zip(places, (4, 6, 7, None, 9), strict=True)
    }
    assert sums.values == expected
    assert "exact_match,flexible-extract of gsm8k" in found.to_table()


def test_a_matrix_goes_on_where_it_was(data, folder, tmp_path, monkeypatch):
    options = {"data": data, "problems": 6, "asking": secateur.evaluation.programs.generation.Asking(batch=2)}
    whole = evaluate(folder, ["arc-easy", "gsm8k"], against=folder, output=tmp_path / "whole", **options)
    append, count = Journal.append, 0

    def fail(self, records):
        nonlocal count
        count += 1
        if count == 11:
            raise KeyboardInterrupt
        append(self, records)

    monkeypatch.setattr(Journal, "append", fail)
    with pytest.raises(KeyboardInterrupt):
        evaluate(folder, ["arc-easy", "gsm8k"], against=folder, output=tmp_path / "again", **options)
    path = tmp_path / "again.partial" / folder.name / "gsm8k" / "samples.jsonl"
    path.write_bytes(path.read_bytes() + b'{"task_id":"gsm8k/')
    monkeypatch.undo()
    evaluate(folder, ["arc-easy", "gsm8k"], against=folder, output=tmp_path / "again", **options)
    for name in ("arc-easy", "gsm8k"):
        file = f"{folder.name}/{name}/samples.jsonl"
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    assert (tmp_path / "again/results.json").read_bytes() == (tmp_path / "whole/results.json").read_bytes()
    assert whole.settings["batch"] == 2
    assert whole.benchmarks["gsm8k"]["shots"] == 8


def test_what_cannot_be_asked_is_said_before_a_model_is_opened(data, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("secateur.load", lambda *_, **__: pytest.fail("a model was opened"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(CorpusError, match="no documents of rte were found, and the hub gives none"):
        evaluate(folder, ["rte"], data=data, output=tmp_path / "a")
    with pytest.raises(CorpusError, match=r"openbook_qa.jsonl\).*put the file at benchmarks/commonsense/openbook_qa"):
        evaluate(folder, ["openbookqa"], data=data, output=tmp_path / "a")
    damaged = tmp_path / "data"
    shutil.copytree(data, damaged)
    (damaged / "benchmarks/commonsense/boolq.jsonl").write_text('{"query": "?", "choices": ["yes", "no"], "gold": 1}')
    with pytest.raises(CorpusError, match=r"boolq\.jsonl has no documents of boolq: .*expected no and yes"):
        evaluate(folder, ["boolq"], data=damaged, output=tmp_path / "a")
    (damaged / "benchmarks/commonsense/hellaswag_val_full.txt.bz2").write_bytes(b"BZh9 no")
    with pytest.raises(CorpusError, match="cannot be read"):
        evaluate(folder, ["hellaswag"], data=damaged, output=tmp_path / "a")
    monkeypatch.setattr(running, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install 'secateur\[lm-eval\]'"):
        evaluate(folder, ["arc-easy"], data=data, output=tmp_path / "a")
    assert not list(tmp_path.glob("a*"))


@pytest.fixture(scope="module")
def stock():
    """The settings of lm-eval's own tasks."""
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    index = TaskManager().task_index
    return {name: load_yaml(index[one.stock].yaml_path) for name, one in QUESTIONS.items()}


@pytest.mark.parametrize("name", [name for name, one in QUESTIONS.items() if one.config])
def test_metrics_are_those_of_lm_evals_own_task(name, stock):
    ours = QUESTIONS[name].config
    assert ours["output_type"] == stock[name]["output_type"]
    assert [one["metric"] for one in ours["metric_list"]] == [one["metric"] for one in stock[name]["metric_list"]]


def test_every_task_is_one_of_lm_evals(stock):
    assert {name: one.stock for name, one in QUESTIONS.items()} == {name: one["task"] for name, one in stock.items()}
