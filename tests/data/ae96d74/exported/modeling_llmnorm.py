"""The classes of the installed package llmnorm (Auto classes, trust_remote_code)."""
