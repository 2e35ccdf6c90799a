"""Tasks of lm-eval over small data folders, asked of tiny models."""

import bz2
import gzip
import json
import re

import datasets
import numpy as np
import pytest
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM

import secateur
from secateur.errors import ConfigError, CorpusError
from secateur.evaluation.harness import evaluate
from secateur.evaluation.journal import Journal
from secateur.evaluation.questions import loading
from secateur.evaluation.questions.adapter import JournalLM
from secateur.evaluation.questions.asking import built
from secateur.evaluation.questions.catalogue import QUESTIONS
from secateur.evaluation.questions.loading import load_question
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
    return built(loaded.task, loaded.places)


def lm(model, journal, **options):
    return JournalLM(model, journal, lambda *_: None, name="task", **options)


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
        ours = lm(model, journal).loglikelihood(requests)
    theirs = peer.loglikelihood(requests, disable_tqdm=True)
    assert [one[0] for one in ours] == pytest.approx([one[0] for one in theirs], abs=1e-3)
    assert [one[1] for one in ours] == [one[1] for one in theirs]
    texts = [Instance("generate_until", {}, (f"a {n}", {"until": ["\n"], "max_gen_toks": 12}), 0) for n in range(5)]
    whole = [Instance("loglikelihood_rolling", {}, ("the river flows down the hill",), 0)]
    with Journal(tmp_path / "b.jsonl") as journal:
        ours = lm(model, journal, batch=2)
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
            found.append([one[0] for one in lm(model, journal).loglikelihood(requests)])
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


def test_every_model_is_asked_the_same(data):
    loaded = load_question("gsm8k", data, 4)
    asked = [[request.args for request in requests_of(loaded)] for _ in range(2)]
    assert asked[0] == asked[1]
    assert loaded.sha256 == load_question("gsm8k", data, 4).sha256 != load_question("gsm8k", data, 3).sha256


def test_other_prompts_or_files_are_not_gone_on_with(data, folder, tmp_path, monkeypatch):
    known = load_question("arc-easy", data, None).described()
    assert known["source"] == "commonsense/arc_easy.jsonl.gz of the data folder"
    monkeypatch.setitem(QUESTIONS["arc-easy"].config, "doc_to_text", "{{query}}\nReply:")
    assert load_question("arc-easy", data, None).sha256 != known["sha256"]
    requests = requests_of(load_question("piqa", data, None))
    with Journal(tmp_path / "a.jsonl") as journal:
        journal.append([{"task_id": "other/0", "log_likelihood": -1.0, "greedy": False}])
        with pytest.raises(ConfigError, match=r"an answer to 'other/0', not to 'task/0': delete the folder"):
            lm(secateur.load(folder), journal).loglikelihood(requests)


def test_a_trimmed_head_that_knows_no_choice_is_told(data, folder, tmp_path, monkeypatch):
    """All likelihoods are 0: the first choice is no better than another."""
    model = secateur.load(folder)
    score = type(model.backend).log_likelihood

    def unknown(self, token_ids, begin):
        values, likeliest = score(self, token_ids, begin)
        return values - np.inf, likeliest

    monkeypatch.setattr(type(model.backend), "log_likelihood", unknown)
    found = evaluate(folder, ["piqa", "winogrande"], data=data, output=tmp_path / "out")
    cell = found.cell("piqa", str(folder)).result  # whose right choice is the first
    assert (cell.main.value, cell.outcomes) == (0.0, {"impossible": 1})
    assert "2 questions count as wrong" in found.to_table()
    assert "Infinity" not in (tmp_path / "out" / folder.name / "piqa" / "samples.jsonl").read_text()
    assert found.models[0].engine == "native"


@pytest.mark.parametrize("engine", ["native", "torch"])
def test_what_is_too_long_loses_its_beginning_or_is_refused(engine, tmp_path):
    made = save_tiny(tmp_path / "short", "llama", max_position_embeddings=64)
    model = secateur.load(made, engine=engine)

    def asked(context, choice):
        with Journal(tmp_path / f"{len(context)}-{len(choice)}") as journal:
            found = lm(model, journal).loglikelihood([Instance("loglikelihood", {}, (context, choice), 0, ("t", 0, 1))])
            return found[0][0], journal.records[0]

    whole, record = asked("a" * 59, " b c d")
    assert "shortened" not in record
    cut, record = asked("x" * 30 + "a" * 59, " b c d")
    assert record["shortened"]
    assert cut == pytest.approx(whole, abs=0.2)
    for choice in ("", "b" * 65):
        with pytest.raises(ConfigError, match=r"a choice of task/0 has (0|65) tokens; the model takes 1 to 64"):
            asked("a", choice)
    request = Instance("generate_until", {}, ("a" * 60, {"until": ["x"], "max_gen_toks": 8}), 0, ("t", 3, 1))
    with Journal(tmp_path / "long") as journal, pytest.raises(ConfigError, match=r"task/3 cannot be asked: prompt of"):
        lm(model, journal).generate_until([request])


def test_other_settings_are_not_gone_on_with(data, folder, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(folder, ["arc-easy"], data=data, output=tmp_path / "out", problems=3, progress=stop)
    for options, message in (
        ({"problems": 4}, r"another benchmarks \(arc-easy\) \(sha256\), "),
        (
            {"problems": 3, "limit": 77},
            r"another settings \(tokens_per_domain\), 8000 instead of 77",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            evaluate(folder, ["arc-easy"], data=data, output=tmp_path / "out", **options)


def test_what_cannot_be_asked_is_said_before_a_model_is_opened(data, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("secateur.load", lambda *_, **__: pytest.fail("a model was opened"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(CorpusError, match="no documents of rte were found, and the hub gives none"):
        evaluate(folder, ["rte"], data=data, output=tmp_path / "a")
    with pytest.raises(CorpusError, match=r"openbook_qa.jsonl\).*put the file at benchmarks/commonsense/openbook_qa"):
        evaluate(folder, ["openbookqa"], data=data, output=tmp_path / "a")
    monkeypatch.setattr(loading, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install 'secateur\[lm-eval\]'"):
        evaluate(folder, ["arc-easy"], data=data, output=tmp_path / "a")
    assert not list(tmp_path.glob("a*"))


@pytest.mark.parametrize(
    ("name", "file", "content", "message"),
    [
        (
            "boolq",
            "commonsense/boolq.jsonl",
            b'{"query": "?", "choices": ["yes", "no"], "gold": 1}',
            "expected no and yes",
        ),
        (
            "piqa",
            "commonsense/piqa.jsonl",
            b'{"query": "?", "choices": ["a", ""], "gold": 1}',
            "'' where text is expected",
        ),
        ("piqa", "commonsense/piqa.jsonl", b'{"query": "?", "choices": ["a"], "gold": 0}', "expected two or more"),
        (
            "piqa",
            "commonsense/piqa.jsonl",
            b'{"query": "?", "choices": ["a", "b"], "gold": 2}',
            "right choice is 2 of 2",
        ),
        ("piqa", "commonsense/piqa.jsonl", b"\n", "it is empty"),
        ("piqa", "commonsense/piqa.jsonl", b"[1]", "line 1 is no object"),
        ("piqa", "commonsense/piqa.jsonl", b"\xff", "UnicodeDecodeError"),
        ("gsm8k", "gsm8k/test.jsonl", b'{"answer": "#### 1"}', "KeyError"),
        ("hellaswag", "commonsense/hellaswag_val_full.txt", b"a\n1\nb\n", "no groups of six"),
        ("hellaswag", "commonsense/hellaswag_val_full.txt.bz2", b"BZh9 no", "cannot be read"),
    ],
)
def test_a_damaged_file_is_named(name, file, content, message, tmp_path):
    path = tmp_path / "benchmarks" / file
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    with pytest.raises(CorpusError, match=re.escape(message)) as caught:
        load_question(name, tmp_path, None)
    assert path.name in str(caught.value)


def test_a_model_in_another_place_of_the_list_is_another_run(data, tmp_path):
    """Folders of models whose names end alike are told apart by their number."""
    bases = [save_tiny(tmp_path / one / "base", "llama", seed=seed) for seed, one in enumerate("ab")]
    from secateur.evaluation.measuring import places
    from secateur.evaluation.plan import make_plan

    def planned(models):
        return places(make_plan(models, ["piqa"], against=None, limit=8, data=data, skip_missing=False))

    assert planned(bases) == {str(bases[0]): "1-base", str(bases[1]): "2-base"}
    assert planned(bases[::-1]) == {str(bases[1]): "1-base", str(bases[0]): "2-base"}


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


HUB = {
    "hellaswag": [
        {"activity_label": "Roof", "ctx_a": "A man sits.", "ctx_b": "he", "endings": ["a [step] b", "c"], "label": "1"},
        {"activity_label": "Tea", "ctx_a": "Boil [title] water.", "ctx_b": "", "endings": ["a", "c"], "label": "0"},
    ],
    "winogrande": [{"sentence": "A saw B so _ waved.", "option1": "A", "option2": "B", "answer": "2"}],
    "arc-easy": [
        {"question": "Which way?", "choices": {"label": ["A", "B"], "text": ["up", "down"]}, "answerKey": "B"}
    ],
    "openbookqa": [
        {"question_stem": "A river is", "choices": {"label": ["A", "B"], "text": ["wet", "dry"]}, "answerKey": "A"}
    ],
    "piqa": [{"goal": "How?", "sol1": "so", "sol2": "or so", "label": 1}],
    "gsm8k": [{"question": "What is 1 and 1?", "answer": "It is 2.\n#### 2"}],
}
FILES = {
    "hellaswag": b"Roof: A man sits. he\n1\na [step] b\nc\nx\ny\nTea: Boil [title] water.\n0\na\nc\nx\ny\n",
    "winogrande": lines([{"context_options": ["A saw B so A", "A saw B so B"], "continuation": "waved.", "gold": 1}]),
    "arc-easy": lines([{"query": "Question: Which way?", "choices": ["up", "down"], "gold": 1}]),
    "openbookqa": lines([{"query": "A river is", "choices": ["wet", "dry"], "gold": 0}]),
    "piqa": lines([{"query": "Question: How?\n", "choices": ["so", "or so"], "gold": 1}]),
    "gsm8k": lines(HUB["gsm8k"]),
}


@pytest.mark.parametrize("name", list(HUB))
def test_what_is_asked_is_what_lm_eval_asks_about_the_hubs_documents(name, stock, tmp_path):
    """The same documents in the hub's fields, through lm-eval's own settings, and in the files of a data folder."""
    settings = {key: value for key, value in stock[name].items() if key not in ("dataset_path", "dataset_name", "tag")}
    documents = datasets.Dataset.from_list(HUB[name])
    settings["custom_dataset"] = lambda **_: dict.fromkeys(("train", "validation", "test"), documents)
    theirs = ConfigurableTask(config=settings)
    path = tmp_path / "benchmarks" / QUESTIONS[name].file
    path.parent.mkdir(parents=True)
    path.write_bytes(FILES[name])
    ours = load_question(name, tmp_path, None)
    theirs.set_config(key="num_fewshot", value=ours.question.shots)
    places = ours.places
    expected = [(one.args[0], one.args[1], theirs.doc_to_target(one.doc)) for one in built(theirs, places)]
    found = [(one.args[0], one.args[1], ours.task.doc_to_target(one.doc)) for one in requests_of(ours)]
    if name == "hellaswag":  # its files have four endings for each
        found = [one for one in found if one[1] not in {" x", " y"}]
        expected = [(context, ending, int(gold)) for context, ending, gold in expected]
    assert found == expected


def test_every_task_is_one_of_lm_evals(stock):
    assert {name: one.stock for name, one in QUESTIONS.items()} == {name: one["task"] for name, one in stock.items()}
