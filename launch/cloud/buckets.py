"""Whether a bucket suits a job: that it exists, and lies where the job runs."""

import sys

from trainer.errors import UserError
from trainer.storage import gcs

# Multi-regions, and Google's own pairs of regions, by what the names of their regions begin with.
_REGIONS = {
    "us": ("us-",),
    "eu": ("europe-",),
    "asia": ("asia-",),
    "nam4": ("us-central1", "us-east1"),
    "eur4": ("europe-north1", "europe-west4"),
    "eur5": ("europe-west1", "europe-west2"),
    "eur7": ("europe-west2", "europe-west3"),
    "eur8": ("europe-west3", "europe-west6"),
    "asia1": ("asia-northeast1", "asia-northeast2"),
}


def region_of(zone: str) -> str:
    """The region of a zone: `us-central1` of `us-central1-a`."""
    return zone.rpartition("-")[0]


def check_bucket(bucket: str, project: str, region: str) -> None:
    """Checks that a bucket exists and lies in a region.

    An account that may use a bucket's objects but not look at the bucket gets a warning.

    Raises:
      UserError: if it does not.
      RunAgain: if the store does not answer.
    """
    create = f"gcloud storage buckets create gs://{bucket} --project={project} --location={region}"
    try:
        places = gcs.find_regions(bucket)
    except PermissionError as error:
        print(
            f"warning: gs://{bucket}: {error.strerror}; whether it lies in {region} is not known",
            file=sys.stderr,
        )
        return
    if places is None:
        raise UserError(f"--bucket=gs://{bucket}: there is no such bucket; create it: {create}")
    begins = [start for place in places for start in _REGIONS.get(place, (place,))]
    if not any(region.startswith(start) for start in begins):
        other = create.replace(f"gs://{bucket}", f"gs://{bucket}-{region}")
        raise UserError(
            f"--bucket=gs://{bucket}: lies in {', '.join(places)}, but the job runs in {region}, "
            f"where every byte would come from far away and cost extra; create one there: {other}"
        )
