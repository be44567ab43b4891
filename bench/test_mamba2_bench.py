"""Tests of the record mamba2_speed: its rows, its time, and the pages that are made of it."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

pytest.importorskip("transformers")
import mamba2_models as models
import mamba2_rivals
import mamba2_speed as speed
import pages
import transformers
from leetcore.bench import results as of
from mamba2_calls import Heads
from mamba2_speed import Case, Row


def tiny() -> list[Case]:
    """A case of each kind."""
    found = {
        "prefill": partial(speed.prefill, Heads(1, 4, 70, 16, 8, 2), "bfloat16", True, False),
        "prefill without transformers": partial(speed.prefill, Heads(1, 4, 90, 16, 8, 2), "float32", False, False),
        "decoding": partial(speed.decoding, Heads(2, 4, 1, 16, 8, 2), "float32"),
        "convolution": partial(speed.convolution, 40, 64, "float32", "silu"),
    }
    for kind in models.KINDS:
        found[f"{kind} of a model"] = partial(models.compare, "a model", 64, kind, 2, 3, "float32", 1)
    return [Case(text, prepare) for text, prepare in found.items()]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> of.Results:
    """A record of tiny cases, written and read, with a case that fails."""

    def broken() -> Any:
        raise MemoryError("too large")

    with pytest.MonkeyPatch.context() as environment:
        for variable in mamba2_rivals.VARIABLES.values():
            environment.delenv(variable, raising=False)
        environment.setattr(mamba2_rivals.machine, "installed", lambda package: None)
        mamba2_rivals.versions.cache_clear()
        mamba2_rivals.versions()
    file = tmp_path_factory.mktemp("record") / "mamba2_speed-x.json"
    of.write(file, speed.measure([*tiny(), Case("broken", broken)], 0, 3, lambda text: None))
    return of.read(file)


def test_a_record_has_every_case_with_enough_samples(results: of.Results) -> None:
    rows, absent = results["rows"], mamba2_rivals.ABSENT
    assert results["kind"] == "mamba2_speed"
    assert results["facts"]["failed"] == {"broken": "MemoryError: too large"}
    rivals = {"transformers": transformers.__version__, "vllm": absent, "ggml": absent, "onnxruntime": absent}
    assert results["facts"]["rivals"] == rivals
    assert {row["status"] for row in rows} == {"ok"}
    assert min(row["seconds"]["n"] for row in rows) == of.FEWEST
    methods = ["leetcore.ssd", "leetcore.linear_attention", "transformers"]
    methods += ["leetcore.ssd", "leetcore.linear_attention", "leetcore.ssd_step", "transformers"]
    methods += ["leetcore.causal_conv1d", "torch conv1d", *["patched", "transformers"] * len(models.KINDS)]
    assert [row["method"] for row in rows] == methods
    firsts = {"leetcore.ssd", "leetcore.ssd_step", "leetcore.causal_conv1d", "patched"}
    assert all(("ratio" in row) == (row["method"] not in firsts) for row in rows)
    assert [row["G"] for row in rows[:7]] == [2] * 7
    assert all(row["fraction"]["median"] > 0 for row in rows if row["work"])


def test_a_ratio_is_the_median_of_ratios_in_the_same_round() -> None:
    ours, theirs = (Row(name, "rival", Heads(1, 1, 1, 1, 1), "float32", "", work=1.0) for name in "ab")
    ours.seconds, theirs.seconds, theirs.base = [1.0, 10.0, 2.0, 3.0], [2.0, 10.0, 6.0], ours
    ours.ceilings, theirs.ceilings = [1.0] * 4, [1.0] * 3
    assert theirs.to_json()["ratio"]["median"] == 2.0
    assert "ratio" not in ours.to_json()


def test_time_is_shared_out() -> None:
    def row(took: float) -> Row:
        return Row("a", "leetcore", Heads(1, 1, 1, 1, 1), "float32", "", call=lambda: None, took=took)

    assert speed.affordable([row(0.1)], 100, 25, 0.05) == 25
    assert speed.affordable([row(0.1)], 1.65, 25, 0.05) == 10
    assert speed.affordable([row(0.1)], 0, 25, 0.05) == speed.LEAST
    assert speed.affordable([row(0.1)], 0, 3, 0.05) == 3
    assert speed.affordable([row(0.1), row(2.0)], 9.8, 25, 0.05) == 10  # three samples of the slow row


def test_cases_are_those_of_the_record() -> None:
    found = {name: list(cases(False)) for name, cases in (speed.SECTIONS | {"models": models.cases}).items()}
    assert {name: len(cases) for name, cases in found.items()} == {
        "prefill": 8 * 3 + 3 * 3 + 2 * 3,
        "decoding": 2 * 4 * 2,
        "convolution": 4,
        "models": 2 * 2 * 6,
    }
    texts = [case.text for cases in found.values() for case in cases]
    assert len(set(texts)) == len(texts)


def test_pages_have_a_table_of_each_kind(results: of.Results) -> None:
    text = pages.mamba2_speed(results)
    for wanted in (
        "| dtype | of matmul | `leetcore.ssd` | `leetcore.linear_attention` | ratio | transformers | ratio |",
        "| 4 x 8 | 16 | 2 | 70 | bfloat16 |",
        "| heads | state | batch | dtype | of copy | `leetcore.ssd_step` | transformers | ratio |",
        "| silu | 64 | float32 |",
        "| training | a model | 2 | 3 | float32 |",
    ):
        assert wanted in text
    assert "| - | - |" in text, "transformers has no row of the second prefill"
    assert "Memory" not in text
    assert "Not installed, and so not measured: vllm, ggml, onnxruntime." in text
    measured = {**results, "rows": [row | {"peak_bytes": 1 << 20} for row in results["rows"]]}
    assert "| 70 | 1 MiB | 1 MiB | 1 MiB |" in pages.mamba2_speed(measured)


def test_the_headline_names_processor_and_commit(results: of.Results, monkeypatch: pytest.MonkeyPatch) -> None:
    assert pages.mamba2_headline(results) == pages.NO_SPEED, "no row has the heads of Granite-4-H-tiny"
    rows = [row | {"H": 48} | ({"ratio": {"median": 5.26}} if "ratio" in row else {}) for row in results["rows"]]
    made = {**results, "rows": rows, "commit": "abc", "warnings": []}
    text = pages.mamba2_headline(made).replace("\n", " ")
    assert f"On {results['device']['processor']}, " in text
    assert "prefill of 3 tokens takes **5.3 times** less time" in text and "commit abc" in text
    assert "Do not quote" in pages.mamba2_headline({**made, "warnings": ["the machine was not quiet"]})


def test_a_rival_that_cannot_be_loaded_is_named(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in mamba2_rivals.VARIABLES.values():
        monkeypatch.setenv(variable, str(tmp_path / "nothing.so"))
    found = mamba2_rivals.versions.__wrapped__()
    assert {found[name] for name in mamba2_rivals.VARIABLES} == {"failed: OSError"}


def test_pages_say_that_no_record_exists(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "RESULTS", tmp_path)
    for name in ("mamba2 speed", "mamba2 headline"):
        assert pages.PARTS[name]() == pages.NO_SPEED
