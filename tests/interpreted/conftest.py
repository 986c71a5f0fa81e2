"""These tests run in a process of their own, which ../test_interpreted.py starts; elsewhere they are not collected."""

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    from tests.triton_tools.interpreter import install

    install()
else:
    collect_ignore_glob = ["*"]
