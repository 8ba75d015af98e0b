"""What is printed while something takes long."""

import time

from fusion import console
from fusion.console import SignOfLife, print_rank_zero, signs_of_life


def test_silence_is_broken_by_a_line_and_no_line_comes_beside_others(capsys):
    with signs_of_life("loading", every_s=0.1):
        time.sleep(0.35)
    assert capsys.readouterr().out.count("loading, for 0 s so far\n") in (2, 3)
    with signs_of_life("loading", every_s=0.3):
        for _ in range(8):
            time.sleep(0.1)
            print_rank_zero("image")
    assert capsys.readouterr().out == "image\n" * 8


def test_a_sign_is_due_once_after_each_interval(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    sign = SignOfLife(30)
    found = []
    for now[0] in (29, 30, 31, 59, 60, 95, 96):
        found.append(sign.due())
    assert found == [False, True, False, False, True, True, False]
