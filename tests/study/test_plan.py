"""A study as data: what is read, what is refused, and which runs it asks for."""

from pathlib import Path

import pytest
import yaml

from mpvg.study.folder import StudyFolder, make_folder, open_folder
from mpvg.study.plan import Study, make_cells, parse_study, read_study, ready_studies, to_dict
from study_text import TEXT


@pytest.mark.parametrize("name", ready_studies())
def test_a_ready_study_is_valid_at_every_scale_and_survives_a_round_trip(name: str) -> None:
    study = read_study(name)
    assert study.name == name
    assert parse_study(yaml.safe_dump(to_dict(study), sort_keys=False).encode(), name) == study
    for scale, settings in study.scales.items():
        cells = make_cells(study, scale, Path("out"))
        assert len({cell.key for cell in cells}) == len(cells) == sum(len(study.arms) * s.seeds for s in settings)
        assert len({cell.config.digest() for cell in cells}) == len(cells), "two runs of a study are the same"


@pytest.mark.parametrize("name", [name for name in ready_studies() if "tiny" in read_study(name).scales])
def test_the_networks_of_a_ready_study_can_run_its_arms(name: str, tmp_path: Path) -> None:
    assert StudyFolder(tmp_path, read_study(name), "tiny").refused == {}


def test_an_arm_changes_its_fields_and_nothing_else(study: Study) -> None:
    by_key = {cell.key: cell.config for cell in make_cells(study, "tiny", Path("out"))}
    gap, pvg = by_key["digits", "gap", 1].to_dict(), by_key["digits", "pvg", 1].to_dict()
    assert {name for name in gap if gap[name] != pvg[name]} == {"method", "out"}
    assert by_key["digits", "gap_again", 1001].seed == 1001
    assert (gap["threads"], gap["device"], gap["out"]) == (1, "cpu", "out/runs/digits/gap/seed1")
    assert gap["optim"]["warmup_epochs"] == pytest.approx(1 / 25)  # the recipe's share of the epochs


def test_every_arm_has_a_seed_before_one_has_the_next(study: Study) -> None:
    arms = [cell.arm for cell in make_cells(study, "tiny", Path("out"))]
    assert arms == ["gap", "pvg", "gap_again"] * 2


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("reference: gap", "reference: gpa", "reference: unknown arm 'gpa'; did you mean gap"),
        ("{pvg: 1, gap: -1}", "{pgv: 1, gap: -1}", "contrasts.pvg_over_gap: unknown arm 'pgv'; did you mean pvg"),
        ("{pvg: 1, gap: -1}", "{pvg: 1, gap: 1}", "weights other than 0 that add up to 0"),
        ("{pvg: 1, gap: -1}", "{pvg: 0}", "weights other than 0 that add up to 0"),
        ("{method: pvg}", "{method: pvgg}", "unknown method 'pvgg'"),
        ("{method: pvg}", "{methd: pvg}", "unknown config field 'methd'; did you mean method"),
        ("{method: pvg}", "{seed: 3}", "unknown config field 'seed'"),
        ("{method: pvg}", "{lr: -1}", "lr is -1; allowed: a number > 0"),
        ("recipe: digits", "recipe: digit", "unknown recipe 'digit'; did you mean digits"),
        ("seeds: 2", "seeds: 0", "seeds is 0; allowed: a whole number"),
        ("seeds: 2", "seeds: two", "seeds is 'two'; allowed: int"),
        ("margins: {nll: 0.02, accuracy: 0.01}", "margins: {}", "margins is {}; allowed: metric -> number > 0"),
        ("  tiny:", "  huge:", "scales is ['huge']; allowed: tiny, small, paper"),
        ("  pvg: {label", "  ../pvg: {label", "allowed as a name"),
        ("scales:", "scales:\n  paper: {}", "tiny, small, paper, each with a setting"),
        ("study: mini", "study: ../mini", "study has '../mini'; allowed as a name: letters"),
        ("  pvg: {label", "  gap: {label", "it has the key gap twice"),
        ("question:", "qestion:", "unknown key 'qestion'; did you mean question"),
    ],
)
def test_a_study_that_is_not_valid_is_refused_with_the_place(old: str, new: str, said: str) -> None:
    assert old in TEXT
    with pytest.raises(ValueError, match="mini.yaml") as caught:
        parse_study(TEXT.replace(old, new, 1).encode(), "mini.yaml")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_seven_contrasts_are_refused() -> None:
    more = "".join(f"  more{n}: {{weights: {{pvg: 1, gap: -1}}}}\n" for n in range(5))
    with pytest.raises(ValueError, match="contrasts are 7; allowed: at most 6"):
        parse_study(TEXT.replace("scales:", f"{more}scales:").encode(), "mini.yaml")


def test_an_unknown_study_names_near_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown study 'tabel1'; did you mean table1"):
        read_study("tabel1")


def test_a_folder_keeps_its_study_and_refuses_another(study: Study, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made = make_folder(out, study, "tiny", seeds=3)
    assert open_folder(out) == made
    assert make_folder(out, study, "tiny") == made, "the seeds that were asked for are kept"
    assert make_folder(out, study, "tiny", seeds=5).seeds == 5
    other = parse_study(TEXT.replace("epochs: 1,", "epochs: 2,").encode(), "mini.yaml")
    with pytest.raises(ValueError, match="holds the study with other arms or settings; give another --out"):
        make_folder(out, other, "tiny")
    with pytest.raises(ValueError, match=r"another data \(None, now elsewhere\)"):
        make_folder(out, study, "tiny", data="elsewhere")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thing").write_text("")
    with pytest.raises(ValueError, match="is not empty and holds no study"):
        make_folder(tmp_path / "full", study, "tiny")
    with pytest.raises(FileNotFoundError, match="holds no study"):
        open_folder(tmp_path / "full")


def test_an_arm_that_a_network_cannot_run_is_left_out_with_the_reason(tmp_path: Path) -> None:
    text = TEXT.replace("{method: pvg}", "{method: mpvg_last11}")
    folder = StudyFolder(tmp_path, parse_study(text.encode(), "mini.yaml"), "tiny")
    assert {cell.arm for cell in folder.cells()} == {"gap", "gap_again"}
    assert "last_index 11 asks for pos_11" in folder.refused["digits", "pvg"]


def test_the_study_in_the_docs_is_valid() -> None:
    text = (Path(__file__).parents[2] / "docs/study.md").read_text().split("```yaml\n")[1].split("```")[0]
    assert len(make_cells(parse_study(text.encode(), "docs/study.md"), "tiny", Path("out"))) == 4 * 8


def test_a_repetition_with_seeds_in_common_is_refused(tmp_path: Path) -> None:
    study = parse_study(TEXT.encode(), "mini.yaml")
    same = next(arm for arm in study.arms if arm.first_seed)
    with pytest.raises(
        ValueError, match=f"with {same.first_seed + 1} seeds from 0 and from {same.first_seed} they share"
    ):
        make_cells(study, "tiny", tmp_path, seeds=same.first_seed + 1)
    assert make_cells(study, "tiny", tmp_path, seeds=3)
