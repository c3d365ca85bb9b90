"""How long to wait before trying again: exponential backoff with full jitter.

Full jitter (a uniform draw between zero and the exponential cap) empties a crowd of reconnecting devices fastest; see
M. Brooker, "Exponential Backoff and Jitter", AWS Architecture Blog, 2015. Chance comes in as an argument.
"""

import msgspec


class Backoff(msgspec.Struct, frozen=True):
    """A schedule: before attempt `n` (0-based) wait up to `min(cap_s, base_s * 2**n)` seconds."""

    base_s: float = 0.5
    cap_s: float = 60.0

    def delay_s(self, attempt: int, uniform: float) -> float:
        """Seconds to wait before retry number `attempt` (0-based); `uniform` is a draw from [0, 1)."""
        exponent = min(attempt, 63)  # 2.0**1024 overflows; 2**63 is past any cap
        return uniform * min(self.cap_s, self.base_s * 2.0**exponent)
