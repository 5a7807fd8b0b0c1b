import os
import unittest

from app import app


class TestApp(unittest.TestCase):
    def test_index(self):
        answer = app.test_client().get("/").get_json()
        self.assertEqual(answer["message"], "Hello from Flask")
        self.assertEqual(answer["uid"], 10001)

    def test_healthz(self):
        self.assertEqual(app.test_client().get("/healthz").data, b"ok\n")

    @unittest.skipUnless(os.environ.get("API_TOKEN"), "build with --secret id=token")
    def test_token(self):
        """Stands for a test that asks a service which wants a token."""
        self.assertNotIn("\n", os.environ["API_TOKEN"])
