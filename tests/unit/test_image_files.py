"""The image's own files, without an engine: linted, and the scripts run for real."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from initd import fwctl, published, settings

ROOT = Path(__file__).resolve().parents[2]
IMAGE = ROOT / "image"
HADOLINT, SHELLCHECK = (Path(sys.prefix) / "bin" / name for name in ("hadolint", "shellcheck"))
SCRIPTS = [*sorted((IMAGE / "shims").iterdir()), *(IMAGE / name for name in ("build", "fetch-claude", "finish"))]


def stages(text):
    """Stage name → its instructions."""
    parts = re.split(r"^FROM .* AS (\S+)$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def hadolint(path):
    argv = [HADOLINT, "--no-color", "-c", ROOT / ".hadolint.yaml", path]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def test_dockerfile_has_no_faults():
    assert hadolint(IMAGE / "Dockerfile") == ""


def test_the_linter_finds_faults(tmp_path):
    """The negative control."""
    bad = tmp_path / "Dockerfile"
    bad.write_text("FROM debian\nRUN apt-get install gcc | cat\nCMD initd\n")
    assert {"DL3006", "DL3014", "DL3015", "DL3025", "DL4006"} <= set(re.findall(r"DL\d{4}", hadolint(bad)))


def test_the_last_stage_is_debian_and_final_stages_clean_up():
    parts = stages((IMAGE / "Dockerfile").read_text())
    assert list(parts)[-1] == "debian"
    for line in re.sub(r"\\\n", " ", parts["debian"]).splitlines():
        if "apt-get update" in line:
            assert "rm -rf /var/lib/apt/lists/*" in line
    assert "gcc" not in parts["debian"] + parts["alpine"]


def test_compose_passes_on_every_setting_but_the_paths():
    named = set(re.findall(r"^      - ((?:INITD|CLAUDE)_\w+)", (ROOT / "compose.yaml").read_text(), re.MULTILINE))
    inside = {"policy", "run_dir", "state_dir", "workspace", "warden_user"}  # the image's own affair
    wanted = {field.variable for name, field in settings.FIELDS.items() if name not in inside}
    assert wanted <= named


def test_both_targets_end_alike():
    """But for the entry point: BusyBox's env cannot block signals."""
    parts = stages((IMAGE / "Dockerfile").read_text())

    def end(name):
        lines = parts[name].partition("COPY --from=")[2].replace(name, "TARGET").split("# ----")[0].splitlines()
        return [line for line in lines if line and not line.startswith("#")]

    assert end("debian")[:-1] == end("alpine")[:-1]
    assert all(end(name)[-1].startswith("ENTRYPOINT") for name in ("debian", "alpine"))


def test_no_frontend_from_a_registry():
    """`# syntax=` would make every build fetch an image first."""
    assert "# syntax" not in (IMAGE / "Dockerfile").read_text()


def packages(name):
    lines = (IMAGE / "packages" / f"{name}.txt").read_text().splitlines()
    return {line.partition("#")[0].strip() for line in lines} - {""}


def test_alpine_has_what_debian_has():
    """Under the names that Alpine gives them."""
    renamed = {
        "procps": "procps-ng", "openssh-client": "openssh-client-default", "util-linux": "setpriv",
        "libnftables1": "nftables", "python3-venv": "python3",
    }  # fmt: skip
    assert {renamed.get(name, name) for name in packages("debian")} <= packages("alpine")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts(script):
    assert script.stat().st_mode & 0o111
    assert script.read_text().startswith("#!/bin/sh\n")
    subprocess.run([SHELLCHECK, "-S", "style", script], check=True)


def ask(prompt, **environ):
    askpass = [IMAGE / "shims" / "askpass", prompt]
    environ = {"GIT_TOKEN_FILE": "/nonexistent"} | environ
    done = subprocess.run(askpass, capture_output=True, text=True, env=environ, check=False)
    return done.returncode, done.stdout


USER, PASSWORD = "Username for 'https://github.com': ", "Password for 'https://x-access-token@github.com': "


def test_askpass_answers_for_its_host():
    assert ask(USER, GITHUB_TOKEN="s3cret") == (0, "x-access-token\n")
    assert ask(PASSWORD, GITHUB_TOKEN="s3cret") == (0, "s3cret\n")


def test_askpass_prefers_the_file(tmp_path):
    file = tmp_path / "token"
    file.write_text("from-file")  # no newline at the end
    assert ask(PASSWORD, GIT_TOKEN_FILE=str(file), GITHUB_TOKEN="other") == (0, "from-file\n")
    file.write_text("")
    assert ask(PASSWORD, GIT_TOKEN_FILE=str(file), GITHUB_TOKEN="other") == (0, "other\n")


@pytest.mark.parametrize(
    "prompt",
    [
        "Password for 'https://x-access-token@evil.example': ",
        "Password for 'https://x-access-token@github.com.evil.example': ",
        "Password for 'https://x-access-token@github.com@evil.example': ",
        "Password for 'http://x-access-token@github.com': ",
        "Password for 'https://evil.example/x-access-token@github.com': ",
        "Username for 'https://evil.example': ",
        "",
    ],
)
def test_askpass_tells_nobody_else(prompt):
    assert ask(prompt, GITHUB_TOKEN="s3cret") == (1, "")


def test_askpass_without_a_token_lets_git_ask():
    assert ask(PASSWORD) == (1, "")


def test_askpass_for_another_host():
    prompt = PASSWORD.replace("github.com", "git.example")
    assert ask(prompt, GITHUB_TOKEN="s3cret", GIT_TOKEN_HOST="git.example") == (0, "s3cret\n")
    assert ask(PASSWORD, GITHUB_TOKEN="s3cret", GIT_TOKEN_HOST="git.example") == (1, "")


def test_the_agent_is_told_where_the_list_is_and_how_to_ask():
    text = (IMAGE / "finish").read_text()
    note = text[text.index("/etc/claude-code/CLAUDE.md <<'NOTE'\n") : text.index("\nNOTE\n")]
    commands = set(re.findall(r"`fwctl (\w+)", note))
    assert commands
    assert commands <= set(fwctl.COMMANDS)
    assert f"/run/initd/{published.FILE}" in note


@pytest.mark.parametrize(("wait", "code", "said"), [("1", 75, "not ready after 1 s"), ("1.5", 64, "SHIM_WAIT")])
def test_the_shim_waits_as_long_as_it_is_told(tmp_path, wait, code, said):
    environ = {"INITD_RUN_DIR": str(tmp_path), "SHIM_WAIT": wait, "PATH": "/usr/bin:/bin"}
    shim = [IMAGE / "shims" / "shim"]
    done = subprocess.run(shim, capture_output=True, text=True, env=environ, timeout=120, check=False)
    assert done.returncode == code
    assert said in done.stderr
    assert len(done.stderr.splitlines()) < 3
