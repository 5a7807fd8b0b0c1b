"""Counts visits in a database that it knows by the name db."""

import os
import socket

import psycopg2
from flask import Flask, jsonify

app = Flask(__name__)


def connect():
    """Opens a connection for one request: the database may be another container by the next."""
    with open(os.environ.get("DB_PASSWORD_FILE", "/run/secrets/db-password"), encoding="ascii") as f:
        password = f.read().strip()
    return psycopg2.connect(host=os.environ.get("DB_HOST", "db"), dbname="app", user="app", password=password, connect_timeout=3)


def prepare():
    """Makes the table. Three instances may do so at once."""
    with connect() as db, db.cursor() as c:
        c.execute("SELECT pg_advisory_xact_lock(1)")
        c.execute("CREATE TABLE IF NOT EXISTS visits (id serial PRIMARY KEY, by text NOT NULL)")


@app.get("/visits")
def visits():
    """Adds a visit and says how many there were, and which instance counted this one."""
    with connect() as db, db.cursor() as c:
        c.execute("INSERT INTO visits (by) VALUES (%s)", (socket.gethostname(),))
        c.execute("SELECT count(*), count(DISTINCT by) FROM visits")
        total, instances = c.fetchone()
    return jsonify(visits=total, instances=instances, by=socket.gethostname())


@app.get("/healthz")
def healthz():
    with connect() as db, db.cursor() as c:
        c.execute("SELECT 1")
    return "ok\n", 200, {"Content-Type": "text/plain"}


prepare()
