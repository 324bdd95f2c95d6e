"""Google's metadata server, which tells a virtual machine in Google's cloud who it is.

No TensorFlow is needed to ask, and no answer is waited for longer than some seconds: libtpu itself
asks 30 times before it gives up, and the import of TensorFlow hangs meanwhile.
"""

import contextlib
import http.client
import os
import threading
from collections.abc import Callable, Iterator

_ADDRESS = "169.254.169.254"  # the same in every network of Google's; a name would need a DNS
_ADDRESS_VARIABLE = "GCE_METADATA_HOST"  # another host[:port], as Google's own libraries read it
_SECONDS = 3.0
_FLAVOR = ("Metadata-Flavor", "Google")  # of questions and answers; other servers lack it
# What the server is asked every so many seconds, and the answers that mean nothing: maintenance is
# announced a minute or more ahead, an end of a spot machine half a minute.
_POLL_SECONDS = 5.0
_EVENTS = {"instance/maintenance-event": "NONE", "instance/preempted": "FALSE"}


def read(path: str) -> str | None:
    """What the server knows under a path, such as "instance/attributes/accelerator-type".

    Returns:
      None where it knows nothing of that name.

    Raises:
      OSError: no metadata server answers here; says what happened.
    """
    address = os.environ.get(_ADDRESS_VARIABLE) or _ADDRESS
    # Not urllib, which would send the question through the proxy of http_proxy.
    connection = http.client.HTTPConnection(address, timeout=_SECONDS)
    try:
        connection.request("GET", f"/computeMetadata/v1/{path}", headers=dict([_FLAVOR]))
        answer = connection.getresponse()
        text = answer.read().decode(errors="replace").strip()
    except (OSError, http.client.HTTPException) as error:
        reason = str(error) or type(error).__name__
        raise OSError(f"the metadata server {address} does not answer: {reason}") from None
    finally:
        connection.close()
    if answer.getheader(_FLAVOR[0]) != _FLAVOR[1] or answer.status not in (200, 404):
        raise OSError(f"what answers at {address} is no metadata server (HTTP {answer.status})")
    return text if answer.status == 200 else None


@contextlib.contextmanager
def watch(asked: Callable[[str], None], *, seconds: float = _POLL_SECONDS) -> Iterator[None]:
    """Within it `asked` is called, by a thread, when this machine is about to be taken away.

    Args:
      asked: gets the reason, such as "maintenance-event TERMINATE_ON_HOST_MAINTENANCE".
      seconds: between two questions.
    """
    over = threading.Event()

    def ask() -> None:
        while not over.wait(seconds):
            for path, nothing in _EVENTS.items():
                # A server that does not answer for a while is asked again.
                with contextlib.suppress(OSError):
                    found = read(path)
                    if found is not None and found != nothing:
                        asked(f"{path.rpartition('/')[2]} {found}")
                        return

    thread = threading.Thread(target=ask, name="maintenance", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
