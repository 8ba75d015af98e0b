"""What is printed while something takes long."""

import logging
import sys
import time

from fusion import console
from fusion.console import Heartbeat, heartbeat, print_rank_zero, printing


def test_silence_is_broken_by_a_line_and_no_line_comes_beside_others(capsys):
    with printing(), heartbeat("loading", every_s=0.1):
        time.sleep(0.35)
    assert capsys.readouterr().out.count("loading, for 0 s so far\n") in (2, 3)
    with printing(), heartbeat("loading", every_s=0.3):
        for _ in range(8):
            time.sleep(0.1)
            print_rank_zero("image")
    assert capsys.readouterr().out == "image\n" * 8


def test_a_sign_is_due_once_after_each_interval(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    sign = Heartbeat(30)
    found = []
    for now[0] in (29, 30, 31, 59, 60, 95, 96):
        found.append(sign.due())
    assert found == [False, True, False, False, True, True, False]


def test_what_is_said_is_printed_once_and_only_by_commands(capsys, caplog):
    print_rank_zero("nobody listens")
    with printing(), printing():
        print_rank_zero("printed")
    with caplog.at_level(logging.INFO, logger="fusion"):
        print_rank_zero("logged")
    assert capsys.readouterr().out == "printed\n"
    assert caplog.messages == ["logged"]


def test_a_process_without_lightning_knows_whether_it_is_the_first(monkeypatch):
    monkeypatch.delitem(sys.modules, "lightning.fabric.utilities.rank_zero", raising=False)
    for variables, first in (({}, True), ({"RANK": "0"}, True), ({"RANK": "3"}, False), ({"LOCAL_RANK": "1"}, False)):
        with monkeypatch.context() as patched:
            for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"):
                patched.delenv(name, raising=False)
            for name, value in variables.items():
                patched.setenv(name, value)
            assert console.is_rank_zero() == first
