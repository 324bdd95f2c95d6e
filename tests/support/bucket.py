"""A stand-in for Google Cloud Storage, for TensorFlow's own gs:// file system to talk to.

It is an HTTPS proxy that is storage.googleapis.com and www.googleapis.com itself, or a server of
HTTP where a library takes another address, and keeps the objects in memory. Of the JSON API
(https://cloud.google.com/storage/docs/json_api/v1) it answers what TensorFlow asks for: metadata,
lists, ranged reads, uploads, copies, deletions. Like a bucket, and unlike a disk, it has no folders
and no append, and an object is there when whole.

It is a process of its own: TensorFlow holds Python's lock while it closes a file.

    python -m tests.support.bucket CERTIFICATE    serves, and prints the port
"""

import json
import re
import ssl
import subprocess
import sys
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from threading import Lock
from urllib.parse import parse_qs, unquote, urlsplit
from urllib.request import ProxyHandler, build_opener

import trustme

from tests.support.serving import Handler

HOSTS = ("storage.googleapis.com", "www.googleapis.com")


BUCKET = "bucket"


class Bucket:
    """What a test may ask of the server at `address`."""

    def __init__(self, address):
        self.address = address
        self.environment = {}  # in which gs:// leads to it
        self._open = build_opener(ProxyHandler({})).open

    def requests(self):
        """All so far: "METHOD path range"."""
        return json.load(self._open(f"{self.address}/requests"))

    def refuse(self, status, pattern="."):
        """Answers requests like "METHOD path" with `status`; 0: no longer."""
        body = json.dumps([status, pattern]).encode()
        self._open(f"{self.address}/refuse", data=body).close()


class _Objects:
    """Objects by name, and what was asked for."""

    def __init__(self):
        self.objects, self.generations = {}, {}
        self.requests, self.refusal = [], (0, ".")
        self.uploads = []
        self.lock = Lock()

    def put(self, name, data):
        self.objects[name] = data
        self.generations[name] = self.generations.get(name, 0) + 1

    def listing(self, prefix="", delimiter=None):
        items, prefixes = [], set()
        for name in sorted(self.objects):
            if name.startswith(prefix):
                head, found, _ = name[len(prefix) :].partition(delimiter or "\0")
                if found:
                    prefixes.add(prefix + head + found)
                else:
                    items.append(self.metadata(name))
        return {"items": items, "prefixes": sorted(prefixes)}

    def metadata(self, name):
        return {
            "name": name,
            "size": str(len(self.objects[name])),
            "generation": str(self.generations[name]),
            "updated": "2026-01-01T00:00:00.000Z",
        }


class _Handler(Handler):
    held = _Objects()
    tls: ssl.SSLContext

    def do_CONNECT(self):  # noqa: N802
        host, _, _ = self.path.partition(":")
        if host not in HOSTS:
            return self.answer(502)
        self.send_response(200)
        self.end_headers()
        self.connection = self.tls.wrap_socket(self.connection, server_side=True)
        self.rfile = self.connection.makefile("rb")
        self.wfile = self.connection.makefile("wb", buffering=0)
        self.close_connection = False

    def finish(self):
        super().finish()
        self.connection.close()  # that of TLS, which the server does not know of

    def do(self):
        url, body = urlsplit(self.path), self.body()
        if url.path == "/requests":
            return self.answer(200, self.held.requests)
        if url.path == "/refuse":
            self.held.refusal = json.loads(body)
            return self.answer(200)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        with self.held.lock:
            asked = f"{self.command} {unquote(self.path)}"
            self.held.requests.append(f"{asked} {self.headers.get('Range', '')}".rstrip())
            status, pattern = self.held.refusal
            if status and re.search(pattern, asked):
                return self.answer(status)
            for pattern, handle in (
                (rf"/storage/v1/b/{BUCKET}", self.about_bucket),
                (rf"/storage/v1/b/{BUCKET}/o", self.about_objects),
                (rf"/storage/v1/b/{BUCKET}/o/([^/]+)/rewriteTo/b/{BUCKET}/o/([^/]+)", self.rewrite),
                (rf"/storage/v1/b/{BUCKET}/o/([^/]+)", self.about_object),
                (rf"/upload/storage/v1/b/{BUCKET}/o", self.upload),
                (r"/session/(\d+)", self.session),
                (rf"/{BUCKET}/(.+)", self.content),
            ):
                if match := re.fullmatch(pattern, url.path):
                    return handle(*map(unquote, match.groups()), query=query, body=body)
        return self.answer(404)

    do_GET = do_POST = do_PUT = do_DELETE = do  # noqa: N815

    def body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def about_bucket(self, *, query, body):
        self.answer(200, {"name": BUCKET, "location": "EU"})

    def about_objects(self, *, query, body):
        self.answer(200, self.held.listing(query.get("prefix", ""), query.get("delimiter")))

    def about_object(self, name, *, query, body):
        if name not in self.held.objects:
            self.answer(404)
        elif self.command == "DELETE":
            del self.held.objects[name]
            self.answer(204)
        elif query.get("alt") == "media":
            self.content(name, query=query, body=body)
        else:
            self.answer(200, self.held.metadata(name))

    def rewrite(self, name, target, *, query, body):
        if name not in self.held.objects:
            return self.answer(404)
        self.held.put(target, self.held.objects[name])
        return self.answer(200, {"done": True})

    def upload(self, *, query, body):
        name = query["name"]
        if query["uploadType"] == "media":
            self.held.put(name, body)
            return self.answer(200, self.held.metadata(name))
        self.held.uploads.append((name, b""))
        place = f"https://{HOSTS[1]}/session/{len(self.held.uploads) - 1}"
        return self.answer(200, headers={"Location": place})

    def session(self, number, *, query, body):
        name, data = self.held.uploads[int(number)]
        whole = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", self.headers["Content-Range"])
        if whole[1]:
            assert int(whole[1]) == len(data), "a hole in an upload"
            data += body
        self.held.uploads[int(number)] = name, data
        if whole[2] == "*" or len(data) < int(whole[2]):
            span = {"Range": f"bytes=0-{len(data) - 1}"} if data else {}
            return self.answer(308, headers=span)
        self.held.put(name, data)
        return self.answer(200, self.held.metadata(name))

    def content(self, name, *, query, body):
        data = self.held.objects.get(name)
        if data is None:
            return self.answer(404)
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not asked:
            return self.answer(200, data)
        begin, end = int(asked[1] or 0), min(int(asked[2] or len(data)) + 1, len(data))
        if not asked[1]:  # the last so many
            begin, end = max(len(data) - int(asked[2]), 0), len(data)
        if begin >= len(data):
            return self.answer(416)
        span = {"Content-Range": f"bytes {begin}-{end - 1}/{len(data)}"}
        return self.answer(206, data[begin:end], headers=span)

    def answer(self, status, content=b"", headers=()):
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
        super().answer(status, content, headers)


def copy(local, remote):
    """Copies the files in a folder, and in those below it."""
    for file in sorted(local.rglob("*")):
        if file.is_file():
            target = remote / str(file.relative_to(local))
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())


@contextmanager
def serve_bucket(folder):
    """Yields the Bucket of a server with that name."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(folder / "authority.pem"))
    certificate = str(folder / "certificate.pem")
    authority.issue_cert(*HOSTS).private_key_and_cert_chain_pem.write_to_path(certificate)
    command = [sys.executable, "-m", __name__, certificate]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        bucket = Bucket(f"http://127.0.0.1:{int(server.stdout.readline())}")
        bucket.environment = {
            "https_proxy": bucket.address,
            "CURL_CA_BUNDLE": str(folder / "authority.pem"),
            "NO_GCE_CHECK": "true",
            "CLOUD_STORAGE_EMULATOR_ENDPOINT": bucket.address,  # Google's library, in array_record
        }
        yield bucket
        server.terminate()


def _serve(certificate):
    _Handler.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _Handler.tls.load_cert_chain(certificate)
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        print(server.server_port, flush=True)
        server.serve_forever()


if __name__ == "__main__":
    _serve(sys.argv[1])
