"""Runs: warden, after the lockdown. Policy → enforce → guard → resolve → verify → armed, then upkeep until told to stop."""

from __future__ import annotations

import asyncio
import os
import time
from typing import TYPE_CHECKING, Any

from initd import feeds, logs, status
from initd.control import Control
from initd.core.leases import Leases
from initd.dnsguard import DnsGuard, GuardOptions
from initd.enforce import Enforcer
from initd.handover import tell
from initd.keeping import Channel
from initd.live import Live, Parts, literal_names
from initd.loading import Loaded, load_policy, resume_policy
from initd.operations import Operations
from initd.resolvconf import ResolvConf
from initd.upkeep import Upkeep
