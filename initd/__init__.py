"""initd: a PID 1 that gives a container a default-deny network which follows DNS."""

from __future__ import annotations

__version__ = "0.1.0"
