"""Presets: names for what one tool needs, as entries in the policy's own grammar. Data, nothing else.

Ports are as narrow as the tool allows; a bare name has the policy's default services (TCP 443, 80 and 22).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Preset:
    """What `@name` stands for: a line for people, entries, and whether a feed of the same name belongs to it."""

    summary: str
    entries: tuple[str, ...]
    feed: bool = False


PRESETS: dict[str, Preset] = {
    "anthropic": Preset(
        "Claude and Claude Code: the API, sign-in, updates, feature flags",
        (
            "anthropic.com:443",
            "api.anthropic.com:443",
            "console.anthropic.com:443",
            "mcp-proxy.anthropic.com:443",
            "statsig.anthropic.com:443",
            "claude.ai:443",
            "*.claude.ai:443",
            "claude.com:443",
            "*.claude.com:443",
        ),
    ),
    "debian": Preset(
        "apt on Debian",
        ("deb.debian.org:80,443", "security.debian.org:80,443", "ftp.debian.org:80,443"),
    ),
    "github": Preset(
        "GitHub: web, API, git over HTTPS and SSH, releases, LFS, packages, and the ranges that GitHub publishes",
        (
            "github.com",
            "*.github.com",
            "*.githubusercontent.com:443",
            "*.githubassets.com:443",
            "ghcr.io:443",
            "github-cloud.s3.amazonaws.com:443",
        ),
        feed=True,
    ),
    "host": Preset("the machine that the container runs on: its default gateways", (), feed=True),
    "npm": Preset(
        "npm, yarn and pnpm, and the headers that node-gyp fetches",
        ("registry.npmjs.org:443", "registry.yarnpkg.com:443", "nodejs.org:443"),
    ),
    "pypi": Preset("pip, uv and poetry", ("pypi.org:443", "files.pythonhosted.org:443")),
    "subnet": Preset("the container's own networks: other services of the same compose file", (), feed=True),
    "vscode": Preset(
        "Visual Studio Code Server and its extensions",
        (
            "update.code.visualstudio.com:443",
            "marketplace.visualstudio.com:443",
            "vscode.download.prss.microsoft.com:443",
            "vscode.blob.core.windows.net:443",
            "*.gallery.vsassets.io:443",
            "*.gallerycdn.vsassets.io:443",
            "*.vscode-cdn.net:443",
            "*.vscode-unpkg.net:443",
        ),
    ),
}

DEFAULT_POLICY = """\
@github
@npm
@anthropic
sentry.io
statsig.anthropic.com
statsig.com
"""
"""The text of the policy that is in force when there is no file."""
