"""Whether a bucket lies where a job runs."""

import pytest

from launch.cloud.follow import check_bucket, region_of
from trainer.errors import UserError
from trainer.storage import gcs


def test_the_region_of_a_zone():
    assert region_of("us-central1-a") == "us-central1"


@pytest.mark.parametrize(
    ("location", "region", "fits"),
    [
        ("US-CENTRAL1", "us-central1", True),
        ("US-CENTRAL1", "us-central2", False),
        ("US", "us-east5", True),
        ("EU", "europe-west4", True),
        ("EU", "us-east5", False),
        ("ASIA", "asia-northeast1", True),
        ("NAM4", "us-central1", True),
        ("NAM4", "us-west4", False),
        ("EUR4", "europe-west4", True),
    ],
)
def test_a_bucket_fits_the_regions_that_it_lies_in(cloud, location, region, fits):
    cloud.locations["b"] = location
    if fits:
        check_bucket("b", "p", region)
        return
    with pytest.raises(UserError, match=f"lies in {location.lower()}, but the job runs in"):
        check_bucket("b", "p", region)


def test_a_pair_of_regions_of_the_users_own_choice_fits_both(monkeypatch):
    monkeypatch.setattr(gcs, "find_regions", lambda bucket: ("us-east1", "us-west1"))
    check_bucket("b", "p", "us-west1")
    with pytest.raises(UserError, match="lies in us-east1, us-west1"):
        check_bucket("b", "p", "us-west4")


def test_an_account_that_may_not_look_at_the_bucket_is_warned(cloud, capsys):
    cloud.statuses["b"] = 403
    check_bucket("b", "p", "us-central1")
    assert "whether it lies in us-central1 is not known" in capsys.readouterr().err
