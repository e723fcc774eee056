"""What part of a run the kernels take, as bench/kernel_shares.py counts it."""

import json
from pathlib import Path

import pytest
from kernel_inputs import needs_triton

BENCH = Path(__file__).parents[2] / "bench"
LAYERS = 6


@pytest.fixture(scope="module")
def bench():
    """The modules of bench/ that the tests need; its directory is not on the path otherwise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        import clock_rates
        import kernel_cases
        import kernel_shares
        import plans

        yield {each.__name__: each for each in (clock_rates, kernel_cases, kernel_shares, plans)}


@pytest.fixture(scope="module")
def checkpoint(bench, tmp_path_factory):
    path = tmp_path_factory.mktemp("headers") / "llama"
    bench["plans"].write_headers(path, bench["plans"].MODELS["llama-2-7b"] | {"num_hidden_layers": LAYERS})
    return path


@needs_triton
def test_scores_take_their_bytes_at_the_rate_that_was_reached(bench, checkpoint):
    """Of a layer's matrices o and down are scored by columns, the others by rows; each weight has two bytes."""
    options = {"layers": (1, 5)}
    found = bench["kernel_shares"].by_the_clock(checkpoint, "h100", "magnitude", options)
    figures = json.loads((BENCH / "results" / "kernels-h100.json").read_text())
    reached = {figure["kernel"]: figure["share"] for figure in figures}
    memory, weights = bench["clock_rates"].machine_of("h100").memory, {"rows": 3 * 4096**2 + 2 * 4096 * 11008}
    weights["columns"] = 4096**2 + 4096 * 11008
    expected = {
        f"{lines[:-1]}_score": 4 * 2 * count / memory / reached[f"unit_score square, {lines}"]
        for lines, count in weights.items()
    }
    assert dict(found.kernels) == pytest.approx(expected, rel=0.01)  # and a number for each line
    assert found.run > found.scoring > sum(expected.values())


@needs_triton
@pytest.mark.parametrize(
    "method,options",
    [
        ("taylor", {"granularity": "weights"}),
        ("moreau", {"settings": {"steps": 2}}),
        ("moreau-gs", {"settings": {"steps": 2}}),
        ("wanda", {"granularity": "4:8"}),
        ("gblm", {}),
        ("sparsegpt", {"granularity": "2:4"}),
    ],
)
def test_every_start_is_one_of_the_cases_that_are_measured(method, options, bench, checkpoint, monkeypatch):
    shares, seen = bench["kernel_shares"], set()
    seconds_of = shares.seconds_of
    monkeypatch.setattr(
        shares, "seconds_of", lambda launch, *rest: seen.add(shares.case_of(launch)) or seconds_of(launch, *rest)
    )
    shares.by_the_clock(checkpoint, "h100", method, {"layers": (1, 3), "samples": 4, **options})
    names = {case.name for case in bench["kernel_cases"].cases()}
    # grad_norm's rate is the machine's own.
    assert seen and seen <= names | {"grad_norm"}


def test_what_is_wanted_is_of_the_run_and_without_grad_norm(bench):
    shares = bench["kernel_shares"].Shares(scoring=10.0, run=20.0, kernels={"perturb": 0.4, "grad_norm": 5.0})
    assert shares.cells == ["10.0", "20.0", "4.0%", "2.0%", "25.0%", "met", "perturb 2.0%"]
    more = bench["kernel_shares"].Shares(10.0, 20.0, {"perturb": 0.4, "gram": 0.3})
    assert more.cells[3:] == ["3.5%", "0.0%", "MISSED", "perturb 2.0%, gram 1.5%"]


def test_a_profile_is_asked_for_our_kernels_only(bench):
    seen = {"perturb_kernel": 2e6, "gram_kernel": 1.0, "ampere_sgemm": 9e6, "void at::native::copy": 1e6}
    assert bench["kernel_shares"].ours(seen) == {"perturb": 2.0, "gram": 1e-6}
