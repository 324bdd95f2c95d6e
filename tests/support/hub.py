"""A stand-in for the Hugging Face hub, for its own library to talk to: one repository, org/vit.

It answers https://huggingface.co/docs/hub/api as far as a download asks.
"""

import hashlib
import json
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlsplit

from tests.support.serving import Handler

REPOSITORY, COMMIT = "org/vit", "a" * 40


class _Handler(Handler):
    files: dict[str, bytes]

    def do(self):
        path = unquote(urlsplit(self.path).path)
        about, file = f"/api/models/{REPOSITORY}/", f"/{REPOSITORY}/resolve/{COMMIT}/"
        if path.startswith(f"{about}tree/"):
            return self.answer(200, json.dumps([self.entry(n) for n in self.files]).encode())
        if path.startswith(about):
            siblings = [{"rfilename": name} for name in self.files]
            info = {"id": REPOSITORY, "sha": COMMIT, "siblings": siblings, "tags": []}
            return self.answer(200, json.dumps(info).encode())
        if path.removeprefix(file) in self.files:
            name = path.removeprefix(file)
            tag = {"ETag": f'"{self.entry(name)["oid"]}"', "X-Repo-Commit": COMMIT}
            return self.answer(200, self.files[name], tag)
        return self.answer(404, headers={"X-Error-Code": "RepoNotFound"})

    do_GET = do_HEAD = do  # noqa: N815

    def entry(self, name):
        data = self.files[name]
        oid = hashlib.sha1(data).hexdigest()
        return {"type": "file", "path": name, "size": len(data), "oid": oid}


@contextmanager
def serve_hub(files, home):
    """Serves files (name -> bytes); yields the environment in which hf:// leads to it."""
    handler = type("Handler", (_Handler,), {"files": files})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(home)}
        server.shutdown()
