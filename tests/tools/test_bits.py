"""The record of bits: its cases give the same digests again, and it sees when one is another."""

import json

import pytest
import torch

import dpo_kernels as dk
from tests.tools import bit_cases, bits

CASES = bit_cases.all_cases()
EAGER = [name for name, case in CASES.items() if not case.interpreted and case.within == "eager"]
FEW = "around/"  # in the names of a few quick cases


def test_a_sample_gives_the_same_bits_in_any_order():
    chosen = EAGER[:: len(EAGER) // 30]
    once, again = (bits.record({name: CASES[name] for name in order}) for order in (chosen, chosen[::-1]))
    assert bits.differences(once, again) == []
    assert len(set(once.values())) > len(chosen) // 2


def test_no_loss_is_left_out():
    assert {*bit_cases.NAMES, *bit_cases.WITHOUT_CASES} == set(dk.LOSSES)


def test_a_digest_sees_every_bit():
    plain = torch.tensor([0.0, 1.0])
    others = [
        torch.tensor([-0.0, 1.0]),
        torch.tensor([0.0, 1.0 + 2**-23]),
        plain[None],
        plain.view(torch.int32),
        plain.double(),
    ]
    assert len({bit_cases.digest(value) for value in (plain, *others)}) == 6
    assert bit_cases.digest(torch.tensor([0.0, 9.0, 1.0, 9.0])[::2]) == bit_cases.digest(plain)


def test_results_and_errors_are_told_apart():
    fine, refused = bit_cases.Case(), bit_cases.Case(loss="aot", strategy="chunked")
    assert {"loss", "dhidden 0", "dweight 0", "chosen_logps", "stats tokens"} <= bit_cases.results(fine).keys()
    assert bit_cases.digest_of(refused).startswith("ValueError ")


def test_settings_are_those_of_before():
    before = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    with bits.repeatable():
        assert torch.are_deterministic_algorithms_enabled()
    assert (torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()) == before


@pytest.fixture
def file(tmp_path):
    """A record of a few cases."""
    path = tmp_path / "bits.json"
    assert bits.main(["--write", str(path), "--only", FEW]) == 0
    return path


def check_after(file, change, capsys):
    """What ``--check`` ends with and says after a change of the record."""
    kept = json.loads(file.read_text())
    change(kept)
    file.write_text(json.dumps(kept))
    capsys.readouterr()
    return bits.main(["--check", str(file), "--only", FEW]), capsys.readouterr().out


def test_the_same_again(file, capsys):
    code, said = check_after(file, lambda kept: None, capsys)
    assert code == 0
    assert ", 0 of them" in said


def test_a_changed_digest_a_new_case_and_one_that_is_gone(file, capsys):
    changed, new, *_ = json.loads(file.read_text())["digests"]

    def change(kept):
        kept["digests"][changed] = "0" * 16
        del kept["digests"][new]
        kept["digests"][f"{FEW}gone"] = "1" * 16

    code, said = check_after(file, change, capsys)
    assert code == 1
    assert f"{changed}: {'0' * 16} -> " in said
    assert f"{new}: is new\n" in said
    assert f"{FEW}gone: is gone\n" in said
    assert ", 3 of them" in said


def test_another_machine_is_not_compared_with(file, capsys, monkeypatch):
    monkeypatch.setattr(bits, "record_all", lambda only: pytest.fail("compared"))
    code, said = check_after(file, lambda kept: kept["machine"].update(cpu="another"), capsys)
    assert code == 1
    assert "another machine" in said
    assert "cpu: another -> " in said
    assert "--write FILE" in said
