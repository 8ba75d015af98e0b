"""Versions side by side: routing, comparison, promotion, rollback by command and by limits, reload."""

import asyncio
import time

import numpy as np
import pytest
from serving import Parity, asked, counted, service_of, until, version_of

from fusion.cli.serve import serve
from fusion.deploy.serve.answers import agree, answers_of
from fusion.deploy.serve.canary import RollbackLimits, Watch
from fusion.deploy.serve.control import canary_of
from fusion.deploy.serve.limits import Limits, Rejected
from fusion.deploy.serve.model import Loaded
from fusion.deploy.serve.service import Job
from fusion.deploy.serve.versions import Versions
from fusion.errors import UserError
from fusion.predictions import Predictions

SIGNED = {"x-fusion-control": "1"}


def versions_of(*shares: float, **limits: float) -> Versions:
    versions = Versions(version_of(Parity(), "main"), RollbackLimits(**limits))  # type: ignore[arg-type]
    for i, share in enumerate(shares):
        versions.add_canary(version_of(Parity(), f"canary {i}"), share)
    return versions


def test_a_canary_gets_its_share_of_the_requests_by_their_ids():
    versions = versions_of(0.05, 0.2)
    routed = [versions.route(f"request {i}").name for i in range(20_000)]
    shares = {name: routed.count(name) / len(routed) for name in set(routed)}
    # Four standard deviations of a binomial share.
    for name, share in {"canary 0": 0.05, "canary 1": 0.2, "main": 0.75}.items():
        assert abs(shares[name] - share) < 4 * (share * (1 - share) / len(routed)) ** 0.5
    assert routed == [versions.route(f"request {i}").name for i in range(20_000)]


def test_all_requests_may_go_to_canaries():
    versions = versions_of(0.5, 0.5)
    assert {versions.route(str(i)).name for i in range(200)} == {"canary 0", "canary 1"}


def test_canaries_of_more_than_all_requests_are_rejected():
    with pytest.raises(UserError, match=r"60 % \+ 50 % = 110 % of the requests; expected at most 100 %"):
        versions_of(0.6, 0.5)
    with pytest.raises(UserError, match=r"60 % \+ 50 % = 110 %"):
        serve(["nowhere", "--canary", "a=60%", "--canary", "b=50%"])


@pytest.mark.parametrize("text", ["new", "new=5", "new=0%", "new=101%", "=5%", "new=many%", "new=-1%", "new=nan%"])
def test_a_canary_without_a_share_between_0_and_100_percent_is_rejected(text):
    with pytest.raises(UserError, match="expected PATH=SHARE%"):
        canary_of(text)


def test_a_version_that_reads_other_inputs_is_rejected():
    versions, other = versions_of(), Parity()
    del other.preprocessors["image"]
    with pytest.raises(UserError, match=r"reads text \(text\); this server's model reads image \(image\), text \(text\)"):
        versions.add_canary(version_of(other, "other"), 0.1)
    with pytest.raises(UserError, match="main is version main, which is already served"):
        versions.add_shadow(version_of(Parity(), "main"))


def test_a_version_with_none_of_the_answers_is_rejected():
    versions, other = versions_of(), Parity()
    other.names = ["cat", "dog"]
    with pytest.raises(UserError, match=r"other answers cat, dog, ...; this server's model answers .*: serve it on another port"):
        versions.check(version_of(other, "other"))
    other.names = ["even", "dog"]
    versions.check(version_of(other, "other"))


def test_a_version_that_cannot_run_is_rejected():
    with pytest.raises(UserError, match="broken can't run: RuntimeError: the model fails for this text"):
        version_of(Parity(fails=["a"]), "broken").warm_up(4)


def test_promotion_keeps_the_version_before_for_a_rollback():
    versions = versions_of(0.1, 0.2)
    with pytest.raises(UserError, match="which version is to be promoted"):
        versions.promote()
    with pytest.raises(UserError, match="can't promote other: canary 0, canary 1"):
        versions.promote("other")
    versions.promote("canary 1")
    assert {version.name: role for version, role in versions.roles().items()} == {
        "canary 1": "main",
        "canary 0": "canary",
        "main": "previous",
    }
    versions.rollback()  # of the canary
    assert [(version.name, role) for version, role in versions.roles().items()] == [("canary 1", "main"), ("main", "previous")]
    versions.rollback()
    assert [(version.name, role) for version, role in versions.roles().items()] == [("main", "main")]
    with pytest.raises(UserError, match="nothing to roll back"):
        versions.rollback()


@pytest.mark.parametrize(
    ("reason", "message"),
    [
        ("errors", "30.0 % of its last 10 requests failed, limit 20 %"),
        ("latency", "10.0 % of its last 10 requests took longer than 100 ms, limit 5 %"),
        ("disagreement", "40.0 % of its last 10 answers differed from the main version's, limit 30 %"),
    ],
)
def test_a_canary_is_rolled_back_when_it_exceeds_a_limit_and_not_before(reason, message):
    versions = versions_of(0.5, max_errors=0.2, max_latency_ms=100, max_disagreement=0.3, canary_window=20, canary_least=10)
    canary, _ = versions.canaries[0]
    assert canary.watch is not None
    for i in range(10):
        assert versions.judge(canary) is None  # too few
        canary.watch.ended(failed=reason == "errors" and i >= 7, seconds=0.2 if reason == "latency" and i == 9 else 0.05)
        canary.watch.compared(agreed=not (reason == "disagreement" and i >= 6))
    verdict = versions.judge(canary)
    assert verdict == (reason, message)
    assert versions.canaries == []
    assert message in versions.events[-1]


def test_a_promoted_version_is_rolled_back_to_the_one_before():
    versions = versions_of(0.5, canary_least=10, canary_window=20)
    versions.promote()
    promoted = versions.main
    for _ in range(10):
        promoted.watch.ended(failed=True)
    assert versions.judge(promoted).reason == "errors"
    assert (versions.main.name, versions.previous) == ("main", None)


def test_only_the_last_requests_count():
    watch = Watch(RollbackLimits(max_errors=0.5, canary_window=10, canary_least=5))
    for failed in [True] * 4 + [False] * 10:
        watch.ended(failed=failed)
    assert watch.summary()["errors"] == 0
    for _ in range(6):
        watch.ended(failed=True)
    assert watch.verdict().reason == "errors"


@pytest.mark.parametrize("option", [{"max_errors": 1.5}, {"max_latency_ms": 0}, {"canary_window": 10, "canary_least": 20}])
def test_limits_that_cannot_be_are_rejected(option):
    with pytest.raises(UserError, match=f"--{next(reversed(option))}"):
        RollbackLimits(**option)


def test_answers_that_are_not_finite_are_none():
    values = np.array([[0.25, 0.75], [np.nan, 0.5], [0.5, np.inf]])
    found = answers_of(Predictions(["b", "a", "a"], values, ["a", "b"], {"text": np.ones(3, bool)}), None, "v")
    assert [one is None for one in found] == [False, True, True]


def test_numbers_agree_within_a_twentieth():
    assert agree({"price": 10.0, "tags": ["a"]}, {"price": 10.4, "tags": ["a"]})
    assert not agree({"price": 10.0, "tags": ["a"]}, {"price": 11.0, "tags": ["a"]})
    assert not agree([1.0, 2.0], [1.0])


# Under a service


def put(service, model, share, name="new"):
    service.versions.add_canary(version_of(model, name), share)
    return model


async def ask_many(client, count, start=0):
    return await asyncio.gather(
        *(client.post("/predict", json={"text": f"text {i}"}, headers={"x-request-id": str(i)}) for i in range(start, start + count))
    )


def test_a_failing_canary_costs_no_request_and_is_rolled_back():
    service = service_of(rollback=RollbackLimits(canary_least=5, canary_window=10))
    put(service, Parity(fails=[f"text {i}" for i in range(200)]), 0.5)

    answers = asked(service, lambda client: ask_many(client, 200))
    assert {(answer.status_code, answer.json()["version"]) for answer in answers} == {(200, "main")}
    assert service.versions.canaries == []
    assert counted(service, "fusion_rollbacks_total", version="new", reason="errors") == 1
    assert counted(service, "fusion_failures_total", version="new") >= 5
    assert counted(service, "fusion_version_share", version="main", role="main") == 1


def test_requests_that_are_wrong_or_shed_are_no_fault_of_a_version():
    service = service_of(rollback=RollbackLimits(canary_least=5, canary_window=10))
    put(service, Parity(), 0.5)
    shed, wrong = Rejected(503, "overload", "too many images are being fetched"), Rejected(422, "unreadable", "corrupt")

    async def ask(client):
        for i, result in enumerate([shed, wrong] * 20):
            job = Job(str(i), service.versions.canaries[0][0], b"", "", time.monotonic(), service.loop.create_future())
            service.delivered([job], [result])
            assert job.future.exception() is result

    asked(service, ask)
    assert len(service.versions.canaries) == 1
    assert not counted(service, "fusion_failures_total", version="new")


def test_a_canary_that_disagrees_is_rolled_back():
    service = service_of(rollback=RollbackLimits(canary_least=5, canary_window=10))
    put(service, Parity(inverted=True), 0.5)

    async def ask(client):
        answers = await ask_many(client, 60)
        await until(lambda: not service.versions.canaries and service.copies == 0)
        return answers + await ask_many(client, 20, start=60)

    answers = asked(service, ask)
    assert {answer.json()["version"] for answer in answers[:60]} == {"main", "new"}
    assert {answer.json()["version"] for answer in answers[60:]} == {"main"}
    assert counted(service, "fusion_rollbacks_total", version="new", reason="disagreement") == 1
    assert counted(service, "fusion_disagreements_total", version="new") == counted(service, "fusion_comparisons_total", version="new") >= 5


def test_an_agreeing_canary_stays_and_is_promoted_by_command():
    service = service_of(rollback=RollbackLimits(canary_least=5, canary_window=100))
    put(service, Parity(), 0.5)

    async def ask(client):
        before = await ask_many(client, 100)
        await until(lambda: service.copies == 0)
        status = (await client.get("/control/status", headers=SIGNED)).json()
        promoted = (await client.post("/control/promote", headers=SIGNED)).json()
        answers = await ask_many(client, 20)
        back = (await client.post("/control/rollback", headers=SIGNED)).json()
        return before, status, promoted, answers, back, await client.post("/control/rollback", headers=SIGNED)

    before, status, promoted, answers, back, refused = asked(service, ask)
    watch = status["versions"][1]["watch"]
    assert (status["versions"][1]["share"], watch["disagreement"]) == (0.5, 0)
    assert watch["requests"] == sum(answer.json()["version"] == "new" for answer in before) >= watch["compared"] > 0
    assert [one["role"] for one in promoted["versions"]] == ["main", "previous"]
    assert {answer.json()["version"] for answer in answers} == {"new"}
    assert [one["version"] for one in back["versions"]] == ["main"]
    assert (refused.status_code, refused.json()["error"]) == (
        409,
        "nothing to roll back: there is neither canary, shadow nor previous version",
    )


def test_a_shadow_sees_every_request_and_answers_none():
    service, shadow = service_of(), Parity(inverted=True)
    service.versions.add_shadow(version_of(shadow, "shadow"))

    async def ask(client):
        answers = []
        for i in range(30):
            answers += await ask_many(client, 1, start=i)
            await until(lambda: service.copies == 0)
        return answers

    answers = asked(service, ask)
    assert {answer.json()["version"] for answer in answers} == {"main"}
    assert sorted(text for batch in shadow.batches for text in batch) == sorted(f"text {i}" for i in range(30))
    assert counted(service, "fusion_disagreements_total", version="shadow") == 30


def test_a_shadow_is_shed_before_any_request():
    """The model is held, so that requests accumulate: copies end at a quarter, requests go on to the limit."""
    model, shadow = Parity(), Parity()
    service = service_of(model, limits=Limits(max_queue=40), batch_size=1)
    service.versions.add_shadow(version_of(shadow, "shadow"))
    model.gate.clear()
    shadow.gate.clear()

    async def ask(client):
        tasks = [asyncio.create_task(client.post("/predict", json={"text": f"text {i}"})) for i in range(40)]
        await until(lambda: service.depth == 40)
        shed, copies = counted(service, "fusion_rejections_total", reason="shadow"), service.copies
        refused = await client.post("/predict", json={"text": "one more"})
        model.gate.set()
        shadow.gate.set()
        answers = await asyncio.gather(*tasks)
        await until(lambda: service.copies == 0)
        return shed, copies, refused, answers

    shed, copies, refused, answers = asked(service, ask)
    assert (shed, copies) == (30, 10)
    assert (refused.status_code, refused.json()["error"]) == (503, "too many requests are in progress")
    assert int(refused.headers["retry-after"]) >= 1
    assert {answer.status_code for answer in answers} == {200}
    assert sum(len(batch) for batch in shadow.batches) == 10


def test_a_reload_loses_no_request():
    """The old model is held in a batch while the new one takes over: both answer what they were given."""
    model, newer = Parity(), Parity()
    service = service_of(model, batch_size=1, threads=3, runs=3)
    model.gate.clear()
    loads = {"main": Loaded(newer, "newer"), "same": Loaded(newer, "newer")}

    async def ask(client):
        before = [asyncio.create_task(client.post("/predict", json={"text": f"old {i}"})) for i in range(20)]
        await until(lambda: service.depth == 20 and len(model.batches) >= 2)
        reload = asyncio.create_task(client.post("/control/reload", headers=SIGNED))
        assert (await reload).json()["versions"][0]["version"] == "newer"
        after = asyncio.create_task(client.post("/predict", json={"text": "new"}))
        await until(lambda: service.depth == 21)
        model.gate.set()
        again = await client.post("/control/reload?argument=same", headers=SIGNED)
        return [await one for one in before], await after, again

    before, after, again = asked(service, ask, loads.__getitem__)
    assert {(answer.status_code, answer.json()["version"]) for answer in before} == {(200, "main")}
    assert (after.status_code, after.json()["version"]) == (200, "newer")
    assert again.json()["events"][-1].endswith("newer is unchanged")


def test_a_version_that_fails_to_load_changes_nothing():
    service = service_of()

    def load(path):
        raise UserError(f"there is no run or package {path}")

    async def ask(client):
        commands = ["reload?argument=nowhere", "canary?argument=nowhere%3D5%25", "shadow?argument=nowhere", "shadow", "canary?argument=x"]
        return [await client.post(f"/control/{one}", headers=SIGNED) for one in commands], await client.post("/predict", json={"text": "a"})

    refused, answer = asked(service, ask, load)
    assert [one.status_code for one in refused] == [409] * 5
    assert refused[0].json()["error"] == "there is no run or package nowhere"
    assert answer.json()["version"] == "main"
