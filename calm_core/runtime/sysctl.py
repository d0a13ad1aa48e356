"""What macOS tells about its hardware; Linux tells the same in /proc."""

import platform
import subprocess


def sysctl(name: str) -> str:
    """The value that macOS's sysctl has under ``name``; empty elsewhere, and where it has none."""
    if platform.system() != "Darwin":
        return ""
    try:
        found = subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return found.stdout.strip()
