"""What this server answers to parts of the V2 protocol that it does not do, or does not do yet. Knows no endpoint."""

from __future__ import annotations

NO_REPOSITORY_NAME = "'repository_name' specification is not supported"
