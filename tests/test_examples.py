"""Shortened examples of training and generation: they learn, resume and generate."""

import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import generate
import lm
import train_lm

SMALL = ["--dim", "32", "--heads", "2", "--layers", "2", "--batch", "4", "--length", "64", "--check", "500"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """One thread: a step of these models is too short for more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Words in random order: pairs of bytes tell part of what follows, words the rest."""
    generator = torch.Generator().manual_seed(0)
    words = ["retention ", "recurrence ", "decay ", "attention ", "chunk "]
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("".join(words[i] for i in torch.randint(len(words), (4000,), generator=generator)))
    return str(path)


def train(*arguments):
    console = Console(record=True, width=100)
    return *train_lm.train(train_lm.options_of([*SMALL, *map(str, arguments)]), console), console.export_text()


@pytest.fixture(scope="module")
def trained(text, tmp_path_factory):
    run = tmp_path_factory.mktemp("trained")
    return run, *train(text, "--steps", 120, "--every", 60, "--run", run)


def test_it_learns_more_than_pairs_of_bytes(trained):
    run, final, baselines, printed = trained
    assert final < 0.9 * baselines["bigram"] < baselines["unigram"]
    assert f"{final:.3f}" in printed and (run / "loss.png").stat().st_size > 1000
    assert [step for step, _ in torch.load(run / "checkpoint.pt")["validated"]] == [60, 120]


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(text, tmp_path):
    whole, *_ = train(text, "--steps", 4, "--run", tmp_path / "whole")
    for arguments in (["--minutes", 0], ["--minutes", 0, "--resume"], ["--resume"]):
        final, _, printed = train(text, "--steps", 4, "--run", tmp_path / "parts", *arguments)
        assert ("the time is up" in printed) == ("--minutes" in arguments)
    assert final == whole
    losses = [torch.load(tmp_path / run / "checkpoint.pt")["losses"] for run in ("whole", "parts")]
    assert len(losses[0]) == 4 and losses[0] == losses[1]


def test_an_interrupted_run_leaves_a_checkpoint(text, tmp_path, monkeypatch):
    batch = train_lm.batch

    def interrupted(training, step, options):
        if step == 3:
            raise KeyboardInterrupt
        return batch(training, step, options)

    monkeypatch.setattr(train_lm, "batch", interrupted)
    *_, printed = train(text, "--steps", 9, "--run", tmp_path)
    assert "interrupted after step 2; --resume goes on" in printed
    assert torch.load(tmp_path / "checkpoint.pt")["step"] == 2


def test_pieces_of_the_validation_text_make_no_difference(monkeypatch):
    torch.manual_seed(0)
    model, text = lm.LanguageModel(32, 2, 2), torch.randint(256, (700,))
    whole = lm.bits(model(text[None, :-1]), text[None, 1:]).item()
    monkeypatch.setattr(train_lm, "PIECE", 128)
    assert abs(train_lm.validate(model, text) - whole) < 1e-4


def test_both_ways_generate_the_same(trained, capsys):
    console = Console(record=True, width=100)
    arguments = ["attention ", "--run", str(trained[0]), "--bytes", "200", "--quadratic", "--show", "20"]
    arguments += ["--temperature", "0.3"]
    text, columns = generate.main(arguments, console)
    assert "both ways gave the same 200 first bytes" in console.export_text()
    assert len(text) == 200 and {len(rates) for rates in columns.values()} == {generate.REPORTS}
    words = text.decode().split()
    assert sum(word in {"retention", "recurrence", "decay", "attention", "chunk"} for word in words) > len(words) / 2
    assert capsys.readouterr().out.startswith("attention " + text[:20].decode() + " ...\n")
    assert (trained[0] / "speed.png").stat().st_size > 1000


def test_characters_of_several_bytes_are_shown_whole(capsys):
    text = "Größe: 5 €"
    with generate.Shown(Console(quiet=True), 14, 14) as shown:
        for byte in text.encode():
            shown.write(byte)
    assert capsys.readouterr().out == text + " ...\n"


def test_a_checkpoint_of_other_things_is_named(trained, tmp_path):
    path = tmp_path / "checkpoint.pt"
    whole = (trained[0] / "checkpoint.pt").read_bytes()
    for write in (
        lambda: path.write_bytes(b""),
        lambda: path.write_bytes(whole[:5000]),
        lambda: path.write_text("words"),
        lambda: torch.save({"model": {}}, path),
        lambda: torch.save(
            torch.load(trained[0] / "checkpoint.pt") | {"config": {"dim": 64, "heads": 2, "layers": 2}}, path
        ),
    ):
        write()
        with pytest.raises(SystemExit, match=r"checkpoint\.pt: is damaged, or not of this example"):
            lm.load(path)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda run, text: train(text, "--run", run / "none", "--resume"), "No such file or directory; train first"),
        (lambda run, text: train("no such text", "--run", run / "none"), "no such text: No such file"),
        (lambda run, text: train("/dev/null", "--run", run / "none"), "/dev/null: expected at least 1280 bytes"),
        (lambda run, text: train(text, "--run", __file__ + "/none"), "none: Not a directory; --run takes another"),
        (lambda run, text: train(text, "--run", run / "none", "--dim", "31"), "a model of dim 31, 2 heads, 2 layers"),
        (lambda run, text: train(text, "--run", run), "--resume goes on from it"),
        (lambda run, text: train(text, "--run", run, "--resume", "--dim", "16"), "is of a model with"),
        (
            lambda run, text: train(__file__, "--run", run / "none", "--length", "9000"),
            "expected at least 180000 bytes",
        ),
        (lambda run, text: generate.main(["", "--run", str(run)], Console()), "expected at least one character"),
    ],
    ids=[
        "no checkpoint",
        "no file",
        "no text",
        "no folder",
        "no such model",
        "a checkpoint",
        "another model",
        "short text",
        "no prompt",
    ],
)
def test_what_is_refused(trained, text, call, message):
    with pytest.raises(SystemExit) as error:
        call(trained[0], text)
    assert message in str(error.value)


def test_a_model_of_mamba2_learns_and_generates(text, tmp_path):
    final, baselines, _ = train(text, "--model", "mamba2", "--steps", 160, "--every", 160, "--run", tmp_path)
    assert final < baselines["bigram"]
    console = Console(record=True, width=100)
    made, columns = generate.main(["attention ", "--run", str(tmp_path), "--bytes", "50"], console)
    assert len(made) == 50 and list(columns) == ["by state"]
    with pytest.raises(SystemExit, match="--quadratic: expected a model of attention, got one of mamba2"):
        generate.main(["attention ", "--run", str(tmp_path), "--bytes", "20", "--quadratic"], console)
