"""Google Compute Engine's notices that this machine is about to be taken away."""

import os
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path

_DEFAULT_HOST = "metadata.google.internal"
_PRODUCT_NAME = Path("/sys/class/dmi/id/product_name")
# Path below instance/, and the value that announces the end; a machine that migrates lives on.
_NOTICES = {
    "preempted": "TRUE",
    "maintenance-event": "TERMINATE_ON_HOST_MAINTENANCE",
}
# A spot machine ends 30 seconds after its notice.
_INTERVAL = 3.0


def metadata_host(environment: Mapping[str, str]) -> str | None:
    """The metadata server's host, None on a machine that is not Google's."""
    if environment.get("GCE_METADATA_HOST"):
        return environment["GCE_METADATA_HOST"]
    try:
        return _DEFAULT_HOST if "Google" in _PRODUCT_NAME.read_text() else None
    except OSError:
        return None


class MaintenanceWatch:
    """Asks the metadata server every few seconds, in a thread, and passes one notice on.

    A notice that stands when the watch starts has already stopped the run before this one, as much
    as an hour ahead of the machine's end: it is not passed on, so that the time left is used.
    """

    def __init__(self, on_notice: Callable[[str], None], interval: float = _INTERVAL) -> None:
        """Args: on_notice: called with what was announced; interval: seconds."""
        self._on_notice = on_notice
        self._interval = interval
        self._host = metadata_host(os.environ)
        self._closing = threading.Event()
        # The server answers directly; a proxy of the environment would not reach it.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def start(self) -> None:
        """Starts the thread, on a machine of Google's."""
        if self._host is not None:
            threading.Thread(target=self._watch, daemon=True).start()

    def close(self) -> None:
        """Ends the thread, within an interval."""
        self._closing.set()

    def _watch(self) -> None:
        standing = {path for path in _NOTICES if self._is_announced(path)}
        while not self._closing.wait(self._interval):
            for path in _NOTICES:
                announced = self._is_announced(path)
                if announced and path not in standing:
                    self._on_notice(f"a notice of this machine's end ({path})")
                    return
                if announced is False:
                    standing.discard(path)

    def _is_announced(self, path: str) -> bool | None:
        """Whether the notice stands; None if the server does not say."""
        request = urllib.request.Request(
            f"http://{self._host}/computeMetadata/v1/instance/{path}",
            headers={"Metadata-Flavor": "Google"},
        )
        try:
            with self._opener.open(request, timeout=self._interval) as answer:
                return answer.read().decode().strip() == _NOTICES[path]
        except (OSError, UnicodeDecodeError):
            return None
