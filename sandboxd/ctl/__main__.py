"""The entry point of ``python -m sandboxd.ctl``."""

from __future__ import annotations

from sandboxd.ctl.main import script

if __name__ == "__main__":
    script()
