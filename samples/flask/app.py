"""A small web service that needs nothing but its port and a /tmp."""

import os
import socket
import tempfile

from flask import Flask, jsonify

app = Flask(__name__)


@app.get("/")
def index():
    return jsonify(message="Hello from Flask", uid=os.getuid(), host=socket.gethostname())


@app.get("/healthz")
def healthz():
    return "ok\n", 200, {"Content-Type": "text/plain"}


@app.get("/disk")
def disk():
    """Says which places can be written to: with --read-only --tmpfs /tmp only /tmp."""
    result = {}
    for folder in ("/", "/app", "/tmp"):
        try:
            with tempfile.TemporaryFile(dir=folder):
                result[folder] = "writable"
        except OSError as err:
            result[folder] = err.strerror
    return jsonify(result)
