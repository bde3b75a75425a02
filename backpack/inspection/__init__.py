"""Before a long run: check extensions on a user's own model, and say how it uses its parameters."""

from backpack.inspection.summaries import summary
from backpack.inspection.verification import verify

__all__ = ["summary", "verify"]
