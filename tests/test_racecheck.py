"""The reader of racecheck's output (tests/racecheck.py), on what its releases print."""

import gpu_suite
import pytest
import racecheck

SUMMARY = "========= RACECHECK SUMMARY: {} hazards displayed (0 errors, {} warnings)\n"
KERNEL = "void flashmla::sm90::forward_kernel<flashmla::sm90::ForwardTile<(int)64, (int)64>, (bool)0>(flashmla::Params)"


def warning(kernel, *accesses):
    """A report: the first access, then those it races with."""
    (kind, place), *others = accesses
    lines = [f"========= Warning: Race reported between {kind} access at {place.format(kernel)}"]
    lines += [f"=========     and {kind} access at {place.format(kernel)} [16 hazards]" for kind, place in others]
    return "\n".join(lines) + "\n=========\n"


@pytest.fixture
def accepted(tmp_path, monkeypatch):
    path = tmp_path / "accepted.txt"
    path.write_text("# of one test\nforward_kernel | Read | Write\n")
    monkeypatch.setattr(racecheck, "ACCEPTED", path)
    return path


@pytest.mark.parametrize("place", ["0x1a0 in {}", "{}+0x1a0"])
def test_hazards_of_a_build_without_line_numbers_have_kernels_and_kinds(place):
    output = warning(KERNEL, ("Write", place), ("Read", place)) + SUMMARY.format(1, 1)
    assert racecheck.hazards(output) == {"forward_kernel | Read | Write"}


@pytest.mark.parametrize("place", ["0x1a0 in /somewhere/csrc/sm90/tiles.h:1:{}", "{}+0x1a0 in /somewhere/csrc/sm90/tiles.h:1"])  # fmt: skip
def test_hazards_of_a_build_with_line_numbers_have_the_source_text(place):
    output = warning(KERNEL, ("Write", place), ("Read", place), ("Write", place)) + SUMMARY.format(2, 2)
    first = " ".join((racecheck.ROOT / "csrc/sm90/tiles.h").read_text().splitlines()[0].split())
    assert racecheck.hazards(output) == {
        f"forward_kernel | Read tiles.h: {first} | Write tiles.h: {first}",
        f"forward_kernel | Write tiles.h: {first} | Write tiles.h: {first}",
    }


def test_an_error_is_a_hazard_like_a_warning():
    output = warning("f(int *)", ("Read", "{}+0x90"), ("Write", "{}+0xa0")).replace("Warning", "Error")
    assert racecheck.hazards(output) == {"f | Read | Write"}


def test_unreadable_output_is_refused_and_a_report_of_no_hazard_gives_none():
    with pytest.raises(ValueError, match="expected to read 121 hazards, got none"):
        racecheck.hazards("========= hazards in a form of its own\n" + SUMMARY.format(121, 121))
    with pytest.raises(ValueError, match="expected a kernel and an offset"):
        racecheck.hazards(warning("f", ("Read", "somewhere"), ("Write", "elsewhere")))
    assert racecheck.hazards(SUMMARY.format(0, 0)) == set()


def test_a_new_hazard_fails_the_step_and_a_known_one_passes(accepted):
    step = next(step for step in gpu_suite.PARTS["sanitize"] if step.tool == "racecheck")
    known = warning(KERNEL, ("Write", "{}+0x10"), ("Read", "{}+0x20"))
    other_kernel = known.replace("forward_kernel", "backward_kernel")
    other_kind = known.replace("and Read", "and Write")
    assert gpu_suite.verdict(step, 0, known + SUMMARY.format(1, 1)) == "passed"
    for new in (other_kernel, other_kind):
        assert gpu_suite.verdict(step, 0, known + new + SUMMARY.format(2, 2)).startswith("FAILED: 1 new hazard")
    assert gpu_suite.verdict(step, 0, SUMMARY.format(5, 5)).startswith("FAILED: ")


def test_the_found_set_prints_in_the_format_of_the_accepted_one(accepted, tmp_path, capsys):
    log = tmp_path / "racecheck.log"
    log.write_text(warning(KERNEL, ("Write", "{}+0x10"), ("Write", "{}+0x20")) + SUMMARY.format(1, 1))
    assert racecheck.main([str(log)]) == 1
    assert "new: 1\n  forward_kernel | Write | Write\n" in capsys.readouterr().out
    assert racecheck.main([str(log), "--print"]) == 0
    accepted.write_text(capsys.readouterr().out)
    assert racecheck.main([str(log)]) == 0


def test_the_committed_list_can_be_read():
    assert all(line.count(" | ") >= 2 for line in racecheck.accepted())


def test_every_accepted_hazard_names_lines_that_the_sources_have():
    for hazard in racecheck.accepted():
        for place in hazard.split(" | ")[1:]:
            name, text = place.split(" ", 1)[1].split(": ", 1)
            sources = list((racecheck.ROOT / "csrc").rglob(name))
            lines = {" ".join(line.split()) for path in sources for line in path.read_text().splitlines()}
            assert not sources or text in lines, place
