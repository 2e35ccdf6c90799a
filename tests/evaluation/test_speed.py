"""Timing on tiny models: that the questions are put and the answers add up, not how fast anything is."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from secateur.errors import ConfigError, SecateurError
from secateur.evaluation import speed_runners, speed_worker
from secateur.evaluation.speed import Speed, SpeedReport, benchmark
from secateur.evaluation.speed_peers import Peer, find_peer, told_apart
from secateur.evaluation.speed_tables import render
from secateur.evaluation.speed_worker import Worker
from tests.tiny import save_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("models") / "parent", "qwen2")


@pytest.fixture
def submodel(model, tmp_path):
    """A folder that says what it was derived from; a parent is all that peers ask of it."""
    for file in model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "secateur.json").write_text(json.dumps({"recipe": {"model": str(model)}}))
    return tmp_path


def test_every_question_is_put_to_every_model_in_every_round(submodel):
    steps = []
    report = benchmark(
        submodel,
        ["torch"],
        threads=1,
        rounds=2,
        prompt_lengths=(8, 20),
        new_tokens=3,
        batch=2,
        progress=lambda text, done, total: steps.append((done, total)),
    )
    assert [(speed.name, speed.kind) for speed in report.models] == [
        (submodel.name, "native"),
        ("parent, torch", "torch"),
    ]
    for speed in report.models:
        assert set(speed.tokens_per_second) == {"prefill 8", "prefill 20", "decode", "decode x2"}
        assert all(len(rounds) == 2 and min(rounds) > 0 for rounds in speed.tokens_per_second.values())
        assert speed.resident_mb > speed.private_mb > 1
        assert speed.load_seconds > 0.01
        assert speed.disk_mb == pytest.approx(sum(f.stat().st_size for f in submodel.iterdir()) / 1e6, rel=0.05)
    native, torch_peer = report.models
    assert 0 < native.read_mb < native.disk_mb
    assert len(native.unpacking_ms) == 2
    assert min(native.unpacking_ms) > 0
    assert all(bound >= unpacking for bound, unpacking in zip(native.bound_ms, native.unpacking_ms, strict=True))
    assert (torch_peer.read_mb, torch_peer.unpacking_ms, torch_peer.bound_ms) == (None, (), ())
    assert len(report.bandwidth_gb_per_second) == 2
    assert steps[-1] == (7, 8)
    assert json.loads(json.dumps(report.to_dict()))["threads"] == 1


def report_of(*models: Speed, busy: float = 0.0) -> SpeedReport:
    return SpeedReport(models, 2, 3, (10.0, 12.0, 11.0), busy, "a machine")


OURS = Speed("sub", "native", 300.4, 0.51, 400.0, 90.0, {"decode": (10.0, 40.0, 20.0), "decode x8": (90.0,)})
PEER = Speed("llama.cpp Q8_0", "llama.cpp", 676.0, 1.5, 700.0, 50.0, {"decode": (10.0, 8.0, 30.0)})


def test_table_shows_medians_and_how_many_times_as_fast():
    lines = render(report_of(OURS, PEER)).splitlines()
    assert lines[0].split() == ["sub", "llama.cpp", "Q8_0"]
    assert lines[2].split() == ["decode,", "tokens/s", "20.0", "10.0", "(x2.00)"]
    assert lines[3].split() == ["decode", "x8,", "tokens/s", "90.0", "-"]
    assert "memory bandwidth, read: 11.0 GB/s" in lines[-1]


def test_limits_are_shown_as_fractions():
    limited = dataclasses.replace(OURS, read_mb=275.0, unpacking_ms=(30.0, 35.0, 36.0), bound_ms=(41.0, 40.0, 39.0))
    line = render(report_of(limited, PEER)).splitlines()[-1]
    assert line == (
        "sub: decode reads 275 MB a token, 5.5 GB/s, 50% of the bandwidth; "
        "unpacking alone takes 35.0 ms, 70% of the time of a token; with what binds each weight 40.0 ms, 80%"
    )


def test_busy_machine_is_called_busy():
    assert "too busy to measure" in render(report_of(OURS, busy=0.4))
    assert "too busy" not in render(report_of(OURS, busy=0.05))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("vllm", "no peer 'vllm': known are native, native:FOLDER, torch"),
        ("torch:x", "no peer 'torch:x'"),
        ("llama.cpp:Q9", "needs the parent as a GGUF"),
        ("llama.cpp", "name one as llama.cpp:FILE.gguf"),
    ],
)
def test_peers_that_are_not_known(submodel, spec, message):
    with pytest.raises(ConfigError, match=message):
        find_peer(spec, submodel)


def test_peers(submodel, tmp_path):
    gguf = tmp_path / "parent.gguf"
    gguf.write_bytes(b"GGUF")
    assert find_peer(f"llama.cpp:{gguf}", submodel).path == str(gguf)
    (submodel / "secateur.json").write_text(json.dumps({"recipe": {"model": str(gguf)}}))
    assert find_peer("llama.cpp", submodel).path == str(gguf)
    assert find_peer("native", submodel).path == str(gguf)
    assert find_peer("native:other/sub", submodel) == Peer("sub", "native", "other/sub")
    (submodel / "secateur.json").write_text("{}")
    with pytest.raises(ConfigError, match="does not say what it was derived from"):
        find_peer("native", submodel)


def test_a_model_that_cannot_be_loaded_is_one_clear_error(tmp_path):
    with pytest.raises(SecateurError, match="there is no model"):
        Worker("native", str(tmp_path / "nothing"), 1)
    with pytest.raises(SecateurError, match="no engine 'abacus'"):
        Worker("abacus", "demo", 1)


@pytest.mark.parametrize("options", [{"rounds": 0}, {"new_tokens": 0}, {"batch": 0}, {"prompt_lengths": (8, 0)}])
def test_numbers_that_cannot_be(submodel, options):
    with pytest.raises(ConfigError, match="at least 1"):
        benchmark(Path(submodel), **options)


def test_a_worker_that_dies_is_named(model):
    worker = Worker("native", str(model), 1)
    worker._process.kill()
    worker._process.wait()
    with pytest.raises(SecateurError, match="ended while it was timed, with signal SIGKILL"):
        worker.ask("memory")
    worker.close()


def test_what_loads_through_torch_is_timed_through_torch(tmp_path):
    folder = save_tiny(tmp_path / "float32", "llama", dtype=torch.float32)
    report = benchmark(folder, threads=1, rounds=1, prompt_lengths=(4,), new_tokens=2, batch=1)
    assert report.models[0].kind == "torch"


def test_texts_longer_than_a_model_reads_are_refused(submodel):
    with pytest.raises(ConfigError, match=r"texts of 9000 tokens are longer than the \d+ positions"):
        benchmark(submodel, threads=1, rounds=1, prompt_lengths=(9000,), new_tokens=1, batch=1)


def test_peers_of_one_name_go_under_their_paths():
    peers = [Peer("sub", "auto", "a/sub"), Peer("sub", "native", "b/sub"), Peer("other", "native", "c/other")]
    assert [peer.name for peer in told_apart(peers)] == ["a/sub", "b/sub", "other"]


def test_a_gguf_that_is_not_there(submodel):
    with pytest.raises(ConfigError, match=r"no file 'nothing\.gguf'"):
        find_peer("llama.cpp:nothing.gguf", submodel)


def test_what_a_library_raises_is_one_line(tmp_path, monkeypatch, capsys):
    def broken(*_):
        raise ValueError("cannot\n   read it")

    monkeypatch.setattr(speed_runners, "open_runner", broken)
    speed_worker.main("llama.cpp", "x.gguf", 1)
    assert json.loads(capsys.readouterr().out) == {"error": "it cannot be loaded (cannot read it)"}


def test_what_a_shell_says_about_waiting_threads_slows_nobody(monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    monkeypatch.setenv("GOMP_SPINCOUNT", "0")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("SECATEUR_CACHE", "/somewhere")
    found = speed_worker.environment(2)
    assert "OMP_WAIT_POLICY" not in found
    assert "GOMP_SPINCOUNT" not in found
    assert (found["OMP_NUM_THREADS"], found["SECATEUR_CACHE"]) == ("2", "/somewhere")
