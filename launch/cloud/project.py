"""What a project has of what a slice or a job needs: services, network, types, images, quotas."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from launch.cloud import calls
from launch.cloud.calls import Place
from launch.cloud.findings import Finding, State, attempt, place_of
from launch.cloud.rest import Rest
from launch.cloud.tpu_slices import ENDPOINT_VARIABLE

_COMPUTE = "compute.googleapis.com"
_SERVICES = "serviceusage.googleapis.com"
_QUOTAS = "cloudquotas.googleapis.com"
# Images whose names begin so are all listed. Others can be had without being in the list:
# v2-alpha-tpuv5-lite is one.
_LISTED_IMAGES = "tpu-vm-"
_RETRY_SECONDS = 30.0


class Project:
    """Looks for what a project lacks; a look that is refused is a finding of its own."""

    def __init__(self, rest: Rest, project: str) -> None:
        self._rest, self._project = rest, project

    def check_services(self, services: Sequence[str]) -> list[Finding]:
        """Whether Google's services are enabled, one finding each."""
        path = f"v1/projects/{self._project}/services:batchGet"
        query = {"names": [f"projects/{self._project}/services/{name}" for name in services]}
        states: dict[str, str] = {}

        def ask() -> Finding:
            for item in self._rest.get(_SERVICES, path, query).get("services", []):
                states[item["name"].rpartition("/")[2]] = item.get("state", "")
            return Finding(State.OK, "services", "listed")

        looked = self._attempt("services", _SERVICES, "serviceusage.serviceUsageViewer", ask)
        if looked.state is not State.OK:
            return [Finding(State.UNKNOWN, name, looked.detail) for name in services]
        return [self._describe_service(name, states.get(name)) for name in services]

    def _describe_service(self, service: str, state: str | None) -> Finding:
        if state == "ENABLED":
            return Finding(State.OK, service, "enabled")
        remedy = f"gcloud services enable {service} --project={self._project}"
        return Finding(State.MISSING, service, "not enabled; enable it", remedy)

    def check_network(self, network: str) -> Finding:
        """Whether a network exists: a name, or `projects/P/global/networks/NAME`."""
        from google.api_core.exceptions import NotFound

        own = f"projects/{self._project}/global/networks/{network}"
        path = network if "/" in network else own
        name, owner = path.rpartition("/")[2], path.split("/")[1]
        subject = f"network {name}"

        def ask() -> Finding:
            try:
                self._rest.get(_COMPUTE, f"compute/v1/{path}")
            except NotFound:
                create = f"gcloud compute networks create {name} --subnet-mode=auto"
                detail = "does not exist; name another one by --network, or create it"
                return Finding(State.MISSING, subject, detail, f"{create} --project={owner}")
            return Finding(State.OK, subject, "exists")

        return self._attempt(subject, _COMPUTE, "compute.networkViewer", ask)

    def check_quota(
        self, service: str, location: str, needed: int, is_wanted: Callable[[dict[str, Any]], bool]
    ) -> Finding:
        """Whether the wanted quotas of a service allow `needed` units in a zone or region."""
        subject = f"quota for {needed} in {location}"
        path = f"v1/projects/{self._project}/locations/global/services/{service}/quotaInfos"
        options = f"--service={service} --project={self._project}"

        def ask() -> Finding:
            quotas = filter(is_wanted, self._rest.list(_QUOTAS, path, "quotaInfos"))
            limits = [limit for item in quotas if (limit := find_limit(item, location)) is not None]
            if not limits:
                see = f"gcloud beta quotas info list {options}"
                return Finding(State.UNKNOWN, subject, "no quota of that name is listed; see", see)
            least = min(limits, key=lambda limit: limit.value)
            shown = "unlimited" if math.isinf(least.value) else f"{least.value:.0f}"
            if least.value >= needed:
                return Finding(State.OK, subject, f"{shown} ({least.name})")
            remedy = (
                f"gcloud beta quotas preferences create {options} --quota-id={least.name} "
                f"--preferred-value={needed} --dimensions={least.dimension}"
            )
            return Finding(State.MISSING, subject, f"{least.name} is {shown}; ask for it", remedy)

        return self._attempt(subject, _QUOTAS, "cloudquotas.viewer", ask)

    def _attempt(self, subject: str, api: str, role: str, ask: Callable[[], Finding]) -> Finding:
        return attempt(subject, place_of(api, self._project, subject, f"roles/{role}"), ask)


@dataclass(frozen=True)
class Limit:
    """What a quota allows in a place; `dimension` is that place as `zone=Z` or `region=R`."""

    name: str
    value: float
    dimension: str


def find_limit(quota: dict[str, Any], location: str) -> Limit | None:
    """What a quota of Cloud Quotas allows in a zone or region; None if it has none there.

    A quota counts by zone or by region. A value for that place goes before one for all places.
    """
    region = location.rpartition("-")[0] if re.search(r"-[a-z]$", location) else location
    is_zonal = "zone" in quota.get("dimensions", [])
    key, place = ("zone", location) if is_zonal else ("region", region)
    values = {}
    for item in quota.get("dimensionsInfos", []):
        own = item.get("dimensions", {}).get(key)
        applies = {place, "global"}.intersection(item.get("applicableLocations", []))
        if own == place or (own is None and applies):
            # Without a value nothing has been granted; below 0 there is no limit.
            value = int(item.get("details", {}).get("value", 0))
            values[own] = math.inf if value < 0 else float(value)
    if not values:
        return None
    return Limit(quota["quotaId"], values.get(place, values.get(None, 0.0)), f"{key}={place}")


class Zone:
    """Looks for what Cloud TPU offers in a zone; raises GoogleAuthError without credentials."""

    def __init__(self, place: Place) -> None:
        """`place` is what error messages about it say."""
        import google.cloud.tpu_v2 as tpu_v2

        self._place = place
        self._client = calls.make_client(tpu_v2.TpuClient, ENDPOINT_VARIABLE)
        self._options = {"retry": calls.retry(_RETRY_SECONDS), "timeout": calls.CALL_SECONDS}
        self._parent = calls.parent(place.project, place.location)

    def check_accelerator(self, name: str) -> Finding:
        """Whether the zone has an accelerator type."""
        subject = f"{name} in {self._place.location}"

        def ask() -> Finding:
            found = self._client.list_accelerator_types(parent=self._parent, **self._options)
            if name in {item.type_ for item in found}:
                return Finding(State.OK, subject, "offered")
            return Finding(State.MISSING, subject, f"not offered; {self._place.elsewhere}")

        return attempt(subject, self._place, ask)

    def check_image(self, image: str) -> Finding:
        """Whether the zone has an image for the hosts of slices."""
        subject = f"image {image}"

        def ask() -> Finding:
            found = self._client.list_runtime_versions(parent=self._parent, **self._options)
            if image in {item.version for item in found}:
                return Finding(State.OK, subject, "exists")
            remedy = self._place.find_images
            if image.startswith(_LISTED_IMAGES):
                detail = "does not exist there; name another by --runtime_version, of"
                return Finding(State.MISSING, subject, detail, remedy)
            detail = "is not in the list, which leaves some out; see"
            return Finding(State.UNKNOWN, subject, detail, remedy)

        return attempt(subject, self._place, ask)
