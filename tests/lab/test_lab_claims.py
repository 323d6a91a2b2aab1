"""What holds for every claim: what its file says, the work it asks for, and a whole quick run of all of them."""

import hashlib
import json
import math
import subprocess
import sys
from datetime import date
from pathlib import Path

import plotly.graph_objects
import pytest

from keelnorm.lab.core.cell import Results
from keelnorm.lab.core.claim import chosen, claims
from keelnorm.lab.core.plan import Plan, kind_of
from keelnorm.lab.core.runner import Outcome, attempt_on_one_thread, stored
from keelnorm.lab.core.store import Store
from keelnorm.lab.reading.document import document
from keelnorm.measure.page.html import page
from keelnorm.measure.page.plots import plotly_figure

SEEDS = 2
EVERYTHING = Plan(quick=False, data=("mnist@00000000", "images@00000000", "speech@00000000.6"))


def test_numbers_follow_each_other():
    assert [claim.number for claim in claims().values()] == list(range(1, len(claims()) + 1))


@pytest.mark.parametrize("claim", claims().values(), ids=lambda claim: claim.name)
def test_a_claim_says_what_it_is_before_it_is_run(claim):
    for text in (claim.title, claim.statement, claim.literature, claim.criterion):
        assert text.strip() == text != ""
    assert claim.statement.endswith(".")
    assert claim.question.endswith("?")
    assert claim.criterion.startswith("Holds if")
    assert claim.sources
    assert all(source.url.startswith("https://") and source.text for source in claim.sources)


#: For each claim with stored results the digests of all criteria that it has had, oldest first.
CRITERIA = Path(__file__).with_name("criteria.txt")
STORED = Path(__file__).parents[2] / "docs/claims/run.json"


def test_no_criterion_changes_in_silence():
    """An edited criterion fails here until the one before is in the claim's `earlier`, which the pages show."""
    kept = dict(line.split(": ") for line in CRITERIA.read_text().splitlines())
    measured = [section["name"] for section in json.loads(STORED.read_text(encoding="utf-8"))["sections"]]
    now = {
        name: " ".join(digest(text) for text in (*(one.text for one in claim.earlier), claim.criterion))
        for name, claim in claims().items()
        if name in measured
    }
    assert now == kept


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@pytest.mark.parametrize("claim", claims().values(), ids=lambda claim: claim.name)
def test_changes_of_a_criterion_are_told(claim):
    for one in claim.earlier:
        assert date.fromisoformat(one.changed) <= date(2100, 1, 1)
        assert one.text.startswith("Holds if")
        assert one.why.endswith(".")
        assert one.text != claim.criterion


@pytest.mark.parametrize("claim", claims().values(), ids=lambda claim: claim.name)
@pytest.mark.parametrize("plan", [Plan(), Plan(quick=False), EVERYTHING], ids=["quick", "full", "data"])
def test_the_work_is_cut_into_cells_of_its_own(claim, plan):
    cells = claim.cells(plan)
    assert len({cell.key for cell in cells}) == len(cells)
    for cell in cells:
        json.loads(json.dumps(dict(cell.axes)))
        assert "seed" in cell.axes
        assert 0 < cell.cost < 60
        assert getattr(sys.modules[cell.module], cell.task.__name__) is cell.task  # another process finds it by name
    # Data that only the reader has come in where the claim says that it can use them, and only there.
    used = {kind_of(str(cell.axes["data"])) for cell in cells if "data" in cell.axes}
    known = {word for each in claim.data for word in each.replace("(", " ").split()}
    if plan is EVERYTHING:
        assert used & {"mnist", "images", "speech"} == known & {"mnist", "images", "speech"}
    else:
        assert not used & {"mnist", "images", "speech"}


def test_quick_is_less_work_than_full():
    for claim in claims().values():
        quick, full = (sum(cell.cost for cell in claim.cells(Plan(quick=form))) for form in (True, False))
        assert quick < full, claim.name


def test_a_claim_is_chosen_by_name_or_number():
    assert [claim.name for claim in chosen(["4", "convergence"])] == ["convergence", "gradients"]
    with pytest.raises(ValueError, match="no claim is named '99'; there are 1 convergence, 2 learning_rate"):
        chosen(["99"])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A quick run of everything, as a user starts it: its document and its results."""
    out = tmp_path_factory.mktemp("lab") / "lab.html"
    command = [sys.executable, "-m", "keelnorm", "lab", "run", "--quick", "--seeds", str(SEEDS), "--jobs", "2"]
    ended = subprocess.run([*command, "--json", "--out", str(out)], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout), out


@pytest.mark.slow
def test_every_claim_has_a_verdict_with_intervals(whole):
    made, _ = whole
    assert made["run"]["failed"] == made["run"]["missing"] == 0
    assert [section["name"] for section in made["sections"]] == list(claims())
    for section in made["sections"]:
        assert section["verdict"] in ("holds", "depends", "does not hold", "not resolved"), section["answer"]
        decisive = [finding for finding in section["findings"] if finding["decisive"]]
        assert decisive
        for finding in decisive:
            effect = finding["effect"]
            if finding["bound"] != "unknown":
                assert all(math.isfinite(effect[end]) for end in ("low", "value", "high")), finding
                assert effect["low"] <= effect["value"] <= effect["high"]
        assert section["figures"]
        assert section["tables"]


@pytest.mark.slow
def test_every_figure_can_be_drawn_and_says_what_it_shows(whole):
    made, _ = whole
    for section in made["sections"]:
        for figure in section["figures"]:
            plotly.graph_objects.Figure(plotly_figure(figure))  # raises on a property that does not exist
            assert len(figure["description"]) > 40
            assert any(character.isdigit() for character in figure["description"]), figure["title"]
            for series in figure["series"]:
                assert len(series["x"]) == len(series["y"]), figure["title"]
        for table in section["tables"]:
            assert all(len(row) == len(table["columns"]) for row in table["rows"]), table["caption"]


@pytest.mark.slow
def test_the_page_of_everything_is_small_enough(whole):
    made, out = whole
    assert out.stat().st_size < 6_000_000
    assert page(made) == out.read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_cell_run_again_alone_gives_the_same_numbers(whole):
    _, out = whole
    plan = Plan(quick=True, seeds=SEEDS)
    store = Store(out.with_suffix(".jsonl"))
    for claim in claims().values():
        cells = [cell for cell in claim.cells(plan) if not cell.exclusive]
        for cell in sorted(cells, key=lambda cell: cell.cost)[:1]:
            _, again, _ = attempt_on_one_thread(None, cell)
            assert json.loads(json.dumps(again)) == store.get(cell)[0], cell.label()


SWAPPED = {"none": "bn", "bn": "none"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["learning_rate", "initialization", "hyperparameters", "convergence"])
def test_with_arms_exchanged_the_claim_does_not_hold(whole, name):
    """The same numbers with "none" and "bn" exchanged: what reads them can say the opposite."""
    _, out = whole
    plan = Plan(quick=True, seeds=SEEDS)
    claim = claims()[name]
    kept = stored(claim.cells(plan), Store(out.with_suffix(".jsonl"))).results
    by_axes = {cell.key: cell for cell in claim.cells(plan)}

    def other(cell):
        wanted = {**cell.axes, "arm": SWAPPED.get(cell.axes["arm"], cell.axes["arm"])}
        # Batch norm may be trained for fewer steps.
        return next(
            each.key for each in by_axes.values() if {**each.axes, "evaluate_at": wanted["evaluate_at"]} == wanted
        )

    swapped = Results({key: kept[other(cell)] for key, cell in by_axes.items()})
    before, after = claim.read(plan, Results(kept)), claim.read(plan, swapped)
    outcomes = [
        (first.outcome, second.outcome)
        for first, second in zip(before.findings, after.findings, strict=True)
        if first.decisive
    ]
    assert "supports" not in {second for _, second in outcomes}
    assert after.answer != before.answer


@pytest.mark.slow
def test_a_failed_cell_leaves_an_answer_from_the_other_seeds_or_says_that_there_is_none(whole):
    _, out = whole
    plan = Plan(quick=True, seeds=SEEDS)
    for claim in claims().values():
        cells = claim.cells(plan)
        kept = stored(cells, Store(out.with_suffix(".jsonl"))).results
        without = {key: result for key, result in kept.items() if key != cells[0].key}
        made = document("t", [claim], plan, Outcome(results=without), command="keelnorm lab run")
        assert made["run"]["missing"] == 1
        assert made["sections"][0]["answer"]
        empty = document("t", [claim], plan, Outcome(), command="keelnorm lab run")["sections"][0]
        assert empty["verdict"] == "no answer"
        assert empty["answer"].startswith("No answer: ")


def test_private_modules_are_no_claims():
    folder = Path(sys.modules["keelnorm.lab.claims"].__file__).parent
    files = {path.stem for path in folder.glob("*.py") if not path.stem.startswith("_")}
    assert files == claims().keys()
