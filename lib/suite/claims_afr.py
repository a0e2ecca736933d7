"""x"""

from __future__ import annotations

from lib.suite.claim import Claim

CLAIMS: tuple[Claim, ...] = ()
