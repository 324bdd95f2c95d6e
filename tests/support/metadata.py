"""A metadata server as Google's machines have one, and such as only look like it."""

import contextlib
import http.server
import threading

# A Cloud TPU VM: the second host of a slice of two.
TPU = {
    "instance/attributes/accelerator-type": "v5litepod-16",
    "instance/attributes/agent-worker-number": "1",
    "instance/attributes/worker-network-endpoints": "x:y:10.0.0.2,x:y:10.0.0.3",
    "instance/maintenance-event": "NONE",
    "instance/preempted": "FALSE",
}


@contextlib.contextmanager
def serve(known, *, status=200, flavor="Google"):
    """Yields "host:port"; `known` may change meanwhile."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked_rightly = self.headers.get("Metadata-Flavor") == "Google"
            text = known.get(self.path.removeprefix("/computeMetadata/v1/"))
            self.send_response(403 if not asked_rightly else 404 if text is None else status)
            if flavor:
                self.send_header("Metadata-Flavor", flavor)
            self.end_headers()
            self.wfile.write((text or "").encode())

        def log_message(self, *args):
            """Prints nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
