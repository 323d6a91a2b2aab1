"""The documentation's pages say what the stored run says, and the stored run says what the claims say."""

import copy
import json
from pathlib import Path

import pytest
from fakes import fake_document

from keelnorm.lab.core.claim import claims
from keelnorm.lab.core.plan import kind_of
from keelnorm.lab.reading.claim_pages import STORED, kept, main, pages, write_pages
from keelnorm.lab.reading.guide import guide, judged
from keelnorm.lab.reading.situations import SITUATIONS

DOCS = Path(__file__).parents[2] / "docs"
#: Of the bundled data alone, and with MNIST and recordings.
FOLDERS = {"claims": [], "claims_on_more_data": ["mnist", "speech"]}
LARGER_RUN = DOCS / "claims_on_more_data" / STORED


@pytest.fixture(scope="module", params=FOLDERS)
def folder(request):
    return DOCS / request.param


@pytest.fixture(scope="module")
def run(folder):
    return json.loads((folder / STORED).read_text(encoding="utf-8"))


def test_every_page_is_made_from_the_stored_run(run, folder):
    made = pages(run)
    assert {path.name for path in folder.iterdir()} == {STORED, *made}
    for name, text in made.items():
        assert (folder / name).read_text(encoding="utf-8") == text, f"{name}: make claims makes it again"


def test_the_stored_run_is_a_full_one_of_every_claim_as_it_is(run, folder):
    assert (run["plan"]["quick"], run["plan"]["seeds"]) == (False, None)
    assert sorted(kind_of(identity) for identity in run["plan"]["data"]) == FOLDERS[folder.name]
    assert run["run"]["failed"] == run["run"]["missing"] == 0
    assert [section["name"] for section in run["sections"]] == list(claims())
    for section in run["sections"]:
        claim = claims()[section["name"]]
        for part in ("number", "title", "statement", "question", "literature", "criterion"):
            assert section[part] == getattr(claim, part), f"{claim.name}: its {part} was edited; make claims"
        assert section["sources"] == [vars(source) for source in claim.sources]
        assert section["earlier"] == [vars(one) for one in claim.earlier]
        text = (folder / f"{claim.name}.md").read_text(encoding="utf-8")
        assert ("**Fixed beforehand.**" in text) == (not claim.earlier)
        for one in claim.earlier:
            assert f"**Criterion changed on {one.changed}, after results had been seen.** {one.why}" in text
            assert one.text in text


def test_it_is_small(run, folder):
    assert (folder / STORED).stat().st_size < 600_000
    assert all("figures" not in section for section in run["sections"])


def test_a_page_holds_verdict_findings_tables_and_command():
    run = kept(fake_document())
    text = pages(run)["fakes.md"]
    (section,) = run["sections"]
    for part in ("title", "statement", "answer", "criterion", "literature", "command"):
        assert section[part] in text
    for finding in section["findings"]:
        assert f"| {finding['where']} | {finding['quantity']} | {finding['text']} |" in text
    assert "**Holds.**" in text
    assert "(aside)" in text
    for row in section["tables"][0]["rows"]:
        assert f"| {' | '.join(row)} |" in text


def test_where_the_data_lay_is_nobody_s_business():
    document = fake_document()
    for place in ("/home/me/data", "'/home/me/my data'"):
        document["command"] = f"keelnorm lab run --full --data-dir {place} --seeds 3"
        document["sections"][0]["command"] = f"keelnorm lab run fakes --data-dir {place}"
        text = json.dumps(kept(document))
        assert "home" not in text
        assert "--data-dir FOLDER --seeds 3" in text
        assert "--data-dir FOLDER" in pages(kept(document))["fakes.md"]


def test_a_bar_in_a_cell_does_not_break_the_table():
    run = copy.deepcopy(kept(fake_document()))
    run["sections"][0]["tables"][0]["rows"][0][0] = "|x|"
    assert "| \\|x\\| |" in pages(run)["fakes.md"]


def test_pages_of_claims_that_are_no_more_go_away(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps(fake_document()))
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "old.md").write_text("old")
    main([str(tmp_path / "run.json"), str(tmp_path / "docs")])
    assert {path.name for path in (tmp_path / "docs").iterdir()} == {
        "README.md", "fakes.md", "run.json", "which_normalization.md"
    }  # fmt: skip
    again = json.loads((tmp_path / "docs" / "run.json").read_text())
    assert write_pages(again, tmp_path / "other")
    assert (tmp_path / "other" / "fakes.md").read_text() == (tmp_path / "docs" / "fakes.md").read_text()


def test_the_command_says_how_it_is_called():
    with pytest.raises(SystemExit, match=r"RUN\.json FOLDER"):
        main([])


OPTIONS = [option for situation in SITUATIONS for option in situation.options]


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: f"{option.claim}: {option.what}")
def test_every_option_has_findings(option):
    """A quantity that is renamed would leave its line out of the guide."""
    run = json.loads(LARGER_RUN.read_text(encoding="utf-8"))
    found = option.findings({section["name"]: section for section in run["sections"]})
    assert found
    assert len({one["quantity"] for one in found}) == 1
    assert not any("stand-in" in one["where"] for one in found)


@pytest.mark.parametrize(
    ("outcomes", "wanted"),
    [
        (["supports"], "yes"),
        (["supports", "supports"], "yes"),
        (["contradicts"], "no"),
        (["contradicts", "not resolved"], "no"),
        (["supports", "contradicts"], "it depends"),
        (["supports", "contradicts", "not resolved"], "it depends"),
        (["supports", "not resolved"], "not shown"),
        (["not resolved"], "not shown"),
    ],
)
def test_what_findings_say_together(outcomes, wanted):
    assert judged(outcomes) == wanted


def test_the_guide_follows_the_findings():
    """The same run with each finding turned into its opposite gives the opposite answers."""
    run = json.loads(LARGER_RUN.read_text(encoding="utf-8"))
    opposite = {"supports": "contradicts", "contradicts": "supports", "not resolved": "not resolved"}
    turned = json.loads(LARGER_RUN.read_text(encoding="utf-8"))
    for section in turned["sections"]:
        for one in section["findings"]:
            one["outcome"] = opposite[one["outcome"]]
    answers = [
        {
            row.split(" | ")[0]: row.split(" | ")[1].rpartition(",")[0]
            for row in guide(each).splitlines()
            if row.startswith("| [")
        }
        for each in (run, turned)
    ]
    assert answers[0].keys() == answers[1].keys()
    assert len(answers[0]) > 30
    for line, said in answers[0].items():
        then = answers[1][line]
        if said == "yes":
            assert then == "no"
        elif said == "it depends":
            assert then == "it depends"
        else:
            assert then in ("yes", "no", "not shown")


def test_a_run_of_some_claims_gives_those_lines(run):
    text = pages(run)["which_normalization.md"]
    names = {section["name"] for section in run["sections"]}
    for situation in SITUATIONS:
        assert (situation.title in text) == any(option.claim in names for option in situation.options)
