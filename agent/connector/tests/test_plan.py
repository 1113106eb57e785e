import pytest
from baton_connector import plan
from baton_connector.plan import HoldPlan, PlanError, PullPlan

ID = "000000000000000000000000000000a1"
HOLD = {"version": 1, "transfer_id": ID, "action": "hold", "lease_ms": 30000}
SOURCE = {"engine_id": "p0", "address": "10.0.0.7:7420", "epoch": 1763712345678}
PULL = {"version": 1, "transfer_id": ID, "action": "pull", "num_tokens": 3000, "deadline_ms": 10000, "source": SOURCE}


def test_plans_read_as_documented():
    assert plan.read({"baton": HOLD}) == HoldPlan(1, ID, 30000)
    pull = plan.read({"baton": PULL, "other": 1})
    assert isinstance(pull, PullPlan)
    assert (pull.num_tokens, pull.deadline_ms, pull.source.epoch) == (3000, 10000, 1763712345678)


@pytest.mark.parametrize("params", [None, {}, {"do_remote_prefill": True}, "x"])
def test_requests_without_a_plan(params):
    assert plan.read(params) is None


@pytest.mark.parametrize(
    "bad",
    [
        None,
        "hold",
        HOLD | {"version": 2},
        HOLD | {"transfer_id": "xyz"},
        HOLD | {"lease_ms": -1},
        HOLD | {"lease_ms": 2**32},
        HOLD | {"action": "push"},
        {key: value for key, value in HOLD.items() if key != "action"},
        PULL | {"source": SOURCE | {"engine_id": "-a"}},
        PULL | {"source": SOURCE | {"address": "x" * 301}},
        PULL | {"num_tokens": "3000"},
        {key: value for key, value in PULL.items() if key != "source"},
    ],
)
def test_a_malformed_plan_is_an_error_that_says_where(bad):
    with pytest.raises(PlanError, match="kv_transfer_params.baton"):
        plan.read({"baton": bad})


def test_held_is_what_the_coordinator_reads():
    assert plan.held(ID, 7, 40) == {"baton": {"transfer_id": ID, "epoch": 7, "num_tokens": 40}}
