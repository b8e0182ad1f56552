"""Who is calling: tokens, the keys that verify them, scopes, and who may subscribe to what.

Layer: above `wire` and `runtime`, beside `stream` and `store`. It knows JSON Web Tokens and HTTP, and neither NATS
nor a database.
"""

from .issuing import issue, issue_service
from .principals import Caller, Device
from .scopes import Scopes
from .verifier import Verifier

__all__ = ["Caller", "Device", "Scopes", "Verifier", "issue", "issue_service"]
