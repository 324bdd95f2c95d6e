"""What the HTTP servers of the tests share."""

from http.server import BaseHTTPRequestHandler


class Handler(BaseHTTPRequestHandler):
    """Answers with whole bodies, at once and silently."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def answer(self, status, content=b"", headers=()):
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *args):
        pass
