import json

import pytest
from fakes import fake_document, outcome_of

from evenkeel.lab import experiment
from evenkeel.lab.cell import Results
from evenkeel.lab.demo import chosen, command
from evenkeel.lab.document import read_all
from evenkeel.lab.experiment import Plan, experiments
from evenkeel.lab.experiments.step_time import TOLERANCE, step_times
from evenkeel.lab.tuning import tune

NAMES = ["convergence", "learning_rate", "initialization", "hidden_moments", "step_time"]
SLOW = {"none": 3.0, "torch": 1.0, "evenkeel": 1.0}
SAME = {"none": 1.0, "torch": 1.0, "evenkeel": 1.0}


def section(name, **how):
    return next(each for each in fake_document(**how)["sections"] if each["name"] == name)


def test_the_experiments_are_those_of_the_demo():
    assert list(experiments()) == NAMES


@pytest.mark.parametrize("plan", [Plan.fully(), Plan.quickly(), Plan(8)])
def test_cells_are_distinct_within_an_experiment_and_cover_every_arm(plan):
    for each in experiments().values():
        cells = each.cells(plan)
        assert len({cell.key for cell in cells}) == len(cells)
        arms = {cell.axes["arm"] for cell in cells if "arm" in cell.axes}
        assert arms in ({"none", "torch", "evenkeel"}, set())


def test_the_full_plan_has_at_least_five_seeds_and_the_grids_that_are_asked_for():
    plan = Plan.fully()
    assert plan.seeds >= 5
    for name, axis, low, high in (
        ("learning_rate", "rates", 1e-3, 10),
        ("initialization", "scales", 1e-2, 10),
    ):
        for cell in experiments()[name].cells(plan):
            assert (min(cell.axes[axis]), max(cell.axes[axis])) == (low, high)


def test_more_seeds_reuse_the_cells_of_fewer():
    for each in experiments().values():
        fewer = {cell.key for cell in each.cells(Plan(3))}
        assert fewer < {cell.key for cell in each.cells(Plan(5))}


def test_the_document_is_plain_json_and_complete():
    document = fake_document()
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert [each["name"] for each in document["sections"]] == NAMES
    for each in document["sections"]:
        assert each["answer"].endswith(".")
        assert each["measures"]
        assert each["figures"]
        assert each["tables"]
        assert each["setup"]
        assert all(figure["description"] for figure in each["figures"])
        assert each["command"] == f"evenkeel demo --only {each['name']}"


def test_answers_follow_the_figures_in_either_direction():
    faster, slower = section("convergence"), section("convergence", speed=SLOW)
    assert "fewer steps" in faster["answer"]
    assert "more steps" in slower["answer"]
    assert "fewer steps" not in slower["answer"]
    assert "no clearly different" in section("convergence", speed=SAME)["answer"]
    assert "higher" in section("learning_rate")["answer"]
    assert "lower" in section("learning_rate", speed=SLOW)["answer"]
    assert "times less" in section("hidden_moments")["answer"]
    assert "times more" in section("hidden_moments", speed=SLOW)["answer"]


def test_a_target_that_is_not_reached_is_a_result():
    never = section("convergence", speed={"none": 0.0, "torch": 3.0, "evenkeel": 3.0})
    assert "at least" in never["answer"]
    measure = never["measures"][0]
    assert measure["values"]["none"] is None
    assert measure["texts"]["none"].startswith("none in")
    assert measure["numbers"]["bound"] == "at least"
    nobody = section("convergence", speed={"none": 0.0, "torch": 0.0, "evenkeel": 0.0})
    assert "can't be compared" in nobody["answer"]
    assert "can't be compared" in section("learning_rate", speed={"none": 0.0, "torch": 3.0, "evenkeel": 3.0})["answer"]


def curve_of(*accuracies_by_rate):
    """A result with three evaluations; each rate's validation accuracies over them."""
    validation = [list(row) for row in zip(*accuracies_by_rate, strict=True)]
    test = [[each - 1 for each in row] for row in validation]
    return {"steps": [0, 10, 20], "validation": validation, "test": test, "test_batch": test}


def test_the_rate_is_tuned_on_validation_data_and_not_for_one_lucky_seed():
    steady, lucky = (10, 92, 95), (10, 99, 99)
    never = (10, 10, 10)
    results = [curve_of(steady, lucky), curve_of(steady, never)]
    tuned = tune(results, [0.1, 1.0], 90.0)
    assert tuned.rate == 0.1
    assert tuned.row[0][1] == 2
    assert tuned.row[1][1] == 1
    # Validation chose; the steps reported are those on test data, which are later here.
    assert tuned.steps[0] == pytest.approx(10 * (90 - 9) / (91 - 9))


def test_a_best_rate_at_the_edge_of_the_grid_is_flagged():
    tuned = tune([curve_of((10, 20, 95), (10, 95, 95), (10, 20, 20))] * 2, [0.1, 0.2, 0.5], 90.0)
    assert not tuned.at_edge
    assert tune([curve_of((10, 95, 95), (10, 20, 95))] * 2, [0.1, 0.2], 90.0).at_edge


def test_where_no_run_gets_there_the_best_final_accuracy_decides():
    tuned = tune([curve_of((10, 20, 30), (10, 20, 60))] * 2, [0.1, 0.2], 90.0)
    assert tuned.index == 1
    assert tuned.steps == [None, None]


def test_cells_that_failed_are_told_and_only_their_seed_is_missing():
    def one(cell):
        return cell.axes["seed"] == 1 and cell.axes.get("arm") == "torch"

    document = fake_document(fails=one)
    assert document["run"]["failed"] > 0
    convergence = document["sections"][0]
    assert "ValueError: made to fail" in convergence["failures"][0]
    assert "torch, 1" in convergence["failures"][0]
    for measure in convergence["measures"]:
        # A comparison is paired: without one arm, the seed is out for all.
        assert {interval["n"] for interval in measure["values"].values() if interval} == {2}
    assert document["sections"][-1]["failures"] == []


def test_an_experiment_without_any_result_says_so_and_the_others_stand():
    document = fake_document(fails=lambda cell: cell.task.__name__ == "moments")
    hidden = document["sections"][NAMES.index("hidden_moments")]
    assert hidden["answer"].startswith("No answer: no seed of the network")
    assert hidden["figures"] == []
    assert all(each["measures"] for each in document["sections"] if each is not hidden)


def test_one_seed_left_gives_no_interval_and_no_claim():
    document = fake_document(plan=Plan(2, quick=True), fails=lambda cell: cell.axes["seed"] == 1)
    assert "[one seed]" in document["sections"][0]["measures"][0]["texts"]["none"]
    assert "no clearly different" in document["sections"][0]["answer"]


def test_choosing_by_name_keeps_the_order_and_refuses_the_unknown():
    assert [each.name for each in chosen(["step_time", "convergence"])] == ["convergence", "step_time"]
    assert len(chosen([])) == len(NAMES)
    with pytest.raises(ValueError, match="no experiment is named 'x'; there are convergence"):
        chosen(["x"])


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (Plan.fully(), "evenkeel demo"),
        (Plan.quickly(), "evenkeel demo --quick"),
        (Plan(8), "evenkeel demo --seeds 8"),
        (Plan(8, quick=True), "evenkeel demo --quick --seeds 8"),
    ],
)
def test_the_command_repeats_the_plan(plan, words):
    assert command(plan) == words


def test_an_experiment_is_a_file(tmp_path, monkeypatch):
    import evenkeel.lab.experiments as package

    (tmp_path / "another.py").write_text(
        "class Another:\n    name = 'another'\n    title = question = ''\n    order = 0\nEXPERIMENT = Another()\n"
    )
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    assert list(experiment.experiments()) == ["another", *NAMES]


def test_reading_needs_no_result_that_it_does_not_use():
    plan = Plan.quickly()
    only = chosen(["learning_rate"])
    (answer,) = read_all(only, plan, outcome_of(plan, only))
    assert answer.failures == ()
    with pytest.raises(ValueError, match="no seed"):
        only[0].read(plan, Results({}))


def test_step_times_are_of_steps_that_agree():
    result = step_times(network="mlp", widths=(16, 16, 16), batch=30, seed=0, budget=0.0)
    assert result["disagreement"] <= TOLERANCE
    assert result["rounds"] >= 6
    assert result["milliseconds"].keys() == result["to_none"].keys() == {"none", "torch", "evenkeel"}
    assert result["to_none"]["none"] == 1.0


def test_no_time_is_given_for_a_wrong_result(monkeypatch):
    from evenkeel.lab.experiments import step_time

    monkeypatch.setattr(step_time, "disagreement", lambda first, second, steps: 0.5)
    with pytest.raises(ArithmeticError, match="no time is given"):
        step_times(network="mlp", widths=(16, 16, 16), batch=30, seed=0, budget=0.0)
