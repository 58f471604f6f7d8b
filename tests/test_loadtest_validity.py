"""When figures are the client's own, or too few to publish."""

from __future__ import annotations

from heddle_loadtest.client.result import RequestError
from heddle_loadtest.measure.repeat import has_closed_loop
from heddle_loadtest.measure.validity import client_reasons, invalid_reasons, unpublishable_reasons
from heddle_loadtest.workload.spec import Closed, Poisson, Tenant, Workload
from loadtest_samples import make_outcome, make_result

GOOD = [make_result(float(at), at + 0.5) for at in range(10)]
LATE = [make_result(float(at), at + 0.5, lag=0.006) for at in range(10)]


def test_client_that_keeps_up_is_valid() -> None:
    outcome = make_outcome(GOOD, cpu_share=0.9, loop_lag=[0.004] * 100)
    assert invalid_reasons([outcome]) == ()


def test_late_dispatch() -> None:
    (reason,) = invalid_reasons([make_outcome(GOOD), make_outcome(LATE)])
    assert "repeat 1" in reason
    assert "dispatch lag p99 6.0 ms" in reason


def test_one_late_request_in_a_thousand_is_no_bottleneck() -> None:
    many = [make_result(float(at), at + 0.5) for at in range(999)]
    assert invalid_reasons([make_outcome([*many, make_result(0.0, 2.0, lag=1.0)])]) == ()


def test_lag_of_failed_requests_counts() -> None:
    lost = [make_result(0.0, error=RequestError("timeout", ""), lag=1.0)] * 10
    (reason,) = invalid_reasons([make_outcome([*GOOD, *lost])])
    assert "dispatch lag" in reason


def test_client_short_of_cpu() -> None:
    (reason,) = invalid_reasons([make_outcome(GOOD, cpu_share=0.97)])
    assert "0.97" in reason


def test_loop_lag_counts_whatever_the_loop() -> None:
    (reason,) = invalid_reasons([make_outcome(GOOD, loop_lag=[0.02] * 100)])
    assert "loop lag p99 20.0 ms" in reason


def test_client_that_ran_out_of_descriptors() -> None:
    refused = [make_result(0.0, error=RequestError("client_limit", "too many open files"))] * 3
    (reason,) = client_reasons([make_outcome(GOOD), make_outcome([*GOOD, *refused])])
    assert "In repeat 1 " in reason
    assert " 3 of its requests" in reason
    assert "raise `ulimit -n`" in reason
    assert invalid_reasons([make_outcome(refused)])[0] == "Not one request succeeded."
    assert "ulimit" in invalid_reasons([make_outcome(refused)])[1]


def test_what_the_target_does_wrong_is_no_fault_of_the_client() -> None:
    failed = make_outcome([make_result(0.0, error=RequestError("timeout", ""))])
    assert client_reasons([failed]) == ()
    assert client_reasons([make_outcome(LATE)]) == invalid_reasons([make_outcome(LATE)])


def test_a_run_without_one_answer_is_invalid() -> None:
    failed = make_outcome([make_result(0.0, error=RequestError("timeout", ""))])
    for outcomes in ([], [make_outcome([])], [failed]):
        assert invalid_reasons(outcomes) == ("Not one request succeeded.",)


def test_tenants_arrivals_decide_whether_a_loop_is_closed() -> None:
    def workload(**tenants: Tenant) -> Workload:
        return Workload(name="mixed", requests=4, arrivals=Poisson(rate=1.0), tenants=tenants)

    closed = Tenant(arrivals=Closed(streams=1))
    assert not has_closed_loop(workload())
    assert not has_closed_loop(workload(one=Tenant()))
    assert has_closed_loop(workload(one=Tenant(), two=closed))
    assert not has_closed_loop(
        Workload(name="x", requests=4, arrivals=Closed(streams=2), tenants={"one": Tenant(arrivals=Poisson(rate=1.0))})
    )


def test_what_may_be_published() -> None:
    good = make_outcome(GOOD)
    assert unpublishable_reasons([good] * 3, ()) == ()
    (reason,) = unpublishable_reasons([good] * 2, ())
    assert "3 repeats" in reason
    assert "has 2" in reason
    assert unpublishable_reasons([good] * 3, ("late.",)) == ("late.",)
    (reason,) = unpublishable_reasons([good, good, make_outcome(GOOD, was_interrupted=True)], ())
    assert "interrupted" in reason
